"""Vision transformer (Dosovitskiy et al., 2020), and the image tower of CLIP and SigLIP."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mmjax.models.checks import check_choice, check_dtype
from mmjax.nn.dropout import check_rate, drop_patches
from mmjax.nn.linear import ZEROS, Linear
from mmjax.nn.norm import NORMS
from mmjax.nn.partition import constrain
from mmjax.nn.patch import PARTIAL_PATCHES, PatchEmbed, patch_grid
from mmjax.nn.pooling import AttentionPool
from mmjax.nn.position import POSITIONS
from mmjax.nn.stack import BlockConfig, Stack
from mmjax.typing import Array, Float, Key

POOLINGS = ("cls", "mean", "map", "none")


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Everything that decides what a ViT computes. `vit_size("S/16")` gives five of the fields.

    Attributes:
      image_size: pixels, one number or (height, width), that the positions are made for; images
        of other sizes are accepted at call time.
      patch_size: side of a patch in pixels.
      width, depth, heads, mlp_width: of the transformer.
      activation: a name in `mmjax.nn.mlp.ACTIVATIONS`. Checkpoints differ in it.
      norm_eps: of all layer norms. 1e-12 in ViT of transformers, 1e-5 in CLIP, 1e-6 in SigLIP.
      pooling: "cls" (adds a class token), "mean" (of the patches), "map" (attention pooling) or
        "none".
      position: "learned" (interpolated where the resolution is another) or "sincos2d".
      pre_norm: a norm before the first block, as in CLIP.
      patch_bias: whether the patch embedding has a bias; it has none in CLIP.
      num_classes: of the classification head; 0 for no head.
      channels: of the images.
      partial_patches: "error" or "crop"; see `PatchEmbed`.
      patch_dropout: share of the patches left out in training.
      drop_path: rate of stochastic depth at the last block.
      remat: what the backward pass computes again; a name in `mmjax.nn.stack.REMAT`.
      unroll: blocks in one iteration of the scan over them.
      dtype: of the computation; "float32" or "bfloat16". Norms, softmax and logits are float32.
    """

    image_size: int | tuple[int, int]
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    activation: str
    norm_eps: float
    pooling: str
    position: str
    pre_norm: bool = False
    patch_bias: bool = True
    num_classes: int = 0
    channels: int = 3
    partial_patches: str = "error"
    patch_dropout: float = 0.0
    drop_path: float = 0.0
    remat: str = "none"
    unroll: int = 1
    dtype: str = "float32"

    def __post_init__(self):
        if not isinstance(self.image_size, int):  # a list would make the config unhashable
            object.__setattr__(self, "image_size", tuple(self.image_size))
        check_choice("pooling", self.pooling, POOLINGS)
        check_choice("partial_patches", self.partial_patches, PARTIAL_PATCHES)
        check_dtype(self.dtype)
        check_rate("patch_dropout", self.patch_dropout)
        if self.num_classes and self.pooling == "none":
            raise ValueError(
                f"num_classes={self.num_classes} needs something to classify: set pooling to "
                "'cls', 'mean' or 'map'."
            )
        _ = self.grid  # raises where patches do not fit

    @property
    def grid(self) -> tuple[int, int]:
        """Patches (down, across) of an image of `image_size`."""
        size = self.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return patch_grid(height, width, self.patch_size, self.partial_patches)

    @property
    def prefix(self) -> int:
        """Number of tokens before those of the patches: 1 where there is a class token."""
        return 1 if self.pooling == "cls" else 0

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


class ViTOutput(NamedTuple):
    """What a ViT returns.

    Attributes:
      tokens: [B, N, D] after the final norm: the class token where there is one
        (`config.prefix`), then the patches row by row.
      pooled: [B, D], or None where pooling is "none".
      logits: [B, num_classes] float32, or None without a head.
      features: [F, B, N, D], outputs of the blocks asked for, before any final norm, or None.
    """

    tokens: Array
    pooled: Array | None
    logits: Array | None
    features: Array | None


class ViT(nnx.Module):
    """images [B, H, W, C] -> `ViTOutput`."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        self.config = config
        width = config.width
        self.patch = PatchEmbed(
            config.patch_size,
            config.channels,
            width,
            partial=config.partial_patches,
            bias=config.patch_bias,
            rngs=rngs,
        )
        self.class_token = nnx.Param(jnp.zeros((1, width))) if config.prefix else None
        self.position = POSITIONS[config.position](config.grid, config.prefix, width, rngs=rngs)
        norm = NORMS["layernorm"]
        self.pre_norm = norm(width, eps=config.norm_eps) if config.pre_norm else None
        self.encoder = Stack(
            config.block,
            config.depth,
            remat=config.remat,
            drop_path=config.drop_path,
            unroll=config.unroll,
            rngs=rngs,
        )
        self.final_norm = norm(width, eps=config.norm_eps)
        self.pool = AttentionPool(config.block, rngs=rngs) if config.pooling == "map" else None
        self.head = (
            Linear(width, config.num_classes, kernel_init=ZEROS, rngs=rngs)
            if config.num_classes
            else None
        )

    def __call__(
        self,
        images: Float[Array, "b h w c"],
        *,
        rng: Key | None = None,
        features: Sequence[int] = (),
    ) -> ViTOutput:
        """See `ViTOutput`.

        Args:
          images: normalised pixels, of any size that is divisible into patches.
          rng: turns patch dropout and stochastic depth on.
          features: blocks whose outputs are wanted; -1 is the last, -2 the penultimate.

        Raises:
          ValueError: if the images have another number of channels or do not fit the patches, or
            a block of `features` does not exist.
        """
        patch_rng, path_rng = (None, None) if rng is None else jax.random.split(rng)
        x = self._embed(images.astype(self.config.dtype), patch_rng)
        x, outputs = self.encoder.run(x, features, rng=path_rng)
        x = self.final_norm(x)
        pooled = _POOL[self.config.pooling](self, x)
        logits = None if self.head is None else self.head(pooled.astype(jnp.float32))
        return ViTOutput(x, pooled, logits, outputs)

    def _embed(self, images: Float[Array, "b h w c"], rng: Key | None) -> Float[Array, "b n d"]:
        x = self.patch(images)
        prefix = self.config.prefix
        position = self.position(self.patch.grid(*images.shape[1:3])).astype(x.dtype)
        x = x + position[prefix:]
        if rng is not None and self.config.patch_dropout > 0:
            x = drop_patches(x, self.config.patch_dropout, rng)
        if self.class_token is not None:
            token = self.class_token[...].astype(x.dtype) + position[:prefix]
            token = jnp.broadcast_to(token, (x.shape[0], *token.shape))
            x = jnp.concatenate([token, x], axis=1)
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        return constrain(x, "batch", "tokens", "embed")


_POOL: dict[str, Callable[[ViT, Array], Array | None]] = {
    "cls": lambda vit, x: x[:, 0],
    "mean": lambda vit, x: jnp.mean(x, axis=1, dtype=jnp.float32).astype(x.dtype),
    "map": lambda vit, x: vit.pool(x),
    "none": lambda vit, x: None,
}
