"""The loss of the task on held-out data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.evaluate.base import EVALUATORS, Evaluator
from mmjax.evaluate.context import EvalContext
from mmjax.params import Params


@EVALUATORS.register("loss")
class Loss(Evaluator):
    """The task's loss and metrics, without dropout, over all whole batches.

    The examples left over after the last whole batch are not counted: a contrastive loss depends on
    the size of the batch, so that a smaller one would not be comparable.

    Args:
      data: a data config.
      context: whose `task` has `loss(model, batch, rng) -> (numerator, denominator), metrics`.
    """

    def __init__(self, *, data: Mapping[str, Any], context: EvalContext):
        self._data, self._context = data, context

        def terms(model, batch):
            loss, metrics = context.task.loss(model, batch, None)
            return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), {"loss": loss, **metrics})

        self._terms = context.compile(terms)

    def run(self, params: Params) -> dict[str, float]:
        """`loss` and the task's metrics.

        Raises:
          ValueError: if the data is smaller than one batch.
        """
        parts = []
        for batch in self._context.batches(self._data):
            if self._context.gather(batch.valid).all():
                arrays = {name: x for name, x in batch.arrays.items() if name != "valid"}
                parts.append(jax.device_get(self._terms(params, arrays)))
        if not parts:
            raise ValueError(
                "The evaluator 'loss' needs at least one whole batch of "
                f"{self._context.batch_size} examples: lower config.train.batch_size, or give it "
                "more data."
            )
        totals = jax.tree.map(lambda *x: float(np.sum(x, dtype=np.float64)), *parts)
        return {name: top / bottom for name, (top, bottom) in totals.items()}
