"""Tokenizers written into small GGUF files, beside what transformers reads from the same files."""

import json

import numpy as np
import pytest

from mmjax.convert import ConversionError
from mmjax.convert.gguf_tokenizer import read_tokenizer

gguf = pytest.importorskip("gguf")

TEXT = "The quick brown  fox\n\njumps over 1234 lazy dogs, doesn't it? Überraschung: 日本 🎉 end."
TEMPLATE = "{% for m in messages %}<|start|>{{ m['content'] }}<|end|>{% endfor %}"


def write(path, **facts):
    """A GGUF file with one tensor and these facts about its tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in facts.items():
        key = f"tokenizer.{key}" if key == "chat_template" else f"tokenizer.ggml.{key}"
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.add_tensor("output_norm.weight", np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def byte_level():
    """Vocabulary and merges learnt from the text, after three tokens of other kinds."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|end|>", "<|start|>", "<think>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT, "words and more words"], trainer)
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return dict(
        model="gpt2",
        tokens=tokens,
        merges=[" ".join(merge) for merge in merges],
        token_type=[3, 3, 4] + [1] * (len(tokens) - 3),
        bos_token_id=1,
        eos_token_id=0,
        padding_token_id=0,
        chat_template=TEMPLATE,
    )


def theirs(path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.mark.torch
@pytest.mark.parametrize("split", ["gpt-2", "llama-bpe", "qwen2", "smollm"])
def test_byte_level(tmp_path, byte_level, split):
    path = write(tmp_path / "x.gguf", pre=split, **byte_level)
    ours, reference = read_tokenizer(path), theirs(path)
    # transformers does not know that SmolLM's digits stand alone.
    text = TEXT.replace("1234", "many") if split == "smollm" else TEXT
    text = f"<|start|>{text} <think>{text}<|end|>"
    ids = ours(text)["input_ids"]
    assert ids == reference(text)["input_ids"]
    assert ours.decode(ids) == text
    assert ours.decode(ids, skip_special_tokens=True) == text[len("<|start|>") : -len("<|end|>")]
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (1, 0, 0)
    message = [{"role": "user", "content": "words"}]
    assert ours.apply_chat_template(message, tokenize=False) == "<|start|>words<|end|>"


def test_digits_stand_alone(tmp_path, byte_level):
    byte_level = dict(byte_level, merges=[*byte_level["merges"], "1 2"])
    byte_level["tokens"] = [*byte_level["tokens"], "12"]
    byte_level["token_type"] = [*byte_level["token_type"], 1]
    alone = read_tokenizer(write(tmp_path / "a.gguf", pre="smollm", **byte_level))
    merged = read_tokenizer(write(tmp_path / "b.gguf", pre="gpt-2", **byte_level))
    assert alone.tokenize("in 123") == [*alone.tokenize("in"), "Ġ", "1", "2", "3"]
    assert "12" in merged.tokenize("123")


@pytest.mark.torch
@pytest.mark.parametrize("begins", [True, False])
def test_sentencepiece(tmp_path, begins):
    """Merges from scores, spaces as ▁, bytes for characters that are not there."""
    words = ["▁", "▁the", "▁fox", "the", "fo", "he", "th", "▁t", "▁f", "ox", "▁▁"]
    letters = sorted(set("abcdefghijklmnopqrstuvwxyzT.,?'"))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, *letters]
    kinds = [2, 3, 3] + [6] * 256 + [1] * (len(words) + len(letters))
    path = write(
        tmp_path / "x.gguf",
        model="llama",
        tokens=tokens,
        scores=[0.0] * 259 + [-float(n) for n in range(len(tokens) - 259)],
        token_type=kinds,
        bos_token_id=1,
        eos_token_id=2,
        unknown_token_id=0,
        add_bos_token=begins,
    )
    ours, reference = read_tokenizer(path), theirs(path)
    text = "The fox the  fox, 日本 doesn't</s> the"
    ids = ours(text)["input_ids"]
    assert ids == reference(text)["input_ids"]
    assert (ids[0] == 1) == begins
    assert tokens.index("▁the") in ids and tokens.index("<0xE6>") in ids
    assert (
        ours.decode(ours("the fox 日本")["input_ids"], skip_special_tokens=True) == "the fox 日本"
    )


def test_bad_files(tmp_path, byte_level):
    (tmp_path / "text.gguf").write_text("no such thing")
    with pytest.raises(ConversionError, match="not a GGUF file"):
        read_tokenizer(tmp_path / "text.gguf")
    with pytest.raises(ConversionError, match="no tokenizer"):
        read_tokenizer(write(tmp_path / "none.gguf", bos_token_id=1))
    with pytest.raises(ConversionError, match=r"GGUF tokenizer 'bert'.*gpt2, llama"):
        read_tokenizer(write(tmp_path / "kind.gguf", **dict(byte_level, model="bert")))
    with pytest.raises(ConversionError, match=r"pre-tokenizer 'smolm'.*did you mean 'smollm'"):
        read_tokenizer(write(tmp_path / "split.gguf", pre="smolm", **byte_level))
