"""Prompts of any form and length become one left-padded array of one of few lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mmjax.typing import Array

# [B, T] integers, or a list of B lists of ids.
Tokens = Array | np.ndarray | Sequence[Any]

# Lengths below are not worth programs of their own.
SHORTEST = 16


class Prompts(NamedTuple):
    """Prompts as `prefill` takes them.

    Attributes:
      tokens: [B, T] int32, padded on the left.
      valid: [B, T] bool, False at padding.
      sight: what else models that see are given, by name: see `mmjax.generation.sight`. Empty where
        all is text.
    """

    tokens: Any
    valid: Any
    sight: dict[str, Any]


def bucket(length: int, shortest: int = SHORTEST) -> int:
    """The next of 16, 24, 32, 48, 64, 96, 128, ...: at most half as much again.

    Programs are compiled for these lengths only.

    Args:
      shortest: a power of two, where the row begins; from 1 it is 1, 2, 3, 4, 6, 8, 12, ...
    """
    size = shortest
    while size < length:
        if size * 3 // 2 >= length:
            return size * 3 // 2
        size *= 2
    return size


def read_rows(tokens: Tokens, mask: Array | np.ndarray | None, what: str) -> list[np.ndarray]:
    """What counts of each row.

    Args:
      tokens: [B, T] integers, or a list of B lists of any lengths.
      mask: [B, T], True at tokens and False at padding, wherever that is; not with lists.
      what: the argument's name, for errors.

    Raises:
      ValueError: if shapes do not fit.
    """
    if isinstance(tokens, list | tuple):
        if mask is not None:
            raise ValueError(f"A mask belongs to an array of {what}; lists have their own lengths.")
        if any(np.ndim(row) != 1 for row in tokens):
            raise ValueError(
                f"{what} is a list, but not of lists of ids: for one prompt write [{what}]."
            )
        rows = [np.asarray(row) for row in tokens]
    else:
        tokens = np.asarray(tokens)
        if tokens.ndim != 2:
            raise ValueError(f"{what} has shape {tokens.shape}; it must be [batch, length].")
        mask = np.ones(tokens.shape, bool) if mask is None else np.asarray(mask)
        if mask.shape != tokens.shape:
            raise ValueError(
                f"mask has shape {mask.shape}, {what} {tokens.shape}: they must agree."
            )
        rows = [row[valid.astype(bool)] for row, valid in zip(tokens, mask, strict=True)]
    for row in rows:
        if row.size and not np.issubdtype(row.dtype, np.integer):
            raise ValueError(f"{what} must be integers, not {row.dtype}.")
    return rows


def check_rows(
    rows: Sequence[np.ndarray],
    vocab_size: int,
    limit: int | None,
    texts: Sequence[np.ndarray] | None = None,
) -> None:
    """Raises ValueError if there are no prompts, or one is not for this model.

    Args:
      rows: of token ids.
      vocab_size: ids must be below it.
      limit: the longest prompt that the model takes, if there is such.
      texts: of each row, True where a token is text, whose id counts; None: they all are.
    """
    if not rows:
        raise ValueError("There is no prompt: tokens has no rows.")
    for index, row in enumerate(rows):
        if not row.size:
            raise ValueError(
                f"Prompt {index} is empty: a model needs at least one token to start from "
                "(its begin-of-text token, for example)."
            )
        ids = row if texts is None else row[texts[index]]
        if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
            raise ValueError(
                f"Prompt {index} has ids from {ids.min()} to {ids.max()}, but the model's "
                f"vocabulary has {vocab_size} tokens: do tokenizer and weights belong together?"
            )
    longest = max(row.size for row in rows)
    if limit is not None and longest > limit:
        raise ValueError(
            f"A prompt of {longest} tokens is longer than the model's limit of {limit}: truncate "
            "it when tokenising."
        )


def left_pad(rows: Sequence[np.ndarray], limit: int | None) -> Prompts:
    """Prompts at the right end of rows whose length is a `bucket`, or `limit`."""
    longest = bucket(max(row.size for row in rows))
    length = longest if limit is None else min(longest, limit)
    valid = np.arange(length) >= length - np.array([[row.size] for row in rows])
    return Prompts(align(rows, valid, 0), valid, {})


def align(rows: Sequence[np.ndarray], valid: np.ndarray, padding: int) -> np.ndarray:
    """Values of each row where `valid` [B, T] is, `padding` elsewhere; int32."""
    padded = np.full(valid.shape, padding, np.int32)
    padded[valid] = np.concatenate(rows)
    return padded
