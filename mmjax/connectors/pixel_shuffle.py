"""Squares of patches become the channels of one token: the connector of Idefics3 and InternVL.

Laurençon et al., "Building and better understanding vision-language models" (2024): shuffling, then
a linear map without bias, which is the default here; SmolVLM has the same. Chen et al., "How Far
Are We to GPT-4V?" (2024): shuffling, a layer norm, then an MLP of two layers (`norm=True`,
`projection=MLPConfig()`). Both put the features of a square one after the other, row by row.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx

from mmjax.connectors.align import AlignConfig
from mmjax.connectors.base import (
    CONNECTORS,
    Connector,
    ConnectorConfig,
    Grid,
    all_valid,
    at_least_one,
    in_squares,
    make_connector,
    only_valid,
    square_tokens,
    whole_grid,
)
from mmjax.connectors.linear import LinearConfig
from mmjax.connectors.mlp import MLPConfig
from mmjax.nn.norm import NORMS
from mmjax.typing import Array, Bool, Float

NO_BIAS = LinearConfig(bias=False)


@dataclasses.dataclass(frozen=True)
class PixelShuffleConfig(ConnectorConfig):
    """
    Attributes:
      factor: side of a square, in patches: factor ** 2 of them become a token.
      projection: of a square's features to the width of the language model.
      norm: whether a layer norm of a square's features comes before it.
    """

    factor: int = 2
    projection: LinearConfig | MLPConfig | AlignConfig = NO_BIAS
    norm: bool = False
    name: str = dataclasses.field(default="pixel_shuffle", init=False)

    def __post_init__(self):
        at_least_one(factor=self.factor)

    @property
    def names_words(self) -> bool:
        return self.projection.names_words

    def tokens(self, grid: Grid, extra: int = 0) -> int:
        return square_tokens(self.name, self.factor, grid, extra)


@CONNECTORS.register("pixel_shuffle")
class PixelShuffle(Connector):
    """Each square of features becomes a token.

    Features that do not count are zeros; a token counts if any of its features does.
    """

    def __init__(self, config: PixelShuffleConfig, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.config = config
        width = inputs * config.factor**2
        self.norm = NORMS["layernorm"](width, eps=1e-5) if config.norm else None
        self.projection = make_connector(config.projection, width, outputs, rngs=rngs)

    def __call__(
        self, features: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None, grid: Grid
    ) -> tuple[Float[Array, "b m e"], Bool[Array, "b m"]]:
        tokens, _ = self.projection(self._squares(features, mask, grid), None, grid)
        if mask is None:
            return tokens, all_valid(tokens)
        return tokens, jnp.any(in_squares(mask, grid, self.config.factor), axis=2)

    def name(
        self, features: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None, grid: Grid
    ) -> Float[Array, "b m v"]:
        return self.projection.name(self._squares(features, mask, grid), None, grid)

    def _squares(self, features: Array, mask: Array | None, grid: Grid) -> Array:
        config = self.config
        whole_grid(features.shape[1], grid, config.name)
        config.tokens(grid)  # raises where squares do not fill the grid
        squares = in_squares(only_valid(features, mask), grid, config.factor)
        squares = squares.reshape(*squares.shape[:2], -1)
        return squares if self.norm is None else self.norm(squares)
