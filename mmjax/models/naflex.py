"""Vision transformer for images of any shape, the image tower of SigLIP 2 NaFlex.

Tschannen et al., SigLIP 2 (2025): an image is resized to the largest size with at most N patches
that nearly keeps its aspect ratio, and the positions are resampled to each image's own grid.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx

from mmjax.models.checks import check_dtype
from mmjax.models.vit import ViTOutput
from mmjax.nn import masks
from mmjax.nn.linear import ZEROS, Linear
from mmjax.nn.norm import NORMS
from mmjax.nn.partition import constrain
from mmjax.nn.pooling import AttentionPool, masked_mean
from mmjax.nn.resample import bilinear_antialias
from mmjax.nn.stack import BlockConfig, Stack
from mmjax.patches import Patches
from mmjax.registry import check_choice
from mmjax.typing import Array, Bool, Float, Int, Key

POOLINGS = ("map", "none")


@dataclasses.dataclass(frozen=True)
class NaFlexConfig:
    """Everything that decides what a `NaFlexViT` computes.

    Attributes:
      patch_size: side of a patch in pixels.
      num_patches: places of the (square) table of positions; images may have more or fewer.
      width, depth, heads, mlp_width, activation, norm_eps: as in `ViTConfig`.
      pooling: "map" (attention pooling over an image's own patches) or "none".
      num_classes: of the classification head, which sees the mean of an image's own patches; 0 for
        no head.
      channels: of the images.
      drop_path, remat, unroll, dtype: as in `ViTConfig`.
    """

    patch_size: int
    num_patches: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    activation: str
    norm_eps: float
    pooling: str
    num_classes: int = 0
    channels: int = 3
    drop_path: float = 0.0
    remat: str = "none"
    unroll: int = 1
    dtype: str = "float32"

    def __post_init__(self):
        check_choice("pooling", self.pooling, POOLINGS)
        check_dtype(self.dtype)
        if self.side**2 != self.num_patches:
            raise ValueError(
                f"num_patches={self.num_patches} is no square, but the table of positions is one: "
                f"choose e.g. {self.side**2} or {(self.side + 1) ** 2}."
            )

    @property
    def side(self) -> int:
        """Rows, and columns, of the table of positions."""
        return math.isqrt(self.num_patches)

    @property
    def pooled_width(self) -> int:
        return self.width

    @property
    def block(self) -> BlockConfig:
        return BlockConfig(
            width=self.width,
            heads=self.heads,
            mlp_width=self.mlp_width,
            activation=self.activation,
            norm="layernorm",
            norm_eps=self.norm_eps,
        )


class NaFlexViT(nnx.Module):
    """`Patches` -> `ViTOutput`, whose tokens are the N patches; those of the padding are undefined.

    Shapes may be traced: one compiled function serves images of all shapes.
    """

    def __init__(self, config: NaFlexConfig, *, rngs: nnx.Rngs):
        self.config = config
        width = config.width
        self.patch = Linear(config.patch_size**2 * config.channels, width, rngs=rngs)
        init = nnx.initializers.normal(1 / math.sqrt(width))  # as in big_vision
        table = init(rngs.params(), (config.num_patches, width), jnp.float32)
        self.position = nnx.Param(table)
        self.encoder = Stack(
            config.block,
            config.depth,
            remat=config.remat,
            drop_path=config.drop_path,
            unroll=config.unroll,
            rngs=rngs,
        )
        self.final_norm = NORMS["layernorm"](width, eps=config.norm_eps)
        self.pool = AttentionPool(config.block, rngs=rngs) if config.pooling == "map" else None
        self.head = (
            Linear(width, config.num_classes, kernel_init=ZEROS, rngs=rngs)
            if config.num_classes
            else None
        )

    def __call__(
        self, images: Patches, *, rng: Key | None = None, features: Sequence[int] = ()
    ) -> ViTOutput:
        """See `ViTOutput`. An image whose shape has more patches than there is room for gets NaN.

        Args:
          rng: turns stochastic depth on.
          features: blocks whose outputs are wanted; -1 is the last, -2 the penultimate.

        Raises:
          ValueError: if the patches have another size, or a block of `features` does not exist.
        """
        config = self.config
        pixels = jnp.asarray(images.patches).astype(config.dtype)
        expected = config.patch_size**2 * config.channels
        if pixels.ndim != 3 or pixels.shape[2] != expected:
            raise ValueError(
                f"Patches of shape {pixels.shape} are not [batch, patches, {expected}] "
                f"({config.patch_size} x {config.patch_size} pixels of {config.channels} channels)."
            )
        shapes = jnp.asarray(images.shapes)
        room = pixels.shape[1]
        valid = _inside(shapes, room) if images.mask is None else jnp.asarray(images.mask)
        position = resample_positions(self.position[...], config.side, shapes, room)
        x = self.patch(pixels) + position.astype(config.dtype)
        x = constrain(x, "batch", "tokens", "embed")
        x, outputs = self.encoder.run(x, features, mask=masks.padding(valid), rng=rng)
        x = self.final_norm(x)
        pooled, logits = None, None
        if self.pool is not None:
            pooled = self.pool(x, masks.cross(jnp.ones_like(valid[:, :1]), valid))
        if self.head is not None:
            logits = self.head(masked_mean(x.astype(jnp.float32), valid))
        return ViTOutput(x, pooled, logits, outputs)


def resample_positions(
    table: Float[Array, "s d"], side: int, shapes: Int[Array, "b 2"], room: int
) -> Float[Array, "b {room} d"]:
    """A square table of positions at each image's own grid: bilinear, antialiased, in float32.

    Args:
      side: rows, and columns, of the table.
      shapes: rows and columns of each image; may be traced.
      room: patches of each row of the batch, padding included.
    """
    rows, columns = (jnp.maximum(size, 1) for size in (shapes[:, :1], shapes[:, 1:]))
    place = jnp.arange(room, dtype=shapes.dtype)[None]
    # Places of the padding repeat the last row: they have to be finite.
    down = bilinear_antialias(side, rows, jnp.minimum(place // columns, rows - 1))
    across = bilinear_antialias(side, columns, place % columns)
    weights = (down[:, :, :, None] * across[:, :, None, :]).reshape(*down.shape[:2], side * side)
    positions = jnp.matmul(weights, table.astype(jnp.float32), precision="highest")
    return jnp.where((rows * columns > room)[:, :, None], jnp.nan, positions)


def _inside(shapes: Int[Array, "b 2"], room: int) -> Bool[Array, "b {room}"]:
    return jnp.arange(room)[None] < jnp.prod(shapes, axis=1, keepdims=True)
