"""Queries that sample features near their place in the image: the D-Abstractor of Honeybee.

Cha et al., "Honeybee: Locality-enhanced Projector for Multimodal LLM" (2023): the decoder of
Deformable DETR (Zhu et al., 2020) over one grid of features, its queries' positions being averages
of the features and its reference points learned, from a regular grid on. Details are those of the
authors' implementation (khanrc/honeybee, `pooled_v_target: query`), which has the decoder from
transformers.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmjax.connectors.base import (
    CONNECTORS,
    Connector,
    ConnectorConfig,
    Grid,
    at_least_one,
    check_heads,
    make_connector,
    only_valid,
    whole_grid,
)
from mmjax.connectors.linear import LINEAR, LinearConfig
from mmjax.connectors.mlp import MLPConfig
from mmjax.connectors.pooling import pool, pooled_tokens
from mmjax.nn.attention import Attention
from mmjax.nn.linear import XAVIER, ZEROS, Linear
from mmjax.nn.mlp import MLP
from mmjax.nn.norm import NORMS
from mmjax.nn.partition import constrain
from mmjax.nn.position import LearnedPosition
from mmjax.nn.stack import Stack
from mmjax.typing import Array, Bool, Float


@dataclasses.dataclass(frozen=True)
class DAbstractorConfig(ConnectorConfig):
    """Its defaults are the published ones, but for `positions`.

    Attributes:
      grid: of the tokens, (down, across).
      width, depth, heads, mlp_width: of the decoder.
      points: that each head of a query samples.
      positions: the grid of a table of vectors that are learned and added to the features,
        resampled to other grids; None for no table. Published models have one for the grid of their
        encoder.
      projection: of the decoder's output to the width of the language model.
    """

    grid: Grid = (12, 12)
    width: int = 1024
    depth: int = 6
    heads: int = 8
    mlp_width: int = 1024
    points: int = 4
    positions: Grid | None = None
    projection: LinearConfig | MLPConfig = LINEAR
    name: str = dataclasses.field(default="d_abstractor", init=False)

    def __post_init__(self):
        at_least_one(grid=self.grid, depth=self.depth, heads=self.heads, points=self.points)
        check_heads(self.heads, self.width)

    def tokens(self, grid: Grid, extra: int = 0) -> int:
        return pooled_tokens(self.name, self.grid, grid, extra)


@CONNECTORS.register("d_abstractor")
class DAbstractor(Connector):
    """Each query becomes a token.

    Features that do not count are zeros where they are sampled, and left out of the averages.
    """

    def __init__(self, config: DAbstractorConfig, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.config = config
        width = config.width
        queries = config.grid[0] * config.grid[1]
        self.embed = Linear(inputs, width, rngs=rngs) if inputs != width else None
        self.position = (
            None
            if config.positions is None
            else LearnedPosition(config.positions, 0, width, rngs=rngs)
        )
        init = nnx.initializers.normal(1.0)  # as of an embedding table in PyTorch
        self.queries = nnx.Param(init(rngs.params(), (queries, width), jnp.float32))
        # How far the reference points, (across, down), are from the regular grid.
        self.shift = nnx.Param(jnp.zeros((queries, 2), jnp.float32))
        self.decoder = Stack(config, config.depth, block=DeformableBlock, rngs=rngs)
        self.projection = make_connector(config.projection, width, outputs, rngs=rngs)

    def __call__(
        self, features: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None, grid: Grid
    ) -> tuple[Float[Array, "b m e"], Bool[Array, "b m"]]:
        config = self.config
        whole_grid(features.shape[1], grid, config.name)
        config.tokens(grid)  # raises where the grid is too small
        x = features if self.embed is None else self.embed(features)
        if self.position is not None:
            x = x + self.position(grid).astype(x.dtype)
        position, valid = pool(x, mask, grid, config.grid)
        queries = jnp.broadcast_to(self.queries[...].astype(x.dtype), position.shape)
        places = regular_places(config.grid, grid) + self.shift[...]
        context = Context(x, mask, grid, places)
        y, _ = self.decoder.run(queries, (), position=position, context=context)
        return self.projection(y, valid, config.grid)


def regular_places(queries: Grid, grid: Grid) -> np.ndarray:
    """[queries, 2], places (across, down) of 0 to 1 that are spread evenly over the image.

    The first and the last of a row are the centres of its first and its last feature.
    """
    down, across = (
        np.linspace(0.5, features - 0.5, count) / features
        for count, features in zip(queries, grid, strict=True)
    )
    y, x = np.meshgrid(down, across, indexing="ij")
    return np.stack([x.ravel(), y.ravel()], axis=-1).astype(np.float32)


class Context(NamedTuple):
    """What the queries look at.

    Attributes:
      features: [B, N, D], of the grid.
      mask: [B, N], which of them count; None: all.
      grid: (h, w).
      places: [M, 2], where in the image each query looks: (across, down), of 0 to 1.
    """

    features: Array
    mask: Array | None
    grid: Grid
    places: Array


class DeformableBlock(nnx.Module):
    """Attention of the queries to each other, then to features near their places, then an MLP.

    Each is added to the stream, which is then normalised.
    """

    def __init__(self, config: DAbstractorConfig, *, rngs: nnx.Rngs):
        width = config.width

        def norm() -> nnx.Module:
            return NORMS["layernorm"](width, eps=1e-5)

        self.attention, self.attention_norm = Attention(width, config.heads, rngs=rngs), norm()
        self.cross = DeformableAttention(width, config.heads, config.points, rngs=rngs)
        self.cross_norm = norm()
        self.mlp = MLP(width, config.mlp_width, activation="relu", rngs=rngs)
        self.mlp_norm = norm()

    def __call__(
        self,
        x: Float[Array, "b m d"],
        *,
        position: Float[Array, "b m d"],
        context: Context,
        **unused: None,
    ) -> Float[Array, "b m d"]:
        """`unused`: what a stack offers to blocks, and these do not have."""
        placed = x + position
        x = self.attention_norm(x + self.attention(placed, placed, values=x))
        x = self.cross_norm(x + self.cross(x + position, context))
        x = self.mlp_norm(x + self.mlp(x))
        return constrain(x, "batch", "tokens", "embed")


class DeformableAttention(nnx.Module):
    """Each head of a query weighs a few features at places that the query decides.

    Between features they are interpolated, and beyond the grid they are zeros. Written as the
    matrix of what each feature contributes to each query, since accelerators multiply matrices
    faster than they gather; it is as large as the weights of plain attention.
    """

    def __init__(self, width: int, heads: int, points: int, *, rngs: nnx.Rngs):
        self.heads, self.points = heads, points
        # At first a head looks in a direction of its own, its points one step farther each.
        angle = 2 * math.pi * np.arange(heads) / heads
        direction = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
        direction /= np.abs(direction).max(axis=-1, keepdims=True)
        steps = direction[:, None] * np.arange(1, points + 1)[:, None]
        self.offsets = Linear(
            width,
            heads * points * 2,
            kernel_init=ZEROS,
            bias_init=lambda key, shape, dtype: jnp.asarray(steps.reshape(shape), dtype),
            rngs=rngs,
        )
        self.weights = Linear(width, heads * points, kernel_init=ZEROS, rngs=rngs)
        self.value = Linear(width, width, kernel_init=XAVIER, rngs=rngs)
        self.out = Linear(width, width, kernel_init=XAVIER, rngs=rngs)

    def __call__(self, x: Float[Array, "b m d"], context: Context) -> Float[Array, "b m d"]:
        value = only_valid(self.value(context.features), context.mask)
        value = value.reshape(*value.shape[:2], self.heads, -1)
        value = constrain(value, "batch", "tokens", "heads", None)
        contributions = self._contributions(x.astype(jnp.float32), context).astype(x.dtype)
        out = jnp.einsum("bmhn,bnhd->bmhd", contributions, value)
        return self.out(out.reshape(x.shape))

    def _contributions(self, x: Float[Array, "b m d"], context: Context) -> Float[Array, "b m h n"]:
        """Of each feature to each head of each query."""
        batch, queries, _ = x.shape
        height, width = context.grid
        weights = self.weights(x).reshape(batch, queries, self.heads, self.points)
        weights = jax.nn.softmax(weights)
        offsets = self.offsets(x).reshape(batch, queries, self.heads, self.points, 2)
        # In steps of the grid, from its first feature on.
        steps = np.array([width, height], np.float32)
        places = context.places[:, None, None] * steps + offsets - 0.5
        across = _near(places[..., 0], width)
        down = _near(places[..., 1], height) * weights[..., None]
        near = jnp.einsum("bmhpi,bmhpj->bmhij", down, across)
        return near.reshape(batch, queries, self.heads, height * width)


def _near(places: Float[Array, "*batch"], length: int) -> Float[Array, "*batch {length}"]:
    """Weights of linear interpolation between the features 0, 1, ... of a row."""
    distance = jnp.abs(places[..., None] - jnp.arange(length, dtype=jnp.float32))
    return jnp.maximum(1.0 - distance, 0.0)
