"""Negative prompts beside the prompts, in one batch; see `Sampler.guided`."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from mmjax.generation.prompts import Prompts
from mmjax.models.vlm import TEXT


def pair(prompts: Prompts, negative: Prompts) -> Prompts:
    """After each prompt its negative one, of which there may be one for all: [2 B, ...].

    They are neighbours, so that a device of a mesh has both.

    Raises:
      ValueError: if there are as many negative prompts as fit neither, or questions to be read.
    """
    both = (prompts, negative)
    rows, given = (len(part.tokens) for part in both)
    if given not in (1, rows):
        raise ValueError(
            f"negative has {given} rows, tokens {rows}: give one for each, or one for all."
        )
    if "text" in prompts.sight:
        raise ValueError("A connector that reads the question knows no guidance: leave it out.")
    length = max(part.tokens.shape[1] for part in both)
    tokens = _in_turn(_on_left(part.tokens, length, 0) for part in both)
    valid = _in_turn(_on_left(part.valid, length, False) for part in both)
    images = [part.sight["images"] for part in both if part.sight]
    if not images:
        return Prompts(tokens, valid, {})
    count, shape = max(array.shape[1] for array in images), images[0].shape[2:]
    images, places = [], []
    for part in both:
        blind = np.zeros((len(part.tokens), 0, *shape), np.float32)
        images.append(_to_count(part.sight.get("images", blind), count))
        place = part.sight.get("place", np.full(part.tokens.shape, TEXT, np.int32))
        places.append(_on_left(place, length, TEXT))
    return Prompts(tokens, valid, {"images": _in_turn(images), "place": _in_turn(places)})


def _in_turn(arrays: Iterable[np.ndarray]) -> np.ndarray:
    """[B, ...] and [B, ...] or [1, ...] -> [2 B, ...], a row of each after the other."""
    own, other = arrays
    both = np.stack([own, np.broadcast_to(other, own.shape)], axis=1)
    return both.reshape(-1, *own.shape[1:])


def _on_left(x: np.ndarray, length: int, padding: int) -> np.ndarray:
    """[B, T] -> [B, length]"""
    return np.pad(x, ((0, 0), (length - x.shape[1], 0)), constant_values=padding)


def _to_count(images: np.ndarray, count: int) -> np.ndarray:
    """[B, I, H, W, C] -> [B, count, H, W, C], zeros after the images."""
    spare = [(0, 0)] * images.ndim
    spare[1] = (0, count - images.shape[1])
    return np.pad(images, spare)
