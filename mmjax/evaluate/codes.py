"""What evaluators of models that draw share: ids of images, and prompts that images follow."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from mmjax.data.questions import Question
from mmjax.evaluate.context import EvalContext
from mmjax.evaluate.metrics import slices
from mmjax.models.unified import CodesConfig, Unified
from mmjax.params import Params, merge
from mmjax.sharding import batch_sharding, place_like_sharding


class ImageIds:
    """The ids of images, as a model's tokenizer has them; compiled once.

    Args:
      batch_size: images at a time; a multiple of the mesh's shards.
    """

    def __init__(self, context: EvalContext, batch_size: int):
        self._where, self._batch_size = batch_sharding(context.mesh), batch_size
        self._run = context.compile(lambda model, batch: model.image_ids(batch["images"])[:, 0])

    def __call__(self, params: Params, images: Sequence[np.ndarray]) -> np.ndarray:
        """[N, L] int32, of N images [1, H, W, C], normalised."""
        found = []
        for part in slices(len(images), self._batch_size):
            some = np.stack(images[part])
            spare = [(0, self._batch_size - len(some)), *[(0, 0)] * (some.ndim - 1)]
            batch = {"images": place_like_sharding(np.pad(some, spare), self._where)}
            found.append(jax.device_get(self._run(params, batch))[: len(some)])
        return np.concatenate(found)


def drawing_model(context: EvalContext, params: Params) -> Unified:
    """The model with these parameters; where it is to draw, codes alone follow.

    Raises:
      ValueError: if it does not draw.
    """
    model = merge(context.graphdef, params)
    if not isinstance(model, Unified):
        raise ValueError(
            f"A {type(model).__name__} draws no images: this evaluation is for models of the name "
            "'unified'. Leave it out of config.evals."
        )
    return model.following("grammar")


def drawing_prompt(question: Question, image: CodesConfig) -> np.ndarray:
    """Ids up to where the codes begin."""
    return np.append(question.ids, np.int32(image.begin))


def lone_prompt(question: Question, image: CodesConfig) -> np.ndarray:
    """The same without a word: what an image alone begins with."""
    return np.append(question.ids[: question.begin], np.int32(image.begin))
