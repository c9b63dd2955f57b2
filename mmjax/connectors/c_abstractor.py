"""Convolutions, averaging to a smaller grid, convolutions again: the C-Abstractor of Honeybee.

Cha et al., "Honeybee: Locality-enhanced Projector for Multimodal LLM" (2023). The convolutions are
blocks of RegNet (Radosavovic et al., 2020) with channel-wise 3 x 3 kernels, layer norms and SiLU,
as in the authors' implementation (khanrc/honeybee), which has them from timm.
"""

from __future__ import annotations

import dataclasses

import jax
from flax import nnx

from mmjax.connectors.base import (
    CONNECTORS,
    Connector,
    ConnectorConfig,
    Grid,
    at_least_one,
    make_connector,
    only_valid,
    whole_grid,
)
from mmjax.connectors.linear import LinearConfig
from mmjax.connectors.mlp import MLPConfig
from mmjax.connectors.pooling import pool, pooled_tokens
from mmjax.nn.conv import DepthwiseConv, SqueezeExcite
from mmjax.nn.linear import Linear
from mmjax.nn.mlp import ACTIVATIONS
from mmjax.nn.norm import NORMS
from mmjax.nn.position import LearnedPosition
from mmjax.typing import Array, Bool, Float

SILU_MLP = MLPConfig(activation="silu")


@dataclasses.dataclass(frozen=True)
class CAbstractorConfig(ConnectorConfig):
    """Its defaults are the published ones, but for `positions`.

    Attributes:
      grid: of the tokens, (down, across).
      width: of the convolutions.
      depth: number of blocks before the averaging, and after it.
      positions: the grid of a table of vectors that are learned and added to the features,
        resampled to other grids; None for no table. Published models have one for the grid of their
        encoder.
      projection: of the last block's output to the width of the language model.
    """

    grid: Grid = (12, 12)
    width: int = 1024
    depth: int = 3
    positions: Grid | None = None
    projection: LinearConfig | MLPConfig = SILU_MLP
    name: str = dataclasses.field(default="c_abstractor", init=False)

    def __post_init__(self):
        at_least_one(grid=self.grid, width=self.width, depth=self.depth)

    def tokens(self, grid: Grid, extra: int = 0) -> int:
        return pooled_tokens(self.name, self.grid, grid, extra)


@CONNECTORS.register("c_abstractor")
class CAbstractor(Connector):
    """Each cell of the smaller grid becomes a token.

    Features that do not count are zeros, and left out of the averages.
    """

    def __init__(self, config: CAbstractorConfig, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.config = config
        width = config.width
        self.position = (
            None
            if config.positions is None
            else LearnedPosition(config.positions, 0, inputs, rngs=rngs)
        )
        self.before = nnx.List(
            RegNetBlock(inputs if block == 0 else width, width, rngs=rngs)
            for block in range(config.depth)
        )
        self.after = nnx.List(RegNetBlock(width, width, rngs=rngs) for _ in range(config.depth))
        self.projection = make_connector(config.projection, width, outputs, rngs=rngs)

    def __call__(
        self, features: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None, grid: Grid
    ) -> tuple[Float[Array, "b m e"], Bool[Array, "b m"]]:
        config = self.config
        whole_grid(features.shape[1], grid, config.name)
        config.tokens(grid)  # raises where the grid is too small
        x = features
        if self.position is not None:
            x = x + self.position(grid).astype(x.dtype)
        x = _run(self.before, only_valid(x, mask), grid)
        x, mask = pool(x, mask, grid, config.grid)
        return self.projection(_run(self.after, x, config.grid), mask, config.grid)


def _run(blocks: nnx.List, x: Float[Array, "b n d"], grid: Grid) -> Float[Array, "b n e"]:
    x = x.reshape(x.shape[0], *grid, -1)
    for block in blocks:
        x = block(x)
    return x.reshape(x.shape[0], grid[0] * grid[1], -1)


class RegNetBlock(nnx.Module):
    """The bottleneck of RegNet-Y, as wide within as it is at its end."""

    def __init__(self, inputs: int, width: int, *, rngs: nnx.Rngs):
        def norm() -> nnx.Module:
            return NORMS["layernorm"](width, eps=1e-5)

        self.activation = ACTIVATIONS["silu"]
        self.expand, self.expand_norm = Linear(inputs, width, bias=False, rngs=rngs), norm()
        self.conv, self.conv_norm = DepthwiseConv(width, rngs=rngs), norm()
        self.gate = SqueezeExcite(
            width, max(1, round(inputs / 4)), activation="silu", gate=jax.nn.sigmoid, rngs=rngs
        )
        self.project, self.project_norm = Linear(width, width, bias=False, rngs=rngs), norm()
        same = inputs == width
        self.shortcut = None if same else Linear(inputs, width, bias=False, rngs=rngs)
        self.shortcut_norm = None if same else norm()

    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w e"]:
        y = self.activation(self.expand_norm(self.expand(x)))
        y = self.gate(self.activation(self.conv_norm(self.conv(y))))
        y = self.project_norm(self.project(y))
        return self.activation(
            y + (x if self.shortcut is None else self.shortcut_norm(self.shortcut(x)))
        )
