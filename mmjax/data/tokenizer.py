"""Text to ids: tokenizers trained on texts, or those of a HF directory.

Ids are int32 [B, T], padded on the right to T = max_len; the mask is True where a token may be
attended to. Trained tokenizers write `<bos> caption <eos> <pad>...`, lower-cased; truncation cuts
the caption and keeps `<eos>`. HF tokenizers follow their own conventions.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from mmjax.data.records import DataNotFoundError
from mmjax.data.sources import existing
from mmjax.paths import located
from mmjax.registry import Registry

PAD, UNKNOWN, BOS, EOS = "<pad>", "<unk>", "<bos>", "<eos>"
_SPECIAL = [PAD, UNKNOWN, BOS, EOS]  # ids 0, 1, 2, 3


class Encoded(NamedTuple):
    """ids [B, T] int32, mask [B, T] bool, truncated: how many captions lost their end."""

    ids: np.ndarray
    mask: np.ndarray
    truncated: int


class TrainedTokenizer:
    """A `tokenizers.Tokenizer` with this module's special tokens."""

    def __init__(self, backend: tokenizers.Tokenizer):
        self._backend = backend
        self.vocab_size: int = backend.get_vocab_size()
        self.pad_id, self.unknown_id, self.bos_id, self.eos_id = (
            backend.token_to_id(token) for token in _SPECIAL
        )

    @property
    def backend(self) -> tokenizers.Tokenizer:
        return self._backend

    def encode(self, texts: Sequence[str], max_len: int) -> Encoded:
        ids = np.full((len(texts), max_len), self.pad_id, np.int32)
        mask = np.zeros((len(texts), max_len), bool)
        truncated = 0
        for row, encoding in enumerate(self._backend.encode_batch(list(texts))):
            tokens = encoding.ids
            if len(tokens) > max_len:
                truncated += 1
                tokens = [*tokens[: max_len - 1], self.eos_id]
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = True
        return Encoded(ids, mask, truncated)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of one row, without special tokens."""
        return self._backend.decode([int(i) for i in ids]).strip()

    def save(self, directory: Path) -> None:
        self._backend.save(str(directory / "tokenizer.json"))

    @classmethod
    def load(cls, directory: Path) -> TrainedTokenizer:
        return cls(tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json")))


# Any of these makes a directory one with a tokenizer.
HF_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
)


def open_hf_tokenizer(directory: str | os.PathLike) -> Any:
    """The tokenizer of transformers in a directory; one that cannot pad does so with its end token.

    Raises:
      ValueError: no tokenizer there, or files that cannot be read.
    """
    from transformers import AutoTokenizer

    path = existing(directory, "The tokenizer directory")
    if not any((path / name).exists() for name in HF_TOKENIZER_FILES):
        raise DataNotFoundError(
            f"{path} holds no tokenizer: none of {', '.join(HF_TOKENIZER_FILES)}."
        )
    try:
        backend = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise ValueError(
            f"The tokenizer in {path} cannot be read: {type(error).__name__}: {error}"
        ) from error
    if backend.pad_token_id is None:
        if backend.eos_token is None:
            raise ValueError(f"The tokenizer in {path} has neither a padding nor an end token.")
        backend.pad_token = backend.eos_token
    return backend


class HFTokenizer:
    """A tokenizer directory of transformers, with the conventions of its model.

    A model that takes no attention mask (SigLIP: its tokenizer_config says so in
    `model_input_names`) was trained attending to the padding: its mask is True everywhere, and
    max_len must be the length it was trained at (64).

    Args:
      directory: what `save_pretrained` wrote.
      attend_padding: overrides what the directory says about the mask.
      lower_case: lower-case the text first, where the tokenizer does not (SigLIP 2 needs it).
      special_tokens: such as "<|endofchunk|>"; those that it lacks are added, with the next ids.
    """

    def __init__(
        self,
        directory: str,
        attend_padding: bool | None = None,
        lower_case: bool = False,
        special_tokens: Sequence[str] = (),
    ):
        self._set(open_hf_tokenizer(directory), attend_padding, lower_case, special_tokens)

    def _set(
        self,
        backend: Any,
        attend_padding: bool | None,
        lower_case: bool,
        special_tokens: Sequence[str],
    ) -> None:
        self._backend = backend
        self._backend.add_tokens(
            [tokenizers.AddedToken(token, special=True) for token in special_tokens]
        )
        says_masked = "attention_mask" in self._backend.model_input_names
        self._masked = says_masked if attend_padding is None else not attend_padding
        self._lower_case = lower_case
        self._backend.padding_side = "right"
        self.vocab_size: int = len(self._backend)
        self.pad_id: int | None = self._backend.pad_token_id
        self.unknown_id: int | None = self._backend.unk_token_id
        self.bos_id: int | None = self._backend.bos_token_id
        self.eos_id: int | None = self._backend.eos_token_id

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """What does the work.

        Raises:
          ValueError: it is not of the `tokenizers` library.
        """
        if not self._backend.is_fast:
            raise ValueError(
                f"Conversations need a tokenizer of the tokenizers library, with a tokenizer.json; "
                f"this is a {type(self._backend).__name__}."
            )
        return self._backend.backend_tokenizer

    def encode(self, texts: Sequence[str], max_len: int) -> Encoded:
        texts = [text.lower() for text in texts] if self._lower_case else list(texts)
        encoded = self._backend(
            texts,
            padding="max_length",
            truncation=True,
            max_length=max_len,
            return_attention_mask=True,
            verbose=False,
        )
        ids = np.asarray(encoded["input_ids"], np.int32)
        mask = np.asarray(encoded["attention_mask"], bool)
        # Only full rows can have been cut: encode those again without a limit.
        full = [text for text, row in zip(texts, mask, strict=True) if row.all()]
        lengths = [len(row) for row in self._backend(full)["input_ids"]] if full else []
        truncated = sum(length > max_len for length in lengths)
        return Encoded(ids, mask if self._masked else np.ones_like(mask), truncated)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of one row, without special tokens."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True).strip()


class GGUFTokenizer(HFTokenizer):
    """The tokenizer that a GGUF file brings for its model.

    Args:
      path: the file; see `mmjax.paths.located`.
      special_tokens: see `HFTokenizer`.
    """

    def __init__(self, path: str, special_tokens: Sequence[str] = ()):
        # Data knows nothing of models; this file of one is read where the formats of models are.
        from mmjax.convert.gguf_tokenizer import read_tokenizer

        backend = read_tokenizer(existing(located(path), "The GGUF file"))
        if backend.pad_token_id is None:
            backend.pad_token = backend.eos_token
        self._set(backend, None, False, special_tokens)


Tokenizer = TrainedTokenizer | HFTokenizer

# Those that are read, not trained.
READERS: dict[str, type[HFTokenizer]] = {"hf": HFTokenizer, "gguf": GGUFTokenizer}

# name -> (normalised texts, vocabulary size, special tokens, which have the first ids) -> a
# tokenizer without normaliser.
TRAINERS: Registry[Callable[[list[str], int, list[str]], tokenizers.Tokenizer]] = Registry(
    "tokenizer"
)


@TRAINERS.register("bpe")
def _bpe(texts: list[str], vocab_size: int, special: list[str]) -> tokenizers.Tokenizer:
    """Byte-level BPE as GPT-2's: no text is unknown."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


@TRAINERS.register("wordpiece")
def _wordpiece(texts: list[str], vocab_size: int, special: list[str]) -> tokenizers.Tokenizer:
    """WordPiece as BERT's: words split at spaces and punctuation."""
    # Left to itself the trainer numbers the letters inside words in the order of a randomly seeded
    # hash table, and breaks ties by those numbers: two runs get two vocabularies. Given as special
    # tokens they have a fixed order; the vocabulary then goes into a model where they are not.
    letters = sorted({f"##{letter}" for text in texts for letter in text if not letter.isspace()})
    scratch = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token=UNKNOWN))
    scratch.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=[*special, *letters], show_progress=False
    )
    scratch.train_from_iterator(texts, trainer)
    model = tokenizers.models.WordPiece(scratch.get_vocab(), unk_token=UNKNOWN)
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = scratch.pre_tokenizer
    backend.decoder = tokenizers.decoders.WordPiece()
    return backend


@TRAINERS.register("wordlevel")
def _wordlevel(texts: list[str], vocab_size: int, special: list[str]) -> tokenizers.Tokenizer:
    """One id per word; words outside the vocabulary are unknown."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token=UNKNOWN))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    trainer = tokenizers.trainers.WordLevelTrainer(
        vocab_size=vocab_size, special_tokens=special, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def train_tokenizer(
    name: str, texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = ()
) -> TrainedTokenizer:
    """A tokenizer of at most `vocab_size` ids (special ones included); the same texts always give
    the same one.

    Args:
      special_tokens: such as "<image>"; their ids are 4, 5, ..., after those of this module.

    Raises:
      ValueError: unknown name, or a vocabulary that cannot hold the letters.
    """
    if name == "bpe" and vocab_size < 256 + len(_SPECIAL):
        raise ValueError(f"A byte-level bpe needs vocab_size >= 260, not {vocab_size}.")
    normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.NFKC(), tokenizers.normalizers.Lowercase()]
    )
    special = [*_SPECIAL, *special_tokens]
    normalised = [normalizer.normalize_str(text) for text in texts]
    backend = TRAINERS[name](normalised, vocab_size, special)
    if backend.get_vocab_size() > vocab_size:
        raise ValueError(
            f"The {name} tokenizer needs vocab_size >= {backend.get_vocab_size()} for the letters "
            f"of these captions, not {vocab_size}."
        )
    backend.normalizer = normalizer
    backend.add_special_tokens(special)
    ids = [(token, backend.token_to_id(token)) for token in (BOS, EOS)]
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=ids
    )
    return TrainedTokenizer(backend)
