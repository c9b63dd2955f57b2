"""A linear map of a tower's pooled vector, which some checkpoints have and others do not."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx

from mmjax.nn.linear import Linear
from mmjax.nn.mlp import ACTIVATIONS
from mmjax.typing import Array, Float


@dataclasses.dataclass(frozen=True)
class ProjectionConfig:
    """What the pooled vector goes through.

    Attributes:
      width: of the result.
      activation: a name in `mmjax.nn.mlp.ACTIVATIONS`, or None. "tanh" in the pooler of ViT.
      bias: whether the map has one. It has none in CLIP.
    """

    width: int
    activation: str | None = None
    bias: bool = True


class Projection(Linear):
    """`activation(x @ kernel + bias)`, in float32."""

    def __init__(self, inputs: int, config: ProjectionConfig, *, rngs: nnx.Rngs):
        super().__init__(inputs, config.width, bias=config.bias, rngs=rngs)
        self.activation = None if config.activation is None else ACTIVATIONS[config.activation]

    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
        y = super().__call__(x.astype(jnp.float32))
        return y if self.activation is None else self.activation(y)
