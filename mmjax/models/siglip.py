"""SigLIP (Zhai et al., 2023): two towers trained with a sigmoid loss on each pair.

SigLIP 2 (Tschannen et al., 2025) of a fixed resolution is the same model; NaFlex has another image
tower.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
from flax import nnx

from mmjax.models.contrastive import unit
from mmjax.models.naflex import NaFlexConfig, NaFlexViT
from mmjax.models.text import TextConfig, TextTransformer
from mmjax.models.vit import ViT, ViTConfig
from mmjax.nn.linear import Linear
from mmjax.patches import Patches
from mmjax.typing import Array, Bool, Float, Int, Key


@dataclasses.dataclass(frozen=True)
class SigLIPConfig:
    """Two towers; the shared space is that of the pooled image, which has no projection.

    Attributes:
      image: the image tower; its pooling ("map" in the paper) must not be "none".
      text: the text tower.
      init_scale, init_bias: of the logits at the start: 10 and -10 in the paper.
    """

    image: ViTConfig
    text: TextConfig
    init_scale: float = 10.0
    init_bias: float = -10.0

    def __post_init__(self):
        if self.image.pooling == "none":
            raise ValueError("SigLIP needs one vector per image: image.pooling is 'none'.")
        if self.init_scale <= 0:
            raise ValueError(f"init_scale={self.init_scale} must be above 0.")

    @property
    def embed_dim(self) -> int:
        """Width of the shared space."""
        return self.image.pooled_width


@dataclasses.dataclass(frozen=True)
class NaFlexSigLIPConfig(SigLIPConfig):
    """The same with an image tower for images of any shape."""

    image: NaFlexConfig


class SigLIP(nnx.Module):
    """images, tokens -> logits [images, texts]."""

    image_tower: type[nnx.Module] = ViT

    def __init__(self, config: SigLIPConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.image = self.image_tower(config.image, rngs=rngs)
        self.text = TextTransformer(config.text, rngs=rngs)
        self.text_projection = Linear(config.text.pooled_width, config.embed_dim, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.asarray(math.log(config.init_scale), jnp.float32))
        self.logit_bias = nnx.Param(jnp.asarray(config.init_bias, jnp.float32))

    def encode_image(
        self, images: Float[Array, "b h w c"] | Patches, *, rng: Key | None = None
    ) -> Float[Array, "b d"]:
        """Unit vectors, float32. `rng` turns the tower's dropouts on."""
        return unit(self.image(images, rng=rng).pooled)

    def encode_text(
        self,
        tokens: Int[Array, "b t"],
        mask: Bool[Array, "b t"] | None = None,
        *,
        rng: Key | None = None,
    ) -> Float[Array, "b d"]:
        """Unit vectors, float32. `mask`: True at tokens, False at padding."""
        pooled = self.text(tokens, mask, rng=rng).pooled
        return unit(self.text_projection(pooled.astype(jnp.float32)))

    def scale_and_bias(self) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """What similarities are multiplied by, and what is then added to them."""
        return jnp.exp(self.logit_scale[...]), self.logit_bias[...]

    def __call__(
        self,
        images: Float[Array, "i h w c"] | Patches,
        tokens: Int[Array, "t l"],
        mask: Bool[Array, "t l"] | None = None,
    ) -> Float[Array, "i t"]:
        scale, bias = self.scale_and_bias()
        return scale * self.encode_image(images) @ self.encode_text(tokens, mask).T + bias


class NaFlexSigLIP(SigLIP):
    """`Patches`, tokens -> logits [images, texts]: SigLIP 2 NaFlex."""

    image_tower = NaFlexViT
