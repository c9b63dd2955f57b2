"""The tiles of an image, put together to one grid of features that another connector reads.

A large image is cut, each tile encoded at the size that the encoder was trained at, and the maps of
features are laid side by side: Shi et al., "When Do We Not Need Larger Vision Models?" (2024; S2).
The connector then sees the whole image, as if one encoder of that size had.

Features of a tile know nothing of the tile's place, which connectors that attend need to know:
sines and cosines of the place on the board are added.
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
    at_least_one,
    make_connector,
    no_extra,
)
from mmjax.nn.position import sincos2d
from mmjax.typing import Array, Bool, Float


@dataclasses.dataclass(frozen=True)
class BoardConfig(ConnectorConfig):
    """
    Attributes:
      rows, columns: of tiles, which come row by row.
      whole: the connector that reads their features as one grid.
    """

    rows: int
    columns: int
    whole: ConnectorConfig
    name: str = dataclasses.field(default="board", init=False)

    def __post_init__(self):
        at_least_one(rows=self.rows, columns=self.columns)
        if self.whole.frames != 1:
            raise ConnectorError(
                f"The connector {self.whole.name!r} reads {self.whole.frames} frames itself: a "
                "board is one image; take one with frames=1."
            )

    @property
    def frames(self) -> int:
        return self.rows * self.columns

    @property
    def names_words(self) -> bool:
        return self.whole.names_words

    def grid(self, grid: Grid) -> Grid:
        """Of all tiles, where each has one of `grid` features."""
        return self.rows * grid[0], self.columns * grid[1]

    def tokens(self, grid: Grid, extra: int = 0) -> int:
        no_extra(extra, self.name)
        return self.whole.tokens(self.grid(grid))


@CONNECTORS.register("board")
class Board(Connector):
    """Tokens are those of the connector `whole`."""

    def __init__(self, config: BoardConfig, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        if inputs % 4 or inputs < 8:
            raise ConnectorError(
                f"Features {inputs} wide have no sines and cosines of their places on the board: "
                "take an encoder whose width is 8, 12, 16, ..."
            )
        self.config = config
        self.whole = make_connector(config.whole, inputs, outputs, rngs=rngs)

    def __call__(
        self, features: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None, grid: Grid
    ) -> tuple[Float[Array, "b m e"], Bool[Array, "b m"]]:
        features, mask = self._together(features, mask, grid)
        return self.whole(features, mask, self.config.grid(grid))

    def name(
        self, features: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None, grid: Grid
    ) -> Float[Array, "b m v"]:
        features, mask = self._together(features, mask, grid)
        return self.whole.name(features, mask, self.config.grid(grid))

    def _together(
        self, features: Array, mask: Array | None, grid: Grid
    ) -> tuple[Array, Array | None]:
        """Features row by row of the whole image, not tile after tile."""
        rows, columns = self.config.rows, self.config.columns
        count = rows * columns * grid[0] * grid[1]
        if features.shape[1] != count:
            raise ConnectorError(
                f"{features.shape[1]} features are not those of {rows} x {columns} tiles of "
                f"{grid[0]} x {grid[1]}, which are {count}: leave class token and registers out of "
                "the features (class_token=False)."
            )

        def laid(x: Array) -> Array:
            x = x.reshape(len(x), rows, columns, *grid, *x.shape[2:])
            return x.swapaxes(2, 3).reshape(len(x), count, *x.shape[5:])

        places = sincos2d(self.config.grid(grid), features.shape[-1])
        features = laid(features) + jnp.asarray(places, features.dtype)
        return features, None if mask is None else laid(mask)
