"""The loader: order, resume, shards, mixtures, broken records, worker processes."""

import collections
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from samples import data, encode, picture, stream, write_folder

from mmjax.data import TooManyBadRecordsError, open_eval, open_train
from mmjax.data.tokenizer import train_tokenizer
from mmjax.registry import UnknownNameError

AUGMENT = (dict(name="random_resized_crop"), dict(name="color_jitter"), dict(name="flip"))
FOLDER_SIZE = 30


@pytest.fixture(scope="module")
def tokenizer():
    texts = (f"class {i} caption {j}" for i in range(5) for j in range(30))
    return train_tokenizer("wordlevel", texts, 100)


def assert_same(left, right):
    assert left.ids == right.ids and left.texts == right.texts
    for name, array in left.arrays.items():
        np.testing.assert_array_equal(array, right.arrays[name])


def opened(config, tokenizer=None, *, batch=8, seed=1, index=0, count=1):
    return open_train(
        config, tokenizer, batch_size=batch, seed=seed, process_index=index, process_count=count
    )


def folder_stream(folder, **more):
    return stream(dict(name="folder", root=str(folder)), augment=AUGMENT, text=True, **more)


@pytest.mark.parametrize("workers,threads", [(0, 0), (0, 3), (2, 0)])
def test_resume_anywhere_equals_uninterrupted(folder, tokenizer, workers, threads):
    """At several points, twice from one point, and whatever makes the batches."""
    loader = opened(data(folder_stream(folder)), tokenizer)
    states, batches = [], []
    for _ in range(10):
        states.append(json.loads(json.dumps(loader.get_state())))
        batches.append(next(loader))
    loader.close()
    assert batches[0].arrays["image"].shape == (8, 16, 16, 3)
    assert batches[0].arrays["text"].dtype == np.int32
    assert batches[0].arrays["text_mask"].dtype == bool

    other = opened(data(folder_stream(folder), workers=workers, threads=threads), tokenizer)
    try:
        assert_same(next(other), batches[0])
        for start in (7, 3, 3, 0):
            other.set_state(states[start])
            assert other.get_state() == states[start]
            for step in range(start, min(start + 3, 10)):
                assert_same(next(other), batches[step])
    finally:
        other.close()


def test_each_epoch_has_every_record_once_in_a_new_order(folder):
    config = data(stream(dict(name="folder", root=str(folder))))
    loader = opened(config, batch=6)
    assert loader.steps_per_epoch == 5 and loader.samples_per_epoch == FOLDER_SIZE
    epochs = [[name for _ in range(5) for name in next(loader).ids] for _ in range(3)]
    assert all(len(set(epoch)) == FOLDER_SIZE for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    other = opened(config, batch=6, seed=2)
    assert [n for _ in range(5) for n in next(other).ids] != epochs[0]
    # The same record looks different in another epoch: augmentation follows the position.


def test_processes_share_one_global_batch(folder, tokenizer):
    """Disjoint parts, together the batch of one process; a state holds for any number of them."""
    config = data(folder_stream(folder))
    whole = opened(config, tokenizer, batch=12)
    parts = [opened(config, tokenizer, batch=3, index=i, count=4) for i in range(4)]
    for _ in range(3):
        expected, got = next(whole), [next(part) for part in parts]
        assert [name for batch in got for name in batch.ids] == expected.ids
        for name, array in expected.arrays.items():
            np.testing.assert_array_equal(np.concatenate([b.arrays[name] for b in got]), array)
    states = [part.get_state() for part in parts]
    assert all(state == whole.get_state() for state in states)
    pair = [opened(config, tokenizer, batch=6, index=i, count=2) for i in range(2)]
    for loader in pair:
        loader.set_state(states[0])
    assert next(pair[0]).ids + next(pair[1]).ids == next(whole).ids


def test_mixture_follows_the_weights(folder, tars):
    sources = [
        dict(name="folder", root=str(folder), weight=3.0),
        dict(name="webdataset", shards=str(tars / "*.tar"), label="cls", weight=1.0),
    ]
    loader = opened(data(stream(sources)), batch=40)
    assert loader.samples_per_epoch == 52
    names = [name for _ in range(6) for name in next(loader).ids]
    assert sum(".tar/" in name for name in names) == len(names) / 4
    counts = collections.Counter(name for name in names if ".tar/" in name)
    assert set(counts.values()) <= {2, 3}  # 60 draws of 22: shuffled in epochs of its own
    state = loader.get_state()
    with pytest.raises(ValueError, match="saved with another data set"):
        opened(data(stream(sources[0])), batch=20).set_state(state)


def test_evaluation_is_in_order_and_padded(folder, tokenizer):
    config = stream(dict(name="folder", root=str(folder)), text=True)
    loaders = [
        open_eval(config, tokenizer, batch_size=4, process_index=i, process_count=2)
        for i in range(2)
    ]
    assert len(loaders[0]) == len(loaders[1]) == 4 and loaders[0].num_examples == 30
    names, texts = [], []
    for left, right in zip(*loaders, strict=True):
        for batch in (left, right):
            assert batch.arrays["image"].shape == (4, 16, 16, 3) and len(batch.texts) == 4
            assert (batch.arrays["image"][~batch.valid] == 0).all()
            names += [n for n, ok in zip(batch.ids, batch.valid, strict=True) if ok]
            texts += [t for t, ok in zip(batch.texts, batch.valid, strict=True) if ok]
    assert names == sorted(names) and len(set(names)) == 30
    assert texts[0] == "class 0" and texts[-1] == "class 2"
    assert [b.ids for b in loaders[0]] == [b.ids for b in loaders[0]]  # as often as one likes


# --- broken records


@pytest.fixture
def damaged(tmp_path):
    """60 images of which 2 are broken."""
    root = write_folder(tmp_path / "images", classes=3, each=20)
    (root / "class_0" / "003.jpg").write_bytes(b"not an image")
    whole = (root / "class_1" / "007.jpg").read_bytes()
    (root / "class_1" / "007.jpg").write_bytes(whole[: len(whole) // 2])
    return root


def test_broken_images_are_replaced_and_named(damaged):
    config = data(stream(dict(name="folder", root=str(damaged))), max_bad_share=0.05)
    loader = opened(config, batch=20)
    batches = [next(loader) for _ in range(3)]
    skipped = [bad for batch in batches for bad in batch.skipped]
    names = [name for batch in batches for name in batch.ids]
    assert sorted(bad.record[-15:] for bad in skipped) == ["class_0/003.jpg", "class_1/007.jpg"]
    # The neighbour stands in, nothing else moves.
    counts = collections.Counter(name[-15:] for name in names)
    assert counts["class_0/004.jpg"] == counts["class_1/008.jpg"] == 2 and len(names) == 60
    again = opened(config, batch=20)
    again.set_state({**loader.get_state(), "position": 20})
    assert next(again).ids == batches[1].ids


def test_too_many_broken_images_stop_the_run(damaged):
    loader = opened(data(stream(dict(name="folder", root=str(damaged)))), batch=20)
    broken = r"00(3.jpg: 12 bytes of no known|7.jpg: \w*Error)"
    with pytest.raises(TooManyBadRecordsError, match=rf"(?s)1.00%.*{broken}"):
        for _ in range(3):
            next(loader)
    all_broken = write_folder(damaged.parent / "broken", classes=1, each=40)
    for file in all_broken.rglob("*.jpg"):
        file.write_bytes(b"broken")
    with pytest.raises(TooManyBadRecordsError, match="Check the files, paths"):
        next(opened(data(stream(dict(name="folder", root=str(all_broken)))), batch=20))


def test_broken_images_in_evaluation_keep_their_row(damaged):
    config = stream(dict(name="folder", root=str(damaged)))
    batches = list(open_eval(config, None, batch_size=16, loading=dict(max_bad_share=0.05)))
    valid = np.concatenate([batch.valid for batch in batches])
    assert valid.sum() == 58 and not valid[3] and not valid[27]
    assert sum(len(batch.skipped) for batch in batches) == 2
    with pytest.raises(TooManyBadRecordsError):
        list(open_eval(config, None, batch_size=16))


def test_missing_files_and_empty_captions_are_broken_records(tmp_path, tokenizer):
    import pandas as pd

    (tmp_path / "a.jpg").write_bytes(encode(picture(1)))
    rows = [("a.jpg", "class 1")] * 20 + [("gone.jpg", "class 2"), ("a.jpg", None)]
    pd.DataFrame(rows, columns=["image", "text"]).to_csv(tmp_path / "t.csv", index=False)
    config = stream(dict(name="table", path=str(tmp_path / "t.csv")), text=True, label=False)
    loader = opened(data(config, max_bad_share=0.2), tokenizer, batch=22)
    errors = sorted(bad.error for bad in next(loader).skipped)
    assert "gone.jpg" in errors[0] and "holds no caption" in errors[1]


# --- bad configs


def test_what_bad_configs_say(folder, tokenizer):
    good = stream(dict(name="folder", root=str(folder)))

    def says(kind, pattern, config, **more):
        with pytest.raises(kind, match=pattern):
            opened(config, tokenizer, **more)

    says(UnknownNameError, "did you mean 'workers'", {**data(good), "worker": 2})
    says(UnknownNameError, "did you mean 'image'", data({**good, "imag": {}}))
    says(UnknownNameError, "did you mean 'preset'", data({**good, "image": dict(prest="vit")}))
    says(UnknownNameError, "did you mean 'siglip'", data(stream(good["sources"], preset="siglp")))
    says(UnknownNameError, "did you mean 'label'", data({**good, "label": dict(field="lable")}))
    says(ValueError, "holds 30 records, fewer than one batch of 32", data(good), batch=16, count=2)
    says(ValueError, "sources is empty", data(stream([])))
    says(ValueError, "must not be negative", data(good, workers=-1))
    says(ValueError, "seed", data(good), seed=-1)
    with pytest.raises(ValueError, match="no tokenizer"):
        opened(data(stream(good["sources"], text=True)))
    with pytest.raises(ValueError, match="augment"):
        open_eval(stream(good["sources"], augment=AUGMENT), None, batch_size=4)


# --- worker processes


def test_workers_end_with_a_killed_parent(folder, tmp_path):
    """SIGKILL lets nobody clean up: the workers notice by themselves."""
    script = tmp_path / "train.py"
    script.write_text(
        "import sys, time, json, multiprocessing\n"
        "from mmjax.data import open_train\n"
        "if __name__ == '__main__':\n"
        "    loader = open_train(json.loads(sys.argv[1]), None, batch_size=8, seed=0)\n"
        "    next(loader)\n"
        "    print([c.pid for c in multiprocessing.active_children()], flush=True)\n"
        "    time.sleep(100)\n"
    )
    config = json.dumps(data(stream(dict(name="folder", root=str(folder))), workers=2))
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    process = subprocess.Popen(
        [sys.executable, str(script), config],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": root},
    )
    workers = json.loads(process.stdout.readline())
    assert len(workers) == 2 and all(os.path.exists(f"/proc/{pid}") for pid in workers)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for _ in range(200):
        if not any(_alive(pid) for pid in workers):
            return
        time.sleep(0.1)
    raise AssertionError(f"workers {workers} outlive their parent")


def _alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
