"""Vectors of images, by which examples are found whose images are like a question's."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from mmjax.evaluate.context import EvalContext
from mmjax.evaluate.metrics import slices
from mmjax.evaluate.support import Seen
from mmjax.models.mllama import Mllama
from mmjax.models.seeing import Seeing
from mmjax.params import Params, merge
from mmjax.search import open_embedder
from mmjax.sharding import batch_sharding, place_like_sharding

# (parameters of the model that is evaluated, N images) -> [N, D] float32 of unit norm.
Embed = Callable[[Params, Sequence[Seen]], np.ndarray]


class ModelFeatures:
    """The mean of what the connector of the evaluated model reads of an image.

    Args:
      context: of the model.
      batch_size: pictures at a time; a multiple of the mesh's shards.
    """

    def __init__(self, context: EvalContext, batch_size: int):
        self._context = context
        self._batch_size = batch_size
        self._features = context.compile(
            lambda model, batch: model.features(batch["images"]).mean(axis=1)
        )

    def __call__(self, params: Params, seen: Sequence[Seen]) -> np.ndarray:
        """
        Raises:
          ValueError: if the model has no features of single pictures.
        """
        model = merge(self._context.graphdef, params)
        if not isinstance(model, Seeing) or isinstance(model, Mllama):
            raise ValueError(
                f"shots_by='rices' compares features of images, and a {type(model).__name__} has "
                "none of single pictures: give the directory of a CLIP in `shots_weights`."
            )
        where = batch_sharding(self._context.mesh)
        different = {one.name: one.images for one in seen}
        # An image may be several pictures, and pictures of several images make a batch.
        pictures = (
            (name, picture) for name, images in different.items() for picture in np.asarray(images)
        )
        found: dict[str, list[np.ndarray]] = collections.defaultdict(list)
        while part := list(itertools.islice(pictures, self._batch_size)):
            batch = np.zeros((self._batch_size, *part[0][1].shape), np.float32)
            batch[: len(part)] = [picture for _, picture in part]
            rows = self._features(params, {"images": place_like_sharding(batch, where)})
            for (name, _), row in zip(part, np.asarray(rows, np.float32), strict=False):
                found[name].append(row)
        vectors = np.stack([np.mean(found[one.name], axis=0) for one in seen])
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class EmbedderFeatures:
    """Embeddings of images by a model of images and texts; OpenFlamingo takes a CLIP ViT-B/32.

    Args:
      weights: a directory of Hugging Face format with a CLIP, SigLIP or AltCLIP, or the work
        directory of a run.
      batch_size: images at a time.

    Raises:
      ValueError: if there is no such model there.
    """

    def __init__(self, weights: str | Path, batch_size: int):
        self._embedder = open_embedder(weights, batch_size=batch_size)
        # Images stay the same from one evaluation to the next.
        self._known: dict[str, np.ndarray] = {}

    def __call__(self, params: Params, seen: Sequence[Seen]) -> np.ndarray:
        del params
        new = list({one.name: one for one in seen if one.name not in self._known}.values())
        for part in slices(len(new), self._embedder.batch_size):
            prepared = [self._embedder.prepare(one.source()) for one in new[part]]
            vectors = self._embedder.prepared_images(prepared)
            self._known |= {one.name: row for one, row in zip(new[part], vectors, strict=True)}
        return np.stack([self._known[one.name] for one in seen])
