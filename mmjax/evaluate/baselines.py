"""A retrieval baseline that has learnt nothing: raw pixels, and names compared letter by letter."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

BUCKETS = 4096


class PictureOfName:
    """Each text gets the pictures of the training names nearest to it, compared by pixels.

    For a concept seen in training that is its own picture, so that image -> text is plain
    nearest-neighbour recognition in pixel space. For a held-out one it is the picture of the seen
    concept that shares the most words and letters with it ("nine-thirty" -> "nine o'clock").

    The score of an image and a text is minus the mean squared difference of the pixels, of the
    nearest picture where a text has several.

    Args:
      pictures: training pictures [R, H, W, C].
      names: their R names.
      images: images to score [N, H, W, C].
      texts: texts to score.
    """

    def __init__(
        self,
        *,
        pictures: np.ndarray,
        names: Sequence[str],
        images: np.ndarray,
        texts: Sequence[str],
    ):
        self._pictures = _flat(pictures)
        self._images = _flat(images)
        alike = name_vectors(texts) @ name_vectors(names).T
        owners, chosen = np.nonzero(alike >= alike.max(axis=1, keepdims=True) - 1e-6)
        # The pictures of text t are chosen[starts[t] : starts[t + 1]].
        self._chosen = chosen
        self._starts = np.searchsorted(owners, np.arange(len(texts) + 1))

    def image_to_text(self, part: slice) -> np.ndarray:
        """Scores [images of the slice, texts]."""
        scores = _closeness(self._images[part], self._pictures)
        return np.maximum.reduceat(scores[:, self._chosen], self._starts[:-1], axis=1)

    def text_to_image(self, part: slice) -> np.ndarray:
        """Scores [texts of the slice, images]."""
        starts = self._starts[part.start : part.stop]
        chosen = self._chosen[starts[0] : self._starts[part.stop]]
        scores = _closeness(self._pictures[chosen], self._images)
        return np.maximum.reduceat(scores, starts - starts[0], axis=0)


def _flat(images: np.ndarray) -> np.ndarray:
    return np.asarray(images, np.float32).reshape(len(images), -1)


def _closeness(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Minus the mean squared difference of each row of `a` and each of `b`."""
    squares = np.sum(a**2, axis=1)[:, None] + np.sum(b**2, axis=1)[None] - 2 * (a @ b.T)
    return -squares / a.shape[1]


def name_vectors(texts: Sequence[str]) -> np.ndarray:
    """Unit vectors [N, BUCKETS] of each text's words and letter trigrams, hashed.

    Words count as much as the trigrams together, so that a shared word outweighs shared syllables.
    """
    vectors = np.zeros((len(texts), BUCKETS), np.float32)
    for vector, text in zip(vectors, texts, strict=True):
        words = text.lower().split()
        padded = f" {' '.join(words)} "
        trigrams = [padded[i : i + 3] for i in range(len(padded) - 2)]
        for kind, items in (("word", words), ("trigram", trigrams)):
            for item in items:
                vector[zlib.crc32(f"{kind} {item}".encode()) % BUCKETS] += 1 / len(items)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
