"""Prompts of any form and length become one left-padded array of one of few lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmjax.typing import Array

# [B, T] integers, or a list of B lists of ids.
Tokens = Array | np.ndarray | Sequence[Any]

# Lengths below are not worth programs of their own.
SHORTEST = 16


def bucket(length: int) -> int:
    """The next of 16, 24, 32, 48, 64, 96, 128, ...: at most half as much again.

    Programs are compiled for these lengths only.
    """
    size = SHORTEST
    while size < length:
        if size * 3 // 2 >= length:
            return size * 3 // 2
        size *= 2
    return size


def left_pad(
    tokens: Tokens,
    mask: Array | np.ndarray | None,
    vocab_size: int,
    limit: int | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts at the right end of rows whose length is a `bucket`.

    Args:
      tokens: [B, T] integers, or a list of B lists of any lengths.
      mask: [B, T], True at tokens and False at padding, wherever that is; not with lists.
      vocab_size: ids must be below it.
      limit: the longest prompt that the model takes, if there is such.

    Returns:
      Tokens [B, bucket] int32 and mask [B, bucket] bool.

    Raises:
      ValueError: if shapes do not fit, a prompt is empty or too long, or an id is outside of the
        vocabulary.
    """
    rows = _rows(tokens, mask)
    if not rows:
        raise ValueError("There is no prompt: tokens has no rows.")
    for index, row in enumerate(rows):
        if not row.size:
            raise ValueError(
                f"Prompt {index} is empty: a model needs at least one token to start from "
                "(its begin-of-text token, for example)."
            )
        if row.min() < 0 or row.max() >= vocab_size:
            raise ValueError(
                f"Prompt {index} has ids from {row.min()} to {row.max()}, but the model's "
                f"vocabulary has {vocab_size} tokens: do tokenizer and weights belong together?"
            )
    longest = max(row.size for row in rows)
    if limit is not None and longest > limit:
        raise ValueError(
            f"A prompt of {longest} tokens is longer than the model's limit of {limit}: truncate "
            "it when tokenising."
        )
    length = bucket(longest) if limit is None else min(bucket(longest), limit)
    padded = np.zeros((len(rows), length), np.int32)
    valid = np.zeros((len(rows), length), bool)
    for index, row in enumerate(rows):
        padded[index, length - row.size :] = row
        valid[index, length - row.size :] = True
    return padded, valid


def _rows(tokens: Tokens, mask: Array | np.ndarray | None) -> list[np.ndarray]:
    """The valid tokens of each prompt."""
    if isinstance(tokens, list | tuple):
        if mask is not None:
            raise ValueError("A mask belongs to an array of tokens; lists have their own lengths.")
        if any(np.ndim(row) != 1 for row in tokens):
            raise ValueError(
                "tokens is a list, but not of lists of ids: for one prompt write [tokens]."
            )
        rows = [np.asarray(row) for row in tokens]
    else:
        tokens = np.asarray(tokens)
        if tokens.ndim != 2:
            raise ValueError(f"tokens has shape {tokens.shape}; it must be [batch, length].")
        mask = np.ones(tokens.shape, bool) if mask is None else np.asarray(mask)
        if mask.shape != tokens.shape:
            raise ValueError(
                f"mask has shape {mask.shape}, tokens {tokens.shape}: they must agree."
            )
        rows = [row[valid.astype(bool)] for row, valid in zip(tokens, mask, strict=True)]
    if any(row.size and not np.issubdtype(row.dtype, np.integer) for row in rows):
        raise ValueError(f"Token ids must be integers, not {rows[0].dtype}.")
    return rows
