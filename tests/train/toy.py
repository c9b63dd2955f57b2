"""A model of two linear maps that compiles in a moment, for tests of the training step."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmjax import params
from mmjax.train import state
from mmjax.train.step import make_step
from mmjax.train.tasks import Task

INPUT, WIDTH = 12, 8


class Towers(nnx.Module):
    """Answers to everything that the contrastive task asks of a model."""

    def __init__(self, rngs: nnx.Rngs):
        self.image = nnx.Linear(INPUT, WIDTH, rngs=rngs)
        self.text = nnx.Linear(INPUT, WIDTH, rngs=rngs)
        self.log_scale = nnx.Param(jnp.asarray(1.5))
        self.bias = nnx.Param(jnp.asarray(-2.0))

    def encode_image(self, images, *, rng=None):
        return _unit(self.image(images))

    def encode_text(self, tokens, mask=None, *, rng=None):
        return _unit(self.text(tokens))

    def scale_and_bias(self):
        return jnp.exp(self.log_scale[...]), self.bias[...]


def _unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


class Weighted(Task):
    """A weighted mean of squares, so that parts of a batch have different denominators."""

    fields = ("image", "weight")

    def loss(self, model, batch, rng):
        weight = batch["weight"]
        squares = jnp.sum(jnp.square(model.image(batch["image"]) - 1.0), axis=-1)
        return (jnp.sum(weight * squares), jnp.sum(weight)), {
            "heavy": (jnp.sum(weight > 0.5), jnp.asarray(weight.size, jnp.float32))
        }


def batch(step: int = 0, size: int = 16) -> dict[str, np.ndarray]:
    random = np.random.default_rng(step)
    return {
        "image": random.standard_normal((size, INPUT), np.float32),
        "text": random.standard_normal((size, INPUT), np.float32),
        "text_mask": np.ones((size, 1), bool),
        "weight": random.random(size, np.float32),
    }


def train(task, tx, *, steps=1, accumulate=1, ema=None, trainable=lambda path: True):
    """Some steps; the first state, the last, and the metrics of each step."""
    graphdef, values = params.split(Towers(nnx.Rngs(0)))
    step = jax.jit(make_step(task, graphdef, tx, accumulate=accumulate, ema=ema))
    first = state.create(
        values, {path: trainable(path) for path in values}, tx, seed=0, ema=ema is not None
    )
    last, metrics = first, []
    for index in range(steps):
        last, row = step(last, batch(index))
        metrics.append(jax.device_get(row))
    return first, last, metrics
