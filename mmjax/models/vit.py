"""Vision transformer (Dosovitskiy et al., 2020): plain, of CLIP and SigLIP, and DINOv2."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mmjax.models.checks import check_dtype
from mmjax.models.projection import Projection, ProjectionConfig
from mmjax.nn.dropout import check_rate, drop_patches
from mmjax.nn.linear import ZEROS, Linear
from mmjax.nn.norm import NORMS
from mmjax.nn.partition import constrain
from mmjax.nn.patch import PARTIAL_PATCHES, PatchEmbed, patch_grid
from mmjax.nn.pooling import AttentionPool
from mmjax.nn.position import POSITIONS
from mmjax.nn.resample import RESAMPLERS
from mmjax.nn.stack import BlockConfig, Stack
from mmjax.registry import check_choice
from mmjax.typing import Array, Bool, Float, Key

POOLINGS = ("cls", "mean", "map", "none")
HEAD_INPUTS = ("pooled", "patches", "raw_patches", "cls_and_patches")


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Everything that decides what a ViT computes. `vit_size("S/16")` gives five of the fields.

    Attributes:
      image_size: pixels, one number or (height, width), that the positions are made for; images
        of other sizes are accepted at call time. (n, n) becomes n.
      patch_size: side of a patch in pixels.
      width, depth, heads, mlp_width: of the transformer.
      activation: a name in `mmjax.nn.mlp.ACTIVATIONS`. Checkpoints differ in it.
      norm_eps: of all layer norms. 1e-12 in ViT of transformers, 1e-5 in CLIP, 1e-6 in SigLIP and
        DINOv2.
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
      qkv_bias: whether queries, keys and values have biases.
      gated: the MLP has a gate: SwiGLU with activation "silu", as in DINOv2 giant.
      layer_scale: a learned factor for each channel of what a block adds, as in DINOv2.
      registers: further tokens, without a position, after the class token (Darcet et al., 2023).
      mask_token: a learned token for the patches that a call hides (`masked`); DINOv2 keeps it.
      interpolation: how positions are resampled; a name in `mmjax.nn.resample.RESAMPLERS`.
      projection: what the pooled vector goes through, or None.
      head_input: what the classification head sees: "pooled", the mean of the "patches" after the
        final norm (SigLIP) or before it ("raw_patches", CLIP), or the class token beside that
        mean ("cls_and_patches", DINOv2).
      qk_norm_eps: of the layer norms of queries and keys over each head's width (Dehghani et al.,
        2023; Janus has the option); None: there are none.
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
    qkv_bias: bool = True
    gated: bool = False
    layer_scale: bool = False
    registers: int = 0
    mask_token: bool = False
    interpolation: str = "bicubic"
    projection: ProjectionConfig | None = None
    head_input: str = "pooled"
    qk_norm_eps: float | None = None

    def __post_init__(self):
        if not isinstance(self.image_size, int):  # a list would make the config unhashable
            height, width = self.image_size
            size = height if height == width else (height, width)
            object.__setattr__(self, "image_size", size)
        check_choice("pooling", self.pooling, POOLINGS)
        check_choice("head_input", self.head_input, HEAD_INPUTS)
        check_choice("interpolation", self.interpolation, RESAMPLERS)
        check_choice("partial_patches", self.partial_patches, PARTIAL_PATCHES)
        check_dtype(self.dtype)
        check_rate("patch_dropout", self.patch_dropout)
        if self.pooling == "none" and self.num_classes and self.head_input == "pooled":
            raise ValueError(
                f"num_classes={self.num_classes} needs something to classify: set pooling to "
                "'cls', 'mean' or 'map', or head_input to 'patches'."
            )
        if self.pooling == "none" and self.projection is not None:
            raise ValueError("A projection needs a pooled vector: pooling is 'none'.")
        if self.pooling != "cls" and (self.registers or self.head_input == "cls_and_patches"):
            raise ValueError(
                f"registers={self.registers} and head_input={self.head_input!r} need a class "
                f"token: pooling must be 'cls', not {self.pooling!r}."
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
        """Number of tokens before those of the patches: the class token and the registers."""
        return self.class_tokens + self.registers

    @property
    def class_tokens(self) -> int:
        return 1 if self.pooling == "cls" else 0

    @property
    def pooled_width(self) -> int:
        return self.width if self.projection is None else self.projection.width

    @property
    def head_width(self) -> int:
        """Width of what the classification head sees."""
        widths = {"pooled": self.pooled_width, "cls_and_patches": 2 * self.width}
        return widths.get(self.head_input, self.width)

    @property
    def block(self) -> BlockConfig:
        return BlockConfig(
            width=self.width,
            heads=self.heads,
            mlp_width=self.mlp_width,
            activation=self.activation,
            norm="layernorm",
            norm_eps=self.norm_eps,
            qkv_bias=self.qkv_bias,
            gated=self.gated,
            layer_scale=self.layer_scale,
            qk_norm=None if self.qk_norm_eps is None else "layernorm",
            qk_norm_eps=self.qk_norm_eps,
        )


class ViTOutput(NamedTuple):
    """What a ViT returns.

    Attributes:
      tokens: [B, N, D] after the final norm: the class token and the registers where there are any
        (`config.prefix` of them), then the patches row by row.
      pooled: [B, D] ([B, projection.width] where there is a projection), or None where pooling is
        "none".
      logits: [B, num_classes] float32, or None without a head.
      features: [F, B, N, D], outputs of the blocks asked for, before any final norm, or None.
        `vit.final_norm(features)` is what DINOv2 calls its intermediate layers.
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
        self.class_token = nnx.Param(jnp.zeros((1, width))) if config.class_tokens else None
        # As big as positions are: registers that start alike would stay alike.
        init = nnx.initializers.normal(0.02)
        self.registers = (
            nnx.Param(init(rngs.params(), (config.registers, width), jnp.float32))
            if config.registers
            else None
        )
        self.mask_token = nnx.Param(jnp.zeros((1, width))) if config.mask_token else None
        self.position = POSITIONS[config.position](
            config.grid, config.class_tokens, width, method=config.interpolation, rngs=rngs
        )
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
        self.projection = (
            None if config.projection is None else Projection(width, config.projection, rngs=rngs)
        )
        self.head = (
            Linear(config.head_width, config.num_classes, kernel_init=ZEROS, rngs=rngs)
            if config.num_classes
            else None
        )

    def __call__(
        self,
        images: Float[Array, "b h w c"],
        *,
        masked: Bool[Array, "b p"] | None = None,
        rng: Key | None = None,
        features: Sequence[int] = (),
    ) -> ViTOutput:
        """See `ViTOutput`.

        Args:
          images: normalised pixels, of any size that is divisible into patches.
          masked: patches, row by row, that the mask token replaces.
          rng: turns patch dropout and stochastic depth on.
          features: blocks whose outputs are wanted; -1 is the last, -2 the penultimate.

        Raises:
          ValueError: if the images have another number of channels or do not fit the patches,
            `masked` is given to a model without a mask token, or a block of `features` does not
            exist.
        """
        patch_rng, path_rng = (None, None) if rng is None else jax.random.split(rng)
        x = self._embed(images.astype(self.config.dtype), masked, patch_rng)
        raw, outputs = self.encoder.run(x, features, rng=path_rng)
        x = self.final_norm(raw)
        pooled = _POOL[self.config.pooling](self, x)
        if self.projection is not None:
            pooled = self.projection(pooled)
        logits = None
        if self.head is not None:
            seen = _HEAD_INPUT[self.config.head_input](self.config.prefix, raw, x, pooled)
            logits = self.head(seen.astype(jnp.float32))
        return ViTOutput(x, pooled, logits, outputs)

    def _embed(
        self, images: Float[Array, "b h w c"], masked: Bool[Array, "b p"] | None, rng: Key | None
    ) -> Float[Array, "b n d"]:
        x = self.patch(images)
        if masked is not None:
            if self.mask_token is None:
                raise ValueError("`masked` needs a mask token: set mask_token=True in the config.")
            x = jnp.where(masked[:, :, None], self.mask_token[...].astype(x.dtype), x)
        first = self.config.class_tokens
        position = self.position(self.patch.grid(*images.shape[1:3])).astype(x.dtype)
        x = x + position[first:]
        if rng is not None and self.config.patch_dropout > 0:
            x = drop_patches(x, self.config.patch_dropout, rng)
        before = []
        if self.class_token is not None:
            before.append(self.class_token[...].astype(x.dtype) + position[:first])
        if self.registers is not None:
            before.append(self.registers[...].astype(x.dtype))
        before = [jnp.broadcast_to(token, (x.shape[0], *token.shape)) for token in before]
        x = jnp.concatenate([*before, x], axis=1)
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        return constrain(x, "batch", "tokens", "embed")


def mean(x: Float[Array, "b n d"]) -> Float[Array, "b d"]:
    """The mean of the tokens, added in float32."""
    return jnp.mean(x, axis=1, dtype=jnp.float32).astype(x.dtype)


_POOL: dict[str, Callable[[ViT, Array], Array | None]] = {
    "cls": lambda vit, x: x[:, 0],
    "mean": lambda vit, x: mean(x),
    "map": lambda vit, x: vit.pool(x),
    "none": lambda vit, x: None,
}

# (tokens before the patches, tokens before and after the final norm, pooled) -> [B, head_width]
_HEAD_INPUT: dict[str, Callable[[int, Array, Array, Array | None], Array]] = {
    "pooled": lambda prefix, raw, x, pooled: pooled,
    "patches": lambda prefix, raw, x, pooled: mean(x[:, prefix:]),
    "raw_patches": lambda prefix, raw, x, pooled: mean(raw[:, prefix:]),
    "cls_and_patches": lambda prefix, raw, x, pooled: jnp.concatenate(
        [x[:, 0], mean(x[:, prefix:])], axis=1
    ),
}
