"""One training step: gradients (accumulated exactly), update, metrics; and what is learnt from
statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from mmjax.params import Params, merge
from mmjax.train.state import TrainState
from mmjax.train.tasks import FeatureTask, StatefulTask, Task

# Folded into a step's key for what is learnt from statistics: no split of the key comes so far.
_STATISTICS = 2**31


def make_step(
    task: Task,
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
    *,
    accumulate: int,
    ema: float | None,
) -> Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]:
    """A pure function (state, batch) -> (state, metrics), to be jitted with the state donated.

    Args:
      task: the loss.
      graphdef: the model's structure.
      tx: the optimizer of the trainable parameters.
      accumulate: the batch is worked on in so many parts, with the result of the whole.
      ema: decay of the moving average, or None.
    """

    def step(state: TrainState, batch: dict[str, jax.Array]):
        rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)

        def model_of(trainable: Params) -> nnx.Module:
            return merge(graphdef, {**trainable, **state.frozen})

        loss, metrics, grads, statistics = _gradients(
            task, model_of, state.trainable, batch, rng, accumulate
        )
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        averages = state.ema
        if ema is not None:
            averages = optax.incremental_update(trainable, state.ema, 1.0 - ema)
        frozen = state.frozen
        if isinstance(task, StatefulTask):
            model, key = model_of(state.trainable), jax.random.fold_in(rng, _STATISTICS)
            learnt, of_batch = task.update(model, statistics, key)
            frozen, metrics = {**frozen, **learnt}, {**metrics, **of_batch}
        # Norms of what lies in memory anyhow. That of the update, or of what it makes, would be
        # compiled into one loop with it: on CPUs an AdamW update was three times as slow for it.
        metrics = {
            "loss": loss,
            "grad_norm": optax.global_norm(grads),
            "param_norm": optax.global_norm(state.trainable),
            **metrics,
        }
        new = TrainState(state.step + 1, state.rng, trainable, frozen, opt_state, averages)
        return new, {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}

    return step


def _gradients(
    task: Task,
    model_of: Callable[[Params], nnx.Module],
    params: Params,
    batch: Any,
    rng: jax.Array,
    accumulate: int,
) -> tuple[jax.Array, dict[str, jax.Array], Params, Any]:
    """Loss, metrics, gradients and statistics of a batch; `accumulate` changes memory, not the
    result."""
    if accumulate == 1:
        return _whole(lambda p: _loss(task, model_of(p), batch, rng), params)
    parts = jax.tree.map(lambda x: _split(x, accumulate), batch)
    rngs = jax.random.split(rng, accumulate)
    if isinstance(task, FeatureTask):
        return _cached(task, model_of, params, parts, rngs)
    return _summed(task, model_of, params, parts, rngs)


def _loss(task: Task, model: nnx.Module, batch: Any, rng: jax.Array) -> tuple[Any, Any]:
    """The result of a task, and statistics if it has some."""
    if isinstance(task, StatefulTask):
        return task.loss_and_statistics(model, batch, rng)
    return task.loss(model, batch, rng), ()


def _whole(loss: Callable[[Params], Any], params: Any) -> tuple[jax.Array, dict, Any, Any]:
    def ratio(params):
        ((numerator, denominator), metrics), statistics = loss(params)
        metrics = {name: n / d for name, (n, d) in metrics.items()}
        return numerator / denominator, (metrics, statistics)

    (value, (metrics, statistics)), grads = jax.value_and_grad(ratio, has_aux=True)(params)
    return value, metrics, grads, statistics


def _summed(task, model_of, params, parts, rngs):
    """Sum of numerators over sum of denominators: parts with more tokens weigh more."""

    def numerator(params, part, rng):
        ((top, bottom), metrics), statistics = _loss(task, model_of(params), part, rng)
        return top, (bottom, metrics, statistics)

    def terms(part, rng):
        (top, (bottom, metrics, statistics)), grads = jax.value_and_grad(numerator, has_aux=True)(
            params, part, rng
        )
        return jax.tree.map(jnp.asarray, (top, bottom, metrics, grads)), statistics

    def add(total, inputs):
        found, statistics = terms(*inputs)
        return jax.tree.map(jnp.add, total, found), statistics

    shapes, _ = jax.eval_shape(
        lambda inputs: terms(*jax.tree.map(lambda x: x[0], inputs)), (parts, rngs)
    )
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (top, bottom, metrics, grads), statistics = jax.lax.scan(add, zeros, (parts, rngs))
    return (
        top / bottom,
        {name: n / d for name, (n, d) in metrics.items()},
        jax.tree.map(lambda g: g / bottom, grads),
        jax.tree.map(_join, statistics),
    )


def _cached(task: FeatureTask, model_of, params, parts, rngs):
    """Features of all parts first, the loss of the whole batch, then each part's backward pass.

    Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (2021).
    Each part's forward pass runs twice, with the same randomness.
    """

    def features(params, part, rng):
        return task.features(model_of(params), part, rng)

    cached = jax.lax.map(lambda inputs: features(params, *inputs), (parts, rngs))
    value, metrics, (grads, to_features), _ = _whole(
        lambda both: (
            task.loss_of_features(model_of(both[0]), jax.tree.map(_join, both[1])),
            (),
        ),
        (params, cached),
    )

    def add(total, inputs):
        part, rng, cotangent = inputs
        _, pullback = jax.vjp(lambda p: features(p, part, rng), params)
        return jax.tree.map(jnp.add, total, pullback(cotangent)[0]), None

    grads, _ = jax.lax.scan(add, grads, (parts, rngs, to_features))
    return value, metrics, grads, ()


def _split(x: jax.Array, parts: int) -> jax.Array:
    """[B, ...] -> [parts, B / parts, ...]; part i takes rows i, i + parts, ...

    Strided, so that each device's rows go evenly into all parts and none has to move.
    """
    return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)


def _join(x: jax.Array) -> jax.Array:
    """The inverse of `_split`."""
    return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])
