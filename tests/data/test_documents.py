"""Documents: what gaps cost, where they are cut, and what of them is learnt."""

import base64
import io
import json
import sys
import tarfile
import types
from unittest import mock

import numpy as np
import pytest
from PIL import Image
from samples import data, encode, picture

from mmjax.data import Skipped, TooManyBadRecordsError, open_eval, open_source, open_train
from mmjax.data.loader import Watch
from mmjax.data.records import BadRecordError
from mmjax.data.samples import SampleMaker
from mmjax.data.spec import make_form, parse
from mmjax.data.tokenizer import HFTokenizer, train_tokenizer

# Two pictures of an image, of two visual tokens each, and special tokens before both.
TILES = dict(
    name="tiles", preset="siglip", size=16, tokens=2, rows=1, columns=2,
    markers=[["<bos>", "<eos><bos>"]],
)  # fmt: skip
TEXTS = ["a dog on", None, "the red square", None, None, "left of three cats", None, "one tree"]


def write_documents(root, records):
    root.mkdir(exist_ok=True)
    for i in range(4):
        (root / f"{i}.png").write_bytes(encode(picture(i, (32, 16)), "PNG"))
    (root / "documents.json").write_text(json.dumps(records))
    return dict(name="json", path=str(root / "documents.json"), form="interleaved")


def document(*images):
    images = iter(images or [f"{i}.png" for i in range(4)])
    return {"texts": TEXTS, "images": [next(images) if one is None else None for one in TEXTS]}


def stream(source, **options):
    default = dict(template="interleaved", max_len=200, images=8, layout=TILES, too_long="cut")
    return dict(sources=[source], conversation=default | options)


@pytest.fixture(scope="module")
def tokenizer():
    words = " ".join(text for text in TEXTS if text)
    return train_tokenizer("bpe", [words] * 3 + ["Question Answer"], 300)


def encoded(source, tokenizer, index=0, **options):
    """The sample of a document."""
    spec = parse(stream(source, **options))
    maker = SampleMaker(spec, [open_source(one)[0] for one in spec.sources], tokenizer)
    return maker.encode(maker.draw(0, index, None), (0, index, None))


# --- gaps


def info(place, image, similarity=0.3, key="image"):
    return {key: image, "matched_text_index": place, "matched_sim": similarity}


def test_gaps_of_mmc4_are_left_out():
    pixels = encode(picture(1), "PNG")
    form = make_form("mmc4")
    record = {
        "text_list": np.array(["one.", " ", None, "two.", "three."], dtype=object),
        "image_info": [
            info(np.int64(0), pixels),
            info(np.uint8(3), base64.b64encode(pixels).decode(), key="image_base64"),
            info(np.int64(4), None),
            {"matched_text_index": None, "matched_sim": None},  # could not be had
            info(4, base64.encodebytes(pixels).decode()),  # in lines
        ],
    }
    said = form(record, "r", None)
    assert said.turns[0].parts == (0, "one.", 1, "two.", 2, "three.")
    assert said.images == (pixels,) * 3
    named = make_form(dict(name="mmc4", image_key="image_base64"))
    assert named(record, "r", None).turns[0].parts == ("one.", 0, "two. three.")
    gone = {"text_list": ["a"], "image_info": [info(0, None)]}
    with pytest.raises(BadRecordError, match="entries of 'image_info' have image, matched_sim"):
        form(gone, "r", None)
    for place in (1.0, None, -1, np.int64(1)):
        with pytest.raises(BadRecordError, match="matched to the text"):
            form({"text_list": ["a"], "image_info": [info(place, b"1")]}, "r", None)
    with pytest.raises(BadRecordError, match="not base64"):
        form({"text_list": ["a"], "image_info": [info(0, "a.jpg")]}, "r", None)
    with pytest.raises(BadRecordError, match="no text after its images"):
        form({"text_list": [" "], "image_info": [info(0, b"1")]}, "r", None)


def test_gaps_of_obelics_are_left_out():
    form = make_form("interleaved")
    record = {
        "texts": [None, "a", "", None, "  ", "b"],
        "images": [None, None, None, b"1", b"2", None],
    }
    said = form(record, "r", None)
    assert said.turns[0].parts == ("a", 0, 1, "b") and said.images == (b"1", b"2")
    with pytest.raises(BadRecordError, match="place 1 must hold either"):
        form({"texts": [None, "a"], "images": [None, b"1"]}, "r", None)
    with pytest.raises(BadRecordError, match="no text after its images"):
        form({"texts": [None, ""], "images": [None, None]}, "r", None)


# --- cutting


@pytest.mark.parametrize("template", ["interleaved", "stream"])
def test_a_document_is_cut_where_its_row_ends(tokenizer, tmp_path, template):
    """At every length: as many tokens as fit and end in one that is learnt, and their images."""
    source = write_documents(tmp_path, [document()])
    whole = encoded(source, tokenizer, template=template)
    assert not whole.cut and whole.size[1] == 8
    # Up to each token, how many images have begun.
    begun = np.cumsum(np.isin(whole.place, [0, 4, 8, 12]))
    cut = 0
    for length in range(2, len(whole.tokens) + 1):
        learnt = np.flatnonzero(whole.learnt[:length])
        if not learnt.size:
            with pytest.raises(BadRecordError, match=f"too long: .*max_len is {length},"):
                encoded(source, tokenizer, template=template, max_len=length)
            continue
        end = learnt[-1] + 1
        sample = encoded(source, tokenizer, template=template, max_len=length)
        for key in ("tokens", "learnt", "place"):
            np.testing.assert_array_equal(getattr(sample, key), getattr(whole, key)[:end])
        assert sample.shown == len(sample.images) == begun[end - 1]
        assert sample.pictures == 2 * sample.shown and sample.cut == (end < len(whole.tokens))
        cut += sample.cut
    assert cut > 10
    # Of the second and the third image, side by side, there is room for one only: none is shown.
    some = encoded(source, tokenizer, template=template, images=5)
    assert some.shown == 1 and some.learnt[-1]
    for targets in (1, 4):
        few = encoded(source, tokenizer, template=template, max_targets=targets)
        assert few.size[2] == targets and few.learnt[-1]
    with pytest.raises(BadRecordError, match="too long: "):
        encoded(source, tokenizer, template=template, max_len=30, too_long="skip")


def test_images_that_are_cut_off_are_not_read(tokenizer, tmp_path):
    source = write_documents(tmp_path, [document("0.png", "1.png", "gone.png", "gone.png")] * 2)
    with pytest.raises(BadRecordError, match=r"gone\.png cannot be read"):
        encoded(source, tokenizer)
    whole = encoded(write_documents(tmp_path / "whole", [document()]), tokenizer)
    second = int(np.flatnonzero(whole.place == 4)[0])  # of the second image, the first place
    rows = {}
    for pack in (False, True):
        config = stream(source, max_len=second, pack=pack, window=2)
        batch = next(open_train(data(config), tokenizer, batch_size=2, seed=0))
        assert batch.truncated == 2 and not batch.skipped
        rows[pack] = batch.arrays
    for key in ("tokens", "weights", "place", "images"):
        np.testing.assert_array_equal(rows[False][key], rows[True][key])
    assert rows[True]["images"][:, :2].any() and not rows[True]["images"][:, 2:].any()


@pytest.mark.parametrize(
    "options", [dict(), dict(pack=True), dict(images=1, max_len=60, too_long="skip")]
)
def test_what_is_larger_than_a_row_is_no_broken_record(tokenizer, tmp_path, options, caplog):
    """In ten of forty documents there is no room for what follows the image, or none for it."""
    short = {"texts": ["a dog on the red square"], "images": [None]}
    long = {"texts": [None, "one tree"], "images": ["0.png", None]}
    source = write_documents(tmp_path, [long if i % 4 == 0 else short for i in range(40)])
    config = stream(source, **(dict(max_len=7, window=40, images=2) | options))
    loader = open_train(data(config, max_bad_share=0.01), tokenizer, batch_size=2, seed=0)
    skipped = [bad for _ in range(30) for bad in next(loader).skipped]
    assert len({bad.record for bad in skipped}) == 10
    assert all(bad.error.startswith("too ") for bad in skipped)
    assert loader.larger == len(skipped)
    warned = [record for record in caplog.records if "larger than a row" in record.getMessage()]
    assert len(warned) == 1
    # A score without them would be of other data.
    with pytest.raises(TooManyBadRecordsError, match=r"too (long|many)"):
        list(open_eval(config, tokenizer, batch_size=4))


def test_broken_records_beside_larger_ones_still_stop_a_run():
    long, gone = Skipped("a", "too long: 9 tokens"), Skipped("b", "gone.png cannot be read")
    watch = Watch(0.02, 100, spare=True)
    watch.see(10, [long] * 50 + [gone] * 2)
    assert watch.larger == 50
    with pytest.raises(TooManyBadRecordsError, match=r"3 broken records .*\n  b: gone[^\n]*$"):
        watch.see(10, [gone])
    with pytest.raises(TooManyBadRecordsError, match="a: too long"):
        Watch(0.02, 100).see(10, [long] * 3)


# --- what OpenFlamingo learns

SENTENCES = ["one red dog.", "two cats sit here!", "a tree", "on the left, a square.", "the end."]


@pytest.fixture(scope="module")
def flamingo_tokenizer(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    import tokenizers
    from tokenizers import models, pre_tokenizers, processors, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<PAD>", "<s>", "</s>", "<image>", "<|endofchunk|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator(SENTENCES, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<PAD>"
    )
    directory = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(directory)
    return fast, HFTokenizer(str(directory))


@pytest.fixture(scope="module")
def package():
    """open_flamingo, with modules for what it imports and is not used here."""
    pytest.importorskip("torch")
    import importlib

    importlib.import_module("transformers.modeling_utils")
    names = ("open_clip", "wandb", "torchvision", "webdataset", "data_utils", "horovod")
    stubs = {name: types.ModuleType(name) for name in names}
    kept = types.SimpleNamespace(RandomHorizontalFlip=lambda p: lambda images: images)
    stubs["torchvision"].transforms = kept
    before = {name: sys.modules.get(name) for name in names}
    sys.modules.update(stubs)
    try:
        yield pytest.importorskip(
            "open_flamingo.train.data", reason="pip install --no-deps open_flamingo==2.0.1"
        )
    finally:
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


class Theirs:
    """A tokenizer with names that transformers had when the package was written."""

    additional_special_tokens = ("<image>", "<|endofchunk|>")
    additional_special_tokens_ids = (3, 4)
    pad_token_id, eos_token = 0, "</s>"

    def __init__(self, fast):
        self._fast = fast

    def __call__(self, *args, **options):
        return self._fast(*args, **options)


class Recorder:
    """A model that keeps what it is to learn."""

    def __init__(self):
        self.labels = []

    def train(self):
        pass

    def parameters(self):
        return ()

    def __call__(self, *, labels, **_):
        import torch

        self.labels.append(labels.numpy())
        return (torch.zeros((), requires_grad=True),)


class Batches(list):
    num_batches = 1


def theirs(package, fast, pairs, documents, length):
    """(ids, labels) of pairs, and of documents, each [batch, tokens], from their training loop."""
    import torch
    from open_flamingo.train.train_utils import train_one_epoch

    def read(one):
        return torch.zeros(3, 2, 2)

    captions = package.preprocess_laion_text(pairs, Theirs(fast), max_tokens=length)
    # Half of the documents of one image are left out by chance.
    with mock.patch.object(package.random, "random", return_value=1.0):
        made = [
            package.preprocess_interleaved(
                [json.dumps(one)], Theirs(fast), read, 0.24, 1, 5, length
            )
            for one in documents
        ]
    model = Recorder()
    args = types.SimpleNamespace(
        num_epochs=1, precision="fp32", fsdp=False, gradient_accumulation_steps=1, rank=1,
        loss_multiplier_laion=1.0, loss_multiplier_mmc4=1.0, freeze_lm_embeddings=True,
        logging_steps=1,
    )  # fmt: skip
    images = torch.stack([one[0] for one in made])
    train_one_epoch(
        args, model, 0, Batches([(torch.zeros(len(pairs), 3, 2, 2), captions)]),
        Batches([(images, [one[1] for one in made])]), Theirs(fast), mock.Mock(), mock.Mock(),
        "cpu", None,
    )  # fmt: skip
    ids = captions[0].numpy(), np.concatenate([one[1][0].numpy() for one in made])
    return list(zip(ids, model.labels, strict=True))


def flamingo_documents():
    """As their files have them: images in base64, of more than 10 kB, with all similarities."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (70, 70, 3), dtype=np.uint8))
    pixels = base64.b64encode(encode(noise, "PNG")).decode()
    for places in ((0, 2, 3), (1, 3), (2, 4)):
        entries = [info(place, pixels, key="image_base64") for place in places]
        similar = [[0.3 if i == place else 0.1 for i in range(5)] for place in places]
        yield {"text_list": SENTENCES, "image_info": entries, "similarity_matrix": similar}


@pytest.mark.torch
@pytest.mark.parametrize("length", [100, 24, 20])  # at 24 an image is the last token of a row
def test_ids_and_what_is_learnt_are_openflamingos(package, flamingo_tokenizer, tmp_path, length):
    """Documents, whole and cut, and pairs of an image and its caption."""
    fast, ours = flamingo_tokenizer
    documents = list(flamingo_documents())
    (tmp_path / "0.png").write_bytes(encode(picture(0), "PNG"))
    pairs = [{"image": "0.png", "text": text} for text in SENTENCES]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for number, one in enumerate(documents):
            content = json.dumps(one).encode()
            member = tarfile.TarInfo(f"{number}.json")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    form = dict(name="caption", document=True)
    sources = [
        dict(name="json", path=str(tmp_path / "pairs.json"), form=form),
        dict(name="webdataset", shards=str(tmp_path / "x.tar"), image=None, json="json",
             form="mmc4"),
    ]  # fmt: skip
    layout = dict(name="whole", preset="clip", size=16, tokens=1)
    options = dict(template="openflamingo", layout=layout, max_len=length, image_token=3)
    for source, (ids, labels) in zip(
        sources, theirs(package, fast, SENTENCES, documents, length), strict=True
    ):
        cut = 0
        for index, (row, learnt) in enumerate(zip(ids, labels != -100, strict=True)):
            sample = encoded(source, ours, index, **options)
            count = len(sample.tokens)
            assert sample.tokens.tolist() == row[:count].tolist()
            # Nothing comes before the first token that it could be predicted from.
            assert sample.learnt[1:].tolist() == learnt[1:count].tolist()
            assert sample.shown == (row[:count] == 3).sum()
            # Theirs goes on with an end of the text. (Of pairs they learn it: what is to leave it
            # out compares ids with its text.)
            rest = set(row[count:].tolist()) - {0}
            assert rest <= {2} or (sample.cut and not learnt[count:].any())
            cut += sample.cut
        assert (cut > 0) == (length < 100 and source["name"] == "webdataset")
