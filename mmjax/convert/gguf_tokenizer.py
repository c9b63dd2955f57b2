"""The tokenizer that a GGUF file carries in its metadata, as a tokenizer of transformers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

from mmjax.convert import gguf
from mmjax.convert.table import ConversionError
from mmjax.registry import Registry

# Types of tokens that are more than text.
_CONTROL, _USER_DEFINED = 3, 4

# tokenizer.ggml.model -> a function of the metadata.
_BUILDERS: Registry[Callable[[Mapping[str, Any]], Tokenizer]] = Registry("GGUF tokenizer")

# tokenizer.ggml.pre -> how text is cut before merging; `llama-vocab.cpp` of llama.cpp has the same
# splits as the tokenizer.json of each model.
_SPLITS: Registry[Sequence[pre_tokenizers.PreTokenizer]] = Registry("GGUF pre-tokenizer")

_GPT2 = (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),)
for _name in ("default", "gpt-2", "gpt2"):
    _SPLITS.register(_name)(_GPT2)
for _name in ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"):
    _SPLITS.register(_name)((pre_tokenizers.Digits(individual_digits=True), *_GPT2))


def _pattern(digits: str) -> Sequence[pre_tokenizers.PreTokenizer]:
    """The split of GPT-4 and of models after it, which differ in how many digits stay together."""
    contractions = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    words, marks = r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?[^\s\p{L}\p{N}]+[\r\n]*"
    spaces = r"\s*[\r\n]+|\s+(?!\S)|\s+"
    return (
        pre_tokenizers.Split(
            Regex("|".join((contractions, words, digits, marks, spaces))), behavior="isolated"
        ),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    )


for _name in ("llama3", "llama-v3", "llama-bpe"):
    _SPLITS.register(_name)(_pattern(r"\p{N}{1,3}"))
for _name in ("qwen2", "deepseek-r1-qwen"):
    _SPLITS.register(_name)(_pattern(r"\p{N}"))


def read_tokenizer(path: str | os.PathLike) -> PreTrainedTokenizerFast:
    """The tokenizer in a GGUF file, with its chat template where there is one.

    Raises:
      ConversionError: if the file is no GGUF file, has no tokenizer, or one of another kind.
      ImportError: if the `gguf` package is not installed.
    """
    fields, _ = gguf.open_reader(Path(path))
    prefix = "tokenizer.ggml."
    facts = {
        key.removeprefix(prefix): field.contents()
        for key, field in fields.items()
        if key.startswith(prefix)
    }
    if "tokens" not in facts or "model" not in facts:
        raise ConversionError(f"{path} has no tokenizer in its metadata.")
    try:
        backend = _BUILDERS[facts["model"]](facts)
    except ValueError as error:
        raise ConversionError(f"{path}: {error}") from error
    for token, kind in zip(facts["tokens"], facts.get("token_type", ()), strict=False):
        if kind in (_CONTROL, _USER_DEFINED):
            add = backend.add_special_tokens if kind == _CONTROL else backend.add_tokens
            add([AddedToken(token, normalized=False, special=kind == _CONTROL)])
    special = {
        f"{role}_token": facts["tokens"][facts[f"{name}_token_id"]]
        for role, name in (
            ("bos", "bos"),
            ("eos", "eos"),
            ("unk", "unknown"),
            ("pad", "padding"),
        )
        if f"{name}_token_id" in facts
    }
    # Older files do not say; llama.cpp then begins texts of SentencePiece models with BOS.
    if facts.get("add_bos_token", facts["model"] == "llama") and "bos_token" in special:
        bos = special["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0",
            pair=f"{bos}:0 $A:0 {bos}:1 $B:1",
            special_tokens=[(bos, facts["bos_token_id"])],
        )
    template = "tokenizer.chat_template"
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=fields[template].contents() if template in fields else None,
        clean_up_tokenization_spaces=False,
        **special,
    )


@_BUILDERS.register("gpt2")
def _byte_level(facts: Mapping[str, Any]) -> Tokenizer:
    """Byte-level BPE: GPT-2, Llama 3, Qwen, SmolLM."""
    vocabulary = {token: index for index, token in enumerate(facts["tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in facts["merges"]]
    result = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    result.pre_tokenizer = pre_tokenizers.Sequence(list(_SPLITS[facts.get("pre", "default")]))
    result.decoder = decoders.ByteLevel()
    return result


@_BUILDERS.register("llama")
def _sentencepiece(facts: Mapping[str, Any]) -> Tokenizer:
    """BPE of SentencePiece: Llama 1 and 2, TinyLlama. The scores of the tokens order the merges."""
    tokens = facts["tokens"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if "merges" in facts:
        merges = [tuple(merge.split(" ", 1)) for merge in facts["merges"]]
    else:
        merges = _merges(tokens, facts["scores"])
    result = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges,
            unk_token=tokens[facts.get("unknown_token_id", 0)],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    space = "\u2581"
    begins = facts.get("add_space_prefix", True)
    result.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=space, prepend_scheme="first" if begins else "never", split=False
    )
    result.decoder = decoders.Sequence(
        [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(" ", 1, 0)] * begins
    )
    return result


def _merges(tokens: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every way to make a token from two others; the best tokens are made first."""
    place = {token: index for index, token in enumerate(tokens)}
    ways = []
    for token, score in zip(tokens, scores, strict=True):
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        pairs = [pair for pair in pairs if pair[0] in place and pair[1] in place]
        pairs.sort(key=lambda pair: (place[pair[0]], place[pair[1]]))
        ways += [(score, pair) for pair in pairs]
    # As transformers has it: among equals, the longer the first part, the earlier.
    ways.sort(key=lambda way: (-way[0], -len(way[1][0])))
    return [pair for _, pair in ways]
