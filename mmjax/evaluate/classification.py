"""Accuracy of a classifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from mmjax.evaluate.base import EVALUATORS, Evaluator
from mmjax.evaluate.context import EvalContext, required
from mmjax.evaluate.metrics import top_k
from mmjax.losses import softmax_cross_entropy
from mmjax.params import Params


@EVALUATORS.register("classification")
class Classification(Evaluator):
    """Top-1 and top-5 accuracy, and cross entropy in nats, over every example.

    Args:
      data: a data config with `label`.
      context: of a model whose output has `logits`.
    """

    def __init__(self, *, data: Mapping[str, Any], context: EvalContext):
        self._data, self._context = data, context
        self._logits = context.compile(
            lambda model, batch: required(model(batch["image"]).logits, "classification head")
        )

    def run(self, params: Params) -> dict[str, float]:
        """`top1`, `top5` (where there are more than 5 classes), `cross_entropy`, `examples`.

        Raises:
          ValueError: if the data has no labels.
        """
        found = self._context.collect(self._logits, params, self._data)
        labels = require_labels(found.labels, "classification")
        total, count = softmax_cross_entropy(jnp.asarray(found.outputs), jnp.asarray(labels))
        return top_k(found.outputs, labels) | {
            "cross_entropy": float(total / count),
            "examples": float(len(labels)),
        }


def require_labels(labels: np.ndarray | None, evaluator: str) -> np.ndarray:
    """The labels of a data set.

    Raises:
      ValueError: if it has none.
    """
    if labels is None:
        raise ValueError(
            f"The evaluator {evaluator!r} needs labels: set `label = dict(field=...)` in its data."
        )
    return labels
