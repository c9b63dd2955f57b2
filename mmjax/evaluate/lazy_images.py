"""Images of few-shot prompts: put together when a batch is asked, and held by nobody else."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np


class LazyImages:
    """Images [I, H, W, 3] float32 that `np.asarray` makes, anew each time.

    Args:
      shape: of the array.
      name: the same for equal images.
      make: makes the array.
    """

    def __init__(self, shape: tuple[int, ...], name: str, make: Callable[[], np.ndarray]):
        self.shape = tuple(shape)
        self.name = name
        self._make = make

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self._make(), dtype)


Images = np.ndarray | LazyImages


def name_of(images: Images) -> str:
    """The same for equal images."""
    if isinstance(images, LazyImages):
        return images.name
    digest = hashlib.blake2b(np.ascontiguousarray(images), digest_size=16)
    return f"{images.shape} {digest.hexdigest()}"


def join(several: Sequence[Images]) -> Images:
    """Images one after the other; parts without any may have another shape."""
    parts = [images for images in several if len(images)]
    if len(parts) < 2:
        return parts[0] if parts else several[-1]
    names = " ".join(map(name_of, parts))
    return LazyImages(
        (sum(map(len, parts)), *parts[0].shape[1:]),
        hashlib.blake2b(names.encode(), digest_size=16).hexdigest(),
        lambda: np.concatenate([np.asarray(images) for images in parts]),
    )
