"""What an image tokenizer is trained with: an encoder that compares images, and a discriminator.

Parameters are `tokenizer/...`, `perceptual/...` and `discriminator/...`: what is built on a trained
tokenizer takes it by a row of `config.init`, ("tokenizer/(.*)", RUN, r"tokenizer/\\1").
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from mmjax.losses import perceptual_distance
from mmjax.models.discriminator import Discriminator, DiscriminatorConfig
from mmjax.models.tokenizers import TokenizerConfig, make_tokenizer
from mmjax.models.vit import ViT, ViTConfig
from mmjax.models.vqgan import VQGANOutput
from mmjax.quantizers import Statistics
from mmjax.typing import Array, Float, Key


@dataclasses.dataclass(frozen=True)
class TokenizerTrainerConfig:
    """
    Attributes:
      tokenizer: what is trained.
      perceptual: an encoder of ours whose features say how alike images are. Rules freeze it, and
        its weights come through `config.init`. It must have learnt from images that are normalised
        like the tokenizer's; where its `image_size` is another, images are resized.
      blocks: of its blocks those whose outputs are compared; -1 is the last.
      discriminator: what tells real images from the tokenizer's, or None.
    """

    tokenizer: TokenizerConfig
    perceptual: ViTConfig | None = None
    blocks: tuple[int, ...] = ()
    discriminator: DiscriminatorConfig | None = None

    def __post_init__(self):
        if not self.tokenizer.decodes:
            raise ValueError("tokenizer.decodes=False: what makes no images cannot learn to.")
        if (self.perceptual is None) != (not self.blocks):
            raise ValueError(
                f"blocks={self.blocks} are those of `perceptual` that are compared: set both, or "
                "neither."
            )


class TokenizerTrainer(nnx.Module):
    """images [B, H, W, C] -> the tokenizer's `VQGANOutput`."""

    def __init__(self, config: TokenizerTrainerConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.tokenizer = make_tokenizer(config.tokenizer, rngs=rngs)
        self.perceptual = None if config.perceptual is None else ViT(config.perceptual, rngs=rngs)
        self.discriminator = (
            None if config.discriminator is None else Discriminator(config.discriminator, rngs=rngs)
        )

    def __call__(self, images: Float[Array, "b h w c"]) -> VQGANOutput:
        return self.tokenizer(images)

    @property
    def learnt(self) -> tuple[str, ...]:
        """Paths of the parameters that `update` changes; see `mmjax.quantizers.Quantizer`."""
        return tuple(f"tokenizer/{path}" for path in self.tokenizer.learnt)

    def update(self, statistics: Statistics | tuple[()], rng: Key) -> dict[str, Array]:
        """Their new values, from the statistics of a whole batch."""
        values = self.tokenizer.update(statistics, rng)
        return {f"tokenizer/{path}": value for path, value in values.items()}

    def distance(
        self, made: Float[Array, "b h w c"], images: Float[Array, "b h w c"]
    ) -> Float[Array, " b"]:
        """How unlike images look to the encoder; see `perceptual_distance`."""
        return perceptual_distance(*(self._features(x) for x in (made, images)))

    def judge(self, images: Float[Array, "b h w c"], *, learns: bool) -> Float[Array, "b i j"]:
        """The discriminator's scores.

        Args:
          learns: whether gradients reach the discriminator; else they reach the images alone.
        """
        if learns:
            return self.discriminator(jax.lax.stop_gradient(images))
        graphdef, state = nnx.split(self.discriminator)
        return nnx.merge(graphdef, jax.lax.stop_gradient(state))(images)

    def _features(self, images: Array) -> Array:
        config = self.config.perceptual
        size = (config.image_size,) * 2 if isinstance(config.image_size, int) else config.image_size
        if images.shape[1:3] != size:
            images = jax.image.resize(images, (len(images), *size, images.shape[-1]), "linear")
        features = self.perceptual(images, features=self.config.blocks).features
        return jnp.asarray(features)[:, :, config.prefix :]
