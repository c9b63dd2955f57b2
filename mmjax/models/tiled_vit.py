"""The image encoder of Llama 3.2 Vision: a ViT that reads the tiles of an image together.

Grattafiori et al., "The Llama 3 Herd of Models" (2024), section 7. An image is cut into tiles of a
board of some shape, (1, 1) to (4, 1) and (1, 4) in the published models. All its tiles are one
sequence for two transformers, one after the other: the second, "global", adds what it computes as
far as learned gates say. Learned vectors say where a patch stands in its tile and, by the board's
shape, where the tile stands; gates decide how much of the latter counts. All numbers equal those of
`MllamaVisionModel` of transformers, peculiarities included: see `TiledViT.mask`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmjax.models.checks import check_dtype
from mmjax.nn.attention import KV
from mmjax.nn.linear import Embedding
from mmjax.nn.masks import Labels, Mask
from mmjax.nn.norm import NORMS
from mmjax.nn.partition import constrain
from mmjax.nn.patch import PatchEmbed, patch_grid
from mmjax.nn.stack import Block, BlockConfig, Stack
from mmjax.typing import Array, Bool, Float, Int, Key

# Boards (down, across) of up to four tiles.
SHAPES = ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))
# Of the norms around the first transformer, whatever `norm_eps` says of its blocks.
OUTER_EPS = 1e-5
# A tile has a whole number of these; zeros follow its patches.
MULTIPLE = 8


@dataclasses.dataclass(frozen=True)
class TiledViTConfig:
    """Everything that decides what a `TiledViT` computes.

    Attributes:
      image_size: side of a tile in pixels; the positions are made for it.
      patch_size: side of a patch in pixels; pixels that fill no patch are left out.
      width, heads, mlp_width: of both transformers.
      depth, global_depth: of the first and the second.
      activation: a name in `mmjax.nn.mlp.ACTIVATIONS`.
      norm_eps: of the norms of blocks.
      tiles: of an image; where its board has fewer, tiles of zeros follow.
      shapes: of boards, (down, across).
      channels: of the images.
      remat, unroll, dtype: as in `ViTConfig`.
    """

    image_size: int
    patch_size: int
    width: int
    depth: int
    global_depth: int
    heads: int
    mlp_width: int
    activation: str
    norm_eps: float = 1e-5
    tiles: int = 4
    shapes: tuple[tuple[int, int], ...] = SHAPES
    channels: int = 3
    remat: str = "none"
    unroll: int = 1
    dtype: str = "float32"

    def __post_init__(self):
        check_dtype(self.dtype)
        # Lists would make the config unhashable.
        object.__setattr__(self, "shapes", tuple((down, across) for down, across in self.shapes))
        wrong = [shape for shape in self.shapes if not 1 <= math.prod(shape) <= self.tiles]
        if wrong or not self.shapes:
            raise ValueError(
                f"shapes={self.shapes}: boards have 1 to tiles={self.tiles} tiles, and there must "
                "be one at least."
            )
        _ = self.grid  # raises where patches do not fit

    @property
    def grid(self) -> tuple[int, int]:
        """Patches (down, across) of a tile."""
        return patch_grid(self.image_size, self.image_size, self.patch_size, "crop")

    @property
    def prefix(self) -> int:
        """Tokens of a tile before those of its patches: the class token."""
        return 1

    @property
    def patches(self) -> int:
        """Tokens of a tile, its class token included."""
        return self.prefix + math.prod(self.grid)

    @property
    def block(self) -> BlockConfig:
        return BlockConfig(
            width=self.width,
            heads=self.heads,
            mlp_width=self.mlp_width,
            activation=self.activation,
            norm="layernorm",
            norm_eps=self.norm_eps,
            qkv_bias=False,
            out_bias=False,
        )


class GatedSelfBlock(Block):
    """A block each of whose branches is multiplied by tanh of a learned number."""

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.attention_gate = nnx.Param(jnp.asarray(math.pi / 4, jnp.float32))
        self.mlp_gate = nnx.Param(jnp.asarray(math.pi / 4, jnp.float32))

    def _run(
        self,
        x: Array,
        attend: Callable[[Array], tuple[Array, KV | None]],
        expert: None = None,
        drop_rate: Array | None = None,
        rng: Key | None = None,
    ) -> tuple[Array, KV | None]:
        attended, cache = attend(self.attention_norm(x))
        x = x + _opened(self.attention_gate, x) * attended
        x = x + _opened(self.mlp_gate, x) * self.mlp(self.mlp_norm(x))
        return constrain(x, "batch", "tokens", "embed"), cache


def _opened(gate: nnx.Param, x: Array) -> Array:
    return jnp.tanh(gate[...]).astype(x.dtype)


class TiledViT(nnx.Module):
    """tiles [N, T, H, W, C], shapes [N] -> features [N, T, P, (1 + F) * D]. See `__call__`."""

    def __init__(self, config: TiledViTConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, tiles, kinds = config.width, config.tiles, 1 + len(config.shapes)
        init, norm = nnx.initializers.normal(width**-0.5), NORMS["layernorm"]
        self.patch = PatchEmbed(
            config.patch_size, config.channels, width, partial="crop", bias=False, rngs=rngs
        )
        self.class_token = nnx.Param(init(rngs.params(), (1, width), jnp.float32))
        self.position = nnx.Param(init(rngs.params(), (config.patches, width), jnp.float32))

        def of_tiles(size: int) -> tuple[Embedding, nnx.Param]:
            """Vectors by shape, that of no image first, and their gate."""
            table = Embedding(kinds, tiles * size, init=init, rngs=rngs)
            return table, nnx.Param(jnp.zeros((), jnp.float32))

        self.tile_position, self.position_gate = of_tiles(config.patches * width)
        self.pre_tile, self.pre_tile_gate = of_tiles(width)
        self.post_tile, self.post_tile_gate = of_tiles(width)
        self.pre_norm = norm(width, eps=OUTER_EPS)
        self.encoder = Stack(
            config.block, config.depth, remat=config.remat, unroll=config.unroll, rngs=rngs
        )
        self.post_norm = norm(width, eps=OUTER_EPS)
        self.global_encoder = Stack(
            config.block,
            config.global_depth,
            block=GatedSelfBlock,
            remat=config.remat,
            unroll=config.unroll,
            rngs=rngs,
        )

    def __call__(
        self,
        images: Float[Array, "n t h w c"],
        shapes: Int[Array, " n"],
        features: Sequence[int],
    ) -> Float[Array, "n t p e"]:
        """The features of each token of each tile: the output of the second transformer, then those
        of blocks of the first.

        Args:
          images: normalised pixels of `config.tiles` tiles of `config.image_size`.
          shapes: of each image's board: its number in `config.shapes`, from 1; 0: no image.
          features: blocks of the first transformer; -1 is the last, -2 the penultimate.

        Raises:
          ValueError: if tiles are not those of the config, or a block does not exist.
        """
        config = self.config
        side = config.image_size
        if images.shape[1:] != (config.tiles, side, side, config.channels):
            raise ValueError(
                f"Images of shape {images.shape}: expected [images, {config.tiles}, {side}, {side},"
                f" {config.channels}], tiles of each image."
            )
        count, tiles, *tile = images.shape
        x = self.patch(images.reshape(count * tiles, *tile).astype(config.dtype))
        x = x.reshape(count, tiles, -1, config.width)
        x = x + self._of_tiles(self.pre_tile, self.pre_tile_gate, shapes, x)
        first = jnp.broadcast_to(
            self.class_token[...].astype(x.dtype), (count, tiles, 1, x.shape[3])
        )
        x = jnp.concatenate([first, x], axis=2)
        shared = (1 - jnp.tanh(self.position_gate[...])) * self.position[...]
        x = x + shared.astype(x.dtype)
        x = x + self._of_tiles(self.tile_position, self.position_gate, shapes, x)
        x = self.pre_norm(x)
        x = jnp.pad(x, ((0, 0), (0, 0), (0, -config.patches % MULTIPLE), (0, 0)))
        padded, mask = x.shape, self.mask(shapes)
        x, outputs = self.encoder.run(self._joined(x), features, mask=mask)
        x = self.post_norm(x).reshape(padded)
        x = x + self._of_tiles(self.post_tile, self.post_tile_gate, shapes, x)
        x = self.global_encoder(self._joined(x), mask=mask)
        x = jnp.concatenate([x, *outputs], axis=-1)
        return x.reshape(*padded[:3], x.shape[-1])[:, :, : config.patches]

    def mask(self, shapes: Int[Array, " n"]) -> Mask:
        """Who sees whom among the tokens of an image, those of zeros included.

        Those of patches see all others, zeros and tiles that are not there as well; the latter see
        patches only. So it is in transformers, and in the code that Meta published.
        """
        valid = self._valid(shapes)
        # Group 1 are patches, group 2 is the rest.
        query = Labels(group=jnp.ones_like(valid, jnp.int32), parent=jnp.where(valid, 2, 0))
        return Mask(query, Labels(group=jnp.where(valid, 1, 2)))

    def _valid(self, shapes: Int[Array, " n"]) -> Bool[Array, "n l"]:
        """Which tokens are those of patches; of no image the first tile's are, as there."""
        config = self.config
        length = config.patches + -config.patches % MULTIPLE
        patch = jnp.arange(length) < config.patches
        valid = tiles_there(config, shapes)[:, :, None] & patch
        return valid.reshape(len(shapes), -1)

    def _of_tiles(
        self, table: Embedding, gate: nnx.Param, shapes: Array, x: Float[Array, "n t p d"]
    ) -> Float[Array, "n t #p d"]:
        """The vectors of each tile, or of each of its tokens."""
        found = table(shapes).reshape(*x.shape[:2], -1, x.shape[3])
        return (jnp.tanh(gate[...]) * found).astype(x.dtype)

    def _joined(self, x: Float[Array, "n t p d"]) -> Float[Array, "n l d"]:
        """The tiles of an image as one sequence."""
        return constrain(x.reshape(len(x), -1, x.shape[3]), "batch", "tokens", "embed")


def tiles_there(config: TiledViTConfig, shapes: Int[Array, "*n"]) -> Bool[Array, "*n t"]:
    """Which tiles boards of these shapes have, numbered from 1; where there is none (0), one."""
    counts = np.array([1, *map(math.prod, config.shapes)], np.int32)
    return jnp.arange(config.tiles) < jnp.asarray(counts)[shapes][..., None]
