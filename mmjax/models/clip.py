"""CLIP (Radford et al., 2021): an image tower and a text tower that share a space."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
from flax import nnx

from mmjax.models.contrastive import at_most, unit
from mmjax.models.text import TextConfig, TextTransformer
from mmjax.models.vit import ViT, ViTConfig
from mmjax.nn.linear import Linear
from mmjax.typing import Array, Bool, Float, Int, Key

MAX_SCALE = 100.0


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Two towers, and the width of the space that both are projected to.

    Attributes:
      image: the image tower; its pooling must not be "none".
      text: the text tower.
      embed_dim: width of the shared space.
      init_scale: what similarities are multiplied by at the start.
      max_scale: what they are multiplied by at most; None for no limit. OpenAI's CLIP had it in
        training, transformers has it nowhere.
    """

    image: ViTConfig
    text: TextConfig
    embed_dim: int
    init_scale: float = 1 / 0.07
    max_scale: float | None = MAX_SCALE

    def __post_init__(self):
        if self.image.pooling == "none":
            raise ValueError("CLIP needs one vector per image: image.pooling must not be 'none'.")
        limit = math.inf if self.max_scale is None else self.max_scale
        if not 0 < self.init_scale <= limit:
            raise ValueError(
                f"init_scale={self.init_scale} must be above 0 and at most max_scale={limit:g}."
            )


class CLIP(nnx.Module):
    """images, tokens -> logits [images, texts]; trained with a softmax loss."""

    def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.image = ViT(config.image, rngs=rngs)
        self.text = TextTransformer(config.text, rngs=rngs)
        self.image_projection = Linear(
            config.image.pooled_width, config.embed_dim, bias=False, rngs=rngs
        )
        self.text_projection = Linear(
            config.text.pooled_width, config.embed_dim, bias=False, rngs=rngs
        )
        self.logit_scale = nnx.Param(jnp.asarray(math.log(config.init_scale), jnp.float32))

    def encode_image(
        self, images: Float[Array, "b h w c"], *, rng: Key | None = None
    ) -> Float[Array, "b d"]:
        """Unit vectors, float32. `rng` turns the tower's dropouts on."""
        return unit(self.image_projection(self.image(images, rng=rng).pooled.astype(jnp.float32)))

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
        """What similarities are multiplied by, at most `max_scale`, and what is added: 0."""
        log_scale = self.logit_scale[...]
        if self.config.max_scale is not None:
            log_scale = at_most(log_scale, math.log(self.config.max_scale))
        return jnp.exp(log_scale), jnp.zeros((), jnp.float32)

    def __call__(
        self,
        images: Float[Array, "i h w c"],
        tokens: Int[Array, "t l"],
        mask: Bool[Array, "t l"] | None = None,
    ) -> Float[Array, "i t"]:
        scale, _ = self.scale_and_bias()
        return scale * self.encode_image(images) @ self.encode_text(tokens, mask).T
