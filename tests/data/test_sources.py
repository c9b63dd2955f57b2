"""Sources against the packages that own the formats, and what bad input says."""

import io
import json
import multiprocessing
import os
import pickle
import tarfile

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from samples import encode, picture, write_tars

from mmjax.data.records import BadRecordError
from mmjax.data.sources import DataNotFoundError, get_field, open_source
from mmjax.data.webdataset_source import build_index, expand_braces, open_index
from mmjax.registry import UnknownNameError


def opened(name, **fields):
    return open_source({"name": name, **fields})[0]


# --- digits, folder, table


def test_digits_are_sklearns_and_split_without_overlap():
    from sklearn.datasets import load_digits

    train, test = opened("digits", split="train"), opened("digits", split="test")
    reference = load_digits()
    assert len(train) + len(test) == len(reference.target) == 1797
    ids = {train.id(i) for i in range(len(train))} | {test.id(i) for i in range(len(test))}
    assert len(ids) == 1797
    number = int(test.id(3).split("[")[1][:-1])
    np.testing.assert_allclose(test[3]["image"], reference.images[number] * 255 / 16, atol=0.5)
    assert test[3]["label"] == reference.target[number]


def test_folder_labels_are_sorted_directories(folder):
    source = opened("folder", root=str(folder))
    assert len(source) == 30 and source.class_names == ["class_0", "class_1", "class_2"]
    assert [source[i]["label"] for i in (0, 10, 29)] == [0, 1, 2]
    assert source[12]["image"] == (folder / "class_1" / "002.jpg").read_bytes()
    assert source.id(12).endswith("class_1/002.jpg") and source[12]["text"] == "class 1"
    turned = opened("folder", root=str(folder), class_names=["class_2", "class_0"])
    assert len(turned) == 20 and turned[0]["label"] == 0 and "class_2" in turned.id(0)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_table_reads_paths(tmp_path, folder, kind):
    frame = pd.DataFrame({"file": ["class_0/001.jpg", "class_2/003.jpg"], "caption": ["a", "b"]})
    path = tmp_path / f"table.{kind}"
    getattr(frame, f"to_{kind}")(path, index=False)
    source = opened("table", path=str(path), image_column="file", root=str(folder))
    assert source[1]["file"] == (folder / "class_2" / "003.jpg").read_bytes()
    assert source[1]["caption"] == "b" and "class_2/003.jpg" in source.id(1)


def test_table_reads_bytes_and_hf_structs(tmp_path):
    data = [encode(picture(i)) for i in range(2)]
    pd.DataFrame({"image": data, "label": [3, 4]}).to_parquet(tmp_path / "plain.parquet")
    structs = [{"bytes": d, "path": None} for d in data]
    pd.DataFrame({"image": structs}).to_parquet(tmp_path / "hf.parquet")
    plain = opened("table", path=str(tmp_path / "plain.parquet"))
    assert plain[1] == {"image": data[1], "label": 4}
    assert opened("table", path=str(tmp_path / "hf.parquet"))[0]["image"] == data[0]


# --- webdataset


def test_tars_equal_the_webdataset_package(tars):
    webdataset = pytest.importorskip("webdataset")
    names = sorted(str(p) for p in tars.glob("*.tar"))
    reference = list(
        webdataset.WebDataset(names, shardshuffle=False, empty_check=False).to_tuple(
            "__key__", "jpg", "txt", "cls"
        )
    )
    source = opened("webdataset", shards=str(tars / "part-{000..003}.tar"), text="txt", label="cls")
    assert len(source) == len(reference) == 22
    for i, (key, jpg, txt, cls) in enumerate(reference):
        expected = {"image": jpg, "text": txt.decode(), "label": int(cls)}
        assert source[i] == expected and source.id(i).endswith(f".tar/{key}")
    copy = pickle.loads(pickle.dumps(source))  # as sent to a worker process
    assert copy[21] == source[21]


def test_braces_expand_as_in_the_braceexpand_package():
    braceexpand = pytest.importorskip("braceexpand").braceexpand
    for pattern in ("a-{000..012}.tar", "{x,y}/{0..3}.tar", "plain.tar", "{8..11}-{a,b}"):
        assert expand_braces(pattern) == list(braceexpand(pattern))


def test_index_is_kept_and_renewed(tmp_path):
    shard = write_tars(tmp_path, (3,)) / "part-000.tar"
    assert len(open_index(shard).keys) == 3
    kept = shard.with_name(shard.name + ".idx.npz")
    first = kept.stat().st_mtime_ns
    open_index(shard)
    assert kept.stat().st_mtime_ns == first
    write_tars(tmp_path, (5,))
    assert len(open_index(shard).keys) == 5  # another size: made again
    kept.write_bytes(b"damaged")
    assert len(open_index(shard).keys) == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["part-000.tar", "part-000.tar.idx.npz"]


def test_index_of_a_read_only_place_goes_to_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shard = write_tars(tmp_path / "shards", (3,)) / "part-000.tar"
    from mmjax.data import webdataset_source as module

    save = module._save

    def refuse_beside(place, stamp, index):
        if place.parent == shard.parent:
            raise PermissionError(30, "Read-only file system")
        save(place, stamp, index)

    monkeypatch.setattr(module, "_save", refuse_beside)
    open_index(shard)
    assert len(list((tmp_path / "cache").rglob("*.npz"))) == 1
    assert [p.name for p in shard.parent.iterdir()] == [shard.name]


def test_long_names_and_missing_members(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("k" * 150 + ".JPG", "k" * 150 + ".seg.png", "b.jpg", "b.txt"):
            info = tarfile.TarInfo(name)
            info.size = 4
            archive.addfile(info, io.BytesIO(b"data"))
    index = build_index(path)
    reference = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [k.decode() for k in index.keys] == [sample["__key__"] for sample in reference]
    assert index.suffixes == ("jpg", "seg.png", "txt")
    assert index.sizes.tolist() == [[4, 4, -1], [4, -1, 4]]


def write_members(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)


def test_json_members_are_fields(tmp_path):
    objects = [{"text_list": ["ä", "b"], "n": {"m": 1}}, ["no object"], {"image": "a.jpg", "n": 2}]
    members = {f"{i}.json": json.dumps(one).encode() for i, one in enumerate(objects)}
    members |= {"3.json": b'{"n": ', "0.jpg": b"pixels", "2.jpg": b"others"}
    shards = write_members(tmp_path / "x.tar", members)
    alone = opened("webdataset", shards=shards, image=None, json="json")
    assert len(alone) == 4 and alone[0] == objects[0] and alone[2] == objects[2]
    for index, error in ((1, "a list, not an object"), (3, "cannot be read")):
        with pytest.raises(BadRecordError, match=error):
            alone[index]
    # A member of its own comes before a field of the same name.
    beside = opened("webdataset", shards=shards, json="json")
    assert beside[0] == objects[0] | {"image": b"pixels"}
    assert beside[2] == {"image": b"others", "n": 2}
    only = write_members(tmp_path / "only.tar", {"0.json": b"{}"})
    with pytest.raises(UnknownNameError, match="set image=None"):
        opened("webdataset", shards=only, json="json")


# --- TFDS


def _prepare(directory, queue):
    import tiny_builder  # noqa: F401  (registers tiny_pictures)

    from mmjax.data.tfds_source import prepare

    queue.put(len(prepare("tiny_pictures", directory).as_data_source(split="train")))


def test_tfds_prepared_by_several_processes_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    jobs = [context.Process(target=_prepare, args=(str(tmp_path), queue)) for _ in range(3)]
    for job in jobs:
        job.start()
    assert [queue.get(timeout=60) for _ in jobs] == [6, 6, 6]
    for job in jobs:
        job.join()
        assert job.exitcode == 0
    import tiny_builder  # noqa: F401

    # Read by name alone, images still encoded; decoded they are what TFDS itself decodes.
    source = opened("tfds", dataset="tiny_pictures", split="train", data_dir=str(tmp_path))
    import tensorflow_datasets as tfds

    reference = tfds.builder("tiny_pictures", data_dir=str(tmp_path)).as_data_source(split="train")
    for i in range(6):
        got = np.asarray(Image.open(io.BytesIO(source[i]["image"])))
        np.testing.assert_array_equal(got, reference[i]["image"])
        assert source[i]["text"] == reference[i]["text"].decode()
        assert source[i]["label"] == reference[i]["label"]
        number = source[i]["text"].split()[1]
        captions = get_field(source[i], "captions.text", source.id(i))
        assert captions == [f"first {number}", f"second {number}"]
    assert source.class_names == ["even", "odd"]
    copy = pickle.loads(pickle.dumps(source))
    assert copy[3]["text"] == source[3]["text"] and source.id(3) == "tiny_pictures/train#3"
    half = opened("tfds", dataset="tiny_pictures", split="train[:50%]", data_dir=str(tmp_path))
    assert len(half) == 3


def test_no_tensorflow_is_imported(tmp_path):
    import subprocess
    import sys

    code = (
        "import sys; sys.path.insert(0, sys.argv[2]); import tiny_builder\n"
        "from mmjax.data import open_source\n"
        "s, _ = open_source(dict(name='tfds', dataset='tiny_pictures', split='train', "
        "data_dir=sys.argv[1])); s[0]\n"
        "assert not {'tensorflow', 'torch', 'transformers'} & set(sys.modules)\n"
    )
    here = os.path.dirname(__file__)
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(here))}
    subprocess.run([sys.executable, "-c", code, str(tmp_path), here], check=True, env=environment)


# --- bad input


def test_what_bad_input_says(tmp_path, folder, tars):
    def says(kind, pattern, name, **fields):
        with pytest.raises(kind, match=pattern):
            opened(name, **fields)

    says(UnknownNameError, "did you mean 'folder'", "foldr", root="x")
    says(UnknownNameError, "did you mean 'root'", "folder", rot="x")
    says(ValueError, "needs root", "folder")
    says(ValueError, "weight", "digits", weight=0)
    says(UnknownNameError, "did you mean 'train'", "digits", split="trian")
    misspelt = str(folder.parent / folder.name.replace("f", "g", 1))
    says(DataNotFoundError, f"did you mean '{folder.name}'", "folder", root=misspelt)
    (tmp_path / "empty").mkdir()
    says(DataNotFoundError, "holds no image", "folder", root=str(tmp_path / "empty"))
    says(DataNotFoundError, "did you mean 'class_1'", "folder", root=str(folder),
         class_names=["clas_1"])  # fmt: skip
    pd.DataFrame({"image": [], "text": []}).to_csv(tmp_path / "empty.csv", index=False)
    says(DataNotFoundError, "is empty", "table", path=str(tmp_path / "empty.csv"))
    says(UnknownNameError, "did you mean 'image'", "table", path=str(tmp_path / "empty.csv"),
         image_column="imag")  # fmt: skip
    missing = str(tars / "part-{002..005}.tar")
    says(DataNotFoundError, "2 of 4 shards .* part-004.tar|2 of 4 shards", "webdataset",
         shards=missing)  # fmt: skip
    says(DataNotFoundError, "did you mean 'part-000.tar'", "webdataset",
         shards=str(tars / "prt-000.tar"))  # fmt: skip
    says(UnknownNameError, "did you mean 'txt'", "webdataset",
         shards=str(tars / "*.tar"), text="text")  # fmt: skip
    says(DataNotFoundError, "hold no sample", "webdataset", shards=str(tars / "part-001.tar"))
    cut = tmp_path / "cut.tar"
    cut.write_bytes((tars / "part-002.tar").read_bytes()[:5000])
    says(DataNotFoundError, "whole, uncompressed tar", "webdataset", shards=str(cut))


def test_what_bad_tfds_input_says(openmoji_dir):
    def says(kind, pattern, **fields):
        with pytest.raises(kind, match=pattern):
            opened("tfds", **fields)

    says(DataNotFoundError, "did you mean 'openmoji'", dataset="openmojii", split="train",
         data_dir=openmoji_dir)  # fmt: skip
    says(UnknownNameError, "did you mean 'heldout'", dataset="openmoji", split="held_out",
         data_dir=openmoji_dir)  # fmt: skip
    says(DataNotFoundError, "not prepared.*array_record", dataset="openmoji", split="train",
         data_dir=openmoji_dir + "/other", download=False)  # fmt: skip
