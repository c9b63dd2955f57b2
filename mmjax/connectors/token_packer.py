"""A coarse grid of queries, each of which attends to the fine features of its square.

Li et al., "TokenPacker: Efficient Visual Projector for Multimodal LLM" (2024). Queries are the
features resampled to the coarse grid; keys and values come of the features of several blocks of the
encoder, as `features` of the VLM gives them, one after the other. Details are those of the authors'
implementation (CircleRadon/TokenPacker), where what is attended to replaces the query.
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
    check_heads,
    in_squares,
    make_connector,
    only_valid,
    square_tokens,
    whole_grid,
)
from mmjax.connectors.linear import LinearConfig
from mmjax.connectors.mlp import MLPConfig
from mmjax.nn import masks
from mmjax.nn.attention import Attention
from mmjax.nn.linear import Linear
from mmjax.nn.mlp import MLP
from mmjax.nn.norm import NORMS
from mmjax.nn.position import interpolate_grid
from mmjax.typing import Array, Bool, Float

TWO_LAYERS = MLPConfig()


@dataclasses.dataclass(frozen=True)
class TokenPackerConfig(ConnectorConfig):
    """Its defaults are the published ones for features of one block of the encoder.

    Attributes:
      factor: side of a square, in patches: factor ** 2 of them become a token. Published: 2, 3, 4.
      levels: blocks of the encoder whose features there are, one after the other; the queries are
        of the last. Published: 4, blocks 11, 15, 21 and 22 of CLIP's 24.
      width, heads: of the attention.
      projection: of its output to the width of the language model.
    """

    factor: int = 2
    levels: int = 1
    width: int = 1024
    heads: int = 8
    projection: LinearConfig | MLPConfig = TWO_LAYERS
    name: str = dataclasses.field(default="token_packer", init=False)

    def __post_init__(self):
        at_least_one(factor=self.factor, levels=self.levels, heads=self.heads)
        check_heads(self.heads, self.width)

    def tokens(self, grid: Grid, extra: int = 0) -> int:
        return square_tokens(self.name, self.factor, grid, extra)


@CONNECTORS.register("token_packer")
class TokenPacker(Connector):
    """Each square becomes a token.

    Features that do not count are zeros for the queries and not attended to; a token counts if any
    of its features does.
    """

    def __init__(self, config: TokenPackerConfig, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        if inputs % config.levels:
            raise ConnectorError(
                f"Features {inputs} wide are not those of levels={config.levels} blocks of an "
                "encoder: let `features` of the VLM name as many."
            )
        self.config = config
        width = config.width

        def norm() -> nnx.Module:
            return NORMS["layernorm"](width, eps=1e-6)

        def mlp() -> MLP:
            return MLP(inputs, width, activation="gelu", outputs=width, rngs=rngs)

        self.coarse = Linear(inputs // config.levels, width, bias=False, rngs=rngs)
        self.coarse_norm = norm()
        self.keys, self.keys_norm = mlp(), norm()
        self.values, self.values_norm = mlp(), norm()
        self.attention = Attention(width, config.heads, rngs=rngs)
        self.projection = make_connector(config.projection, width, outputs, rngs=rngs)

    def __call__(
        self, features: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None, grid: Grid
    ) -> tuple[Float[Array, "b m e"], Bool[Array, "b m"]]:
        factor = self.config.factor
        whole_grid(features.shape[1], grid, self.config.name)
        self.config.tokens(grid)  # raises where squares do not fill the grid
        coarse_grid = (grid[0] // factor, grid[1] // factor)
        last = only_valid(features, mask)[:, :, -self.coarse.kernel.shape[0] :]
        queries = interpolate_grid(last, grid, coarse_grid, "bilinear")
        queries = self.coarse_norm(self.coarse(queries))
        batch, count, width = queries.shape

        def rows(x: Array) -> Array:
            """Each square is a row of a batch of its own."""
            return in_squares(x, grid, factor).reshape(batch * count, factor**2, -1)

        near, valid = None, all_valid(queries)
        if mask is not None:
            near = masks.cross(jnp.ones((1, 1), bool), rows(mask[:, :, None])[:, :, 0])
            valid = jnp.any(in_squares(mask, grid, factor), axis=2)
        attended = self.attention(
            queries.reshape(batch * count, 1, width),
            rows(self.keys_norm(self.keys(features))),
            values=rows(self.values_norm(self.values(features))),
            mask=near,
        )
        return self.projection(attended.reshape(batch, count, width), valid, coarse_grid)
