"""Tokenizers: conventions, round trips, agreement with transformers."""

import json
import multiprocessing
import os

import numpy as np
import pytest

from mmjax.data.run_tokenizer import build_tokenizer
from mmjax.data.tokenizer import HFTokenizer, train_tokenizer
from mmjax.registry import UnknownNameError

CAPTIONS = [
    f"{size} {colour} {thing}"
    for size in ("a small", "the large")
    for colour in ("red", "blue", "green")
    for thing in ("dog face", "smiling cat", "flag of france", "three o'clock")
]


@pytest.mark.parametrize("name,vocabulary", [("bpe", 400), ("wordpiece", 120), ("wordlevel", 60)])
def test_round_trip_and_conventions(name, vocabulary):
    tokenizer = train_tokenizer(name, iter(CAPTIONS), vocabulary)
    assert tokenizer.vocab_size <= vocabulary
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 2, 3)
    ids, mask, truncated = tokenizer.encode(["The LARGE red dog face", "cat"], 24)
    assert ids.dtype == np.int32 and mask.dtype == bool and truncated == 0
    for row, kept in zip(ids, mask, strict=True):
        tokens = row[kept].tolist()
        assert tokens[0] == 2 and tokens[-1] == 3 and (row[~kept] == 0).all()
    assert tokenizer.decode(ids[0]) == "the large red dog face"


@pytest.mark.parametrize("name", ["bpe", "wordpiece", "wordlevel"])
def test_training_is_deterministic(name):
    """The library's hash tables are seeded anew for every tokenizer."""
    from pydoc_data.topics import topics

    texts = " ".join(topics.values()).split("\n")[:1500]
    ids = [train_tokenizer(name, texts, 900).encode(texts[:200], 64).ids for _ in range(3)]
    np.testing.assert_array_equal(ids[0], ids[1])
    np.testing.assert_array_equal(ids[0], ids[2])


def test_bytes_know_every_text():
    tokenizer = train_tokenizer("bpe", iter(CAPTIONS), 400)
    text = "são tomé & príncipe \U0001f600"
    ids, _, truncated = tokenizer.encode([text], 60)
    assert tokenizer.decode(ids[0]) == text and truncated == 0
    assert tokenizer.unknown_id not in ids


def test_truncation_keeps_the_end_token_and_is_counted():
    tokenizer = train_tokenizer("wordlevel", iter(CAPTIONS), 60)
    ids, mask, truncated = tokenizer.encode(["red dog", "the large red dog face"], 4)
    assert truncated == 1 and mask.all()
    assert ids[:, -1].tolist() == [3, 3]


def test_build_trains_once_and_keeps(tmp_path, openmoji_dir):
    train = dict(
        sources=[dict(name="tfds", dataset="openmoji", split="train", data_dir=openmoji_dir)],
        text=dict(max_len=16, also="aliases", also_share=0.5),
    )
    config = dict(tokenizer=dict(name="wordpiece", vocab_size=1500), train=train)
    first = build_tokenizer(config, tmp_path)
    kept = tmp_path / "tokenizer" / "tokenizer.json"
    stamp = kept.stat().st_mtime_ns
    second = build_tokenizer(config, tmp_path)
    assert kept.stat().st_mtime_ns == stamp
    texts = ["dog face", "flag of france", "smiling cat with heart-eyes"]
    np.testing.assert_array_equal(first.encode(texts, 16).ids, second.encode(texts, 16).ids)
    other = build_tokenizer(config, tmp_path / "again")  # and training is deterministic
    np.testing.assert_array_equal(first.encode(texts, 16).ids, other.encode(texts, 16).ids)
    assert not [p for p in os.listdir(tmp_path) if p.startswith(".tokenizer.") and "lock" not in p]
    with pytest.raises(ValueError, match="was trained with"):
        build_tokenizer({**config, "tokenizer": dict(name="wordpiece", vocab_size=99)}, tmp_path)
    assert build_tokenizer({**config, "tokenizer": None}, tmp_path) is None


def test_bad_tokenizer_configs(tmp_path):
    def says(pattern, kind=ValueError, **tokenizer):
        with pytest.raises(kind, match=pattern):
            build_tokenizer(dict(tokenizer=tokenizer, train=dict(sources=[])), tmp_path)

    says("did you mean 'wordpiece'", UnknownNameError, name="word_piece", vocab_size=300)
    says("did you mean 'vocab_size'", UnknownNameError, name="bpe", vocabsize=300)
    says("needs vocab_size", name="bpe")
    says("does not exist", name="hf", directory=str(tmp_path / "gone"))
    says("There is no .*gone", name="run", directory=str(tmp_path / "gone"))
    with pytest.raises(ValueError, match="260"):
        train_tokenizer("bpe", iter(CAPTIONS), 100)


def clip_directory(path):
    """A CLIP tokenizer directory with a small vocabulary, as `save_pretrained` lays it out."""
    transformers = pytest.importorskip("transformers")
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    merges = ["d o", "do g</w>", "c a", "ca t</w>", "r e", "re d</w>"]
    words = letters + [letter + "</w>" for letter in letters]
    words += [merge.replace(" ", "") for merge in merges] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    path.mkdir()
    (path / "vocab.json").write_text(json.dumps(vocabulary))
    (path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77})
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    tokenizer.save_pretrained(path)
    return tokenizer


def test_hf_directory_agrees_with_transformers(tmp_path):
    reference = clip_directory(tmp_path / "clip")
    tokenizer = HFTokenizer(str(tmp_path / "clip"))
    texts = ["Red DOG", "a cat", "abcdefghijklmnopqrst"]
    ids, mask, truncated = tokenizer.encode(texts, 10)
    expected = reference(
        texts, padding="max_length", max_length=10, truncation=True, return_tensors="np"
    )
    np.testing.assert_array_equal(ids, expected["input_ids"])
    np.testing.assert_array_equal(mask, expected["attention_mask"].astype(bool))
    assert truncated == 1 and tokenizer.decode(ids[0]) == "red dog"
    assert tokenizer.eos_id == ids[2, -1] == reference.eos_token_id


def test_special_tokens_that_it_lacks_are_added(tmp_path):
    reference = clip_directory(tmp_path / "clip")
    given = ("<|endofchunk|>", reference.eos_token)
    tokenizer = HFTokenizer(str(tmp_path / "clip"), special_tokens=given)
    assert tokenizer.vocab_size == len(reference) + 1
    ids = tokenizer.backend.encode("red<|endofchunk|>dog", add_special_tokens=False).ids
    assert ids.count(len(reference)) == 1
    assert tokenizer.decode(ids) == "red dog"


def test_a_model_without_mask_attends_to_its_padding(tmp_path):
    """SigLIP's tokenizer_config lists input_ids only: padding to the full length is attended to."""
    directory = tmp_path / "clip"
    clip_directory(directory)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config["model_input_names"] = ["input_ids"]
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = HFTokenizer(str(directory))
    ids, mask, _ = tokenizer.encode(["red dog"], 64)
    assert ids.shape == (1, 64) and mask.all()
    masked = HFTokenizer(str(directory), attend_padding=False)
    assert not masked.encode(["red dog"], 64).mask.all()


def test_several_processes_train_one_tokenizer(tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    jobs = [context.Process(target=_build, args=(str(tmp_path), queue)) for _ in range(3)]
    for job in jobs:
        job.start()
    assert [queue.get(timeout=60) for _ in jobs] == [14, 14, 14]  # ten digits and the special ones
    for job in jobs:
        job.join()


def _build(workdir, queue):
    train = dict(sources=[dict(name="digits")], text=dict(max_len=8))
    config = dict(tokenizer=dict(name="wordlevel", vocab_size=100), train=train)
    queue.put(build_tokenizer(config, workdir).vocab_size)
