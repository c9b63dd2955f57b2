"""A grid of features is averaged to a smaller one, then projected: the connector of DeCo.

Yao et al., "DeCo: Decoupling Token Compression from Semantic Abstraction in Multimodal Large
Language Models" (2024).
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx

from mmjax.connectors.base import (
    CONNECTORS,
    Connector,
    ConnectorConfig,
    ConnectorError,
    Grid,
    all_valid,
    at_least_one,
    make_connector,
    no_extra,
    only_valid,
    whole_grid,
)
from mmjax.connectors.linear import LINEAR, LinearConfig
from mmjax.connectors.mlp import MLPConfig
from mmjax.nn.position import interpolate_grid
from mmjax.typing import Array, Bool, Float


@dataclasses.dataclass(frozen=True)
class PoolingConfig(ConnectorConfig):
    """
    Attributes:
      grid: of the tokens, (down, across). It need not divide that of the features.
      projection: of a mean to the width of the language model.
    """

    grid: Grid
    projection: LinearConfig | MLPConfig = LINEAR
    name: str = dataclasses.field(default="pooling", init=False)

    def __post_init__(self):
        at_least_one(grid=self.grid)

    def tokens(self, grid: Grid, extra: int = 0) -> int:
        return pooled_tokens(self.name, self.grid, grid, extra)


@CONNECTORS.register("pooling")
class PoolingConnector(Connector):
    """Each mean becomes a token, as `adaptive_avg_pool2d` of torch makes them.

    A mean is that of the features that count; a token counts if there are any.
    """

    def __init__(self, config: PoolingConfig, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.config = config
        self.projection = make_connector(config.projection, inputs, outputs, rngs=rngs)

    def __call__(
        self, features: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None, grid: Grid
    ) -> tuple[Float[Array, "b m e"], Bool[Array, "b m"]]:
        whole_grid(features.shape[1], grid, self.config.name)
        self.config.tokens(grid)  # raises where the grid is too small
        means, mask = pool(features, mask, grid, self.config.grid)
        return self.projection(means, mask, self.config.grid)


def pooled_tokens(name: str, target: Grid, grid: Grid, extra: int) -> int:
    """What `tokens` returns of a connector that averages to the grid `target`.

    Raises:
      ConnectorError: if the grid of features is the smaller one, or there are extra features.
    """
    no_extra(extra, name)
    if grid[0] < target[0] or grid[1] < target[1]:
        nearest = (min(grid[0], target[0]), min(grid[1], target[1]))
        raise ConnectorError(
            f"The connector {name!r} makes a grid of {target[0]} x {target[1]} tokens, for which "
            f"one of {grid[0]} x {grid[1]} features is too small: grid={nearest} is the nearest "
            "that fits."
        )
    return target[0] * target[1]


def pool(
    features: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None, grid: Grid, target: Grid
) -> tuple[Float[Array, "b m d"], Bool[Array, "b m"]]:
    """The mean of the features that count in each cell of `target`; whether there are any."""
    means = interpolate_grid(only_valid(features, mask), grid, target, "average")
    if mask is None:
        return means, all_valid(means)
    share = interpolate_grid(mask[:, :, None].astype(jnp.float32), grid, target, "average")
    some = share > 0
    return (means / jnp.where(some, share, 1.0)).astype(means.dtype), some[:, :, 0]
