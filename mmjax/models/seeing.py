"""What models that read images through an encoder and a connector have in common."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from mmjax.connectors import Connector, ConnectorConfig, Grid
from mmjax.models.vit import ViT, ViTConfig
from mmjax.typing import Array, Bool, Float, Int

# What `place` says of a position that is no visual token's.
TEXT, NEWLINE = -1, -2


def placeholders(
    tokens: Int[Array, "b t"], image_token: int, mask: Bool[Array, "b t"] | None
) -> Int[Array, "b t"]:
    """`place` where what images become stands, in order, in the places of this token."""
    here = tokens == image_token
    here = here if mask is None else here & mask
    return jnp.where(here, jnp.cumsum(here, axis=1, dtype=jnp.int32) - 1, TEXT)


class SeeingConfig:
    """Of configs with the fields `encoder`, `connector`, `features` and `class_token`, of which
    `VLMConfig` says what they mean."""

    encoder: ViTConfig
    connector: ConnectorConfig
    features: tuple[int, ...]
    class_token: bool

    def check_features(self) -> None:
        """
        Raises:
          ValueError: if `features` are no blocks of the encoder, or the connector does not fit.
        """
        if not self.features:
            raise ValueError("features=() names no block of the encoder to read: give (-2,).")
        for block in self.features:
            if not -self.encoder.depth <= block < self.encoder.depth:
                raise ValueError(
                    f"features={self.features}: there is no block {block} in an encoder of "
                    f"depth={self.encoder.depth}."
                )
        _ = self.image_tokens  # raises where the connector does not fit

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of an image."""
        size = self.encoder.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return height, width, self.encoder.channels

    @property
    def frames(self) -> int:
        """Images that are read together, a clip; 1 where each is read by itself."""
        return self.connector.frames

    @property
    def feature_width(self) -> int:
        """Of what the connector reads."""
        return self.encoder.width * len(self.features)

    @property
    def extra(self) -> int:
        """Features of an image beside those of its patches."""
        return self.encoder.prefix if self.class_token else 0

    @property
    def image_tokens(self) -> int:
        """Visual tokens of an image, or of a clip where the connector reads several."""
        return self.connector.tokens(self.encoder.grid, self.extra)

    @property
    def places(self) -> int:
        """Numbers that `place` counts for each image, or clip."""
        return self.image_tokens


class Seeing(nnx.Module):
    """Of models with `config`, a `SeeingConfig`, `encoder` and `connector`."""

    config: SeeingConfig
    encoder: ViT
    connector: Connector

    def encode_images(
        self,
        images: Float[Array, "b i h w c"],
        *,
        text: Int[Array, "n l"] | None = None,
        text_mask: Bool[Array, "n l"] | None = None,
    ) -> Float[Array, "b m d"]:
        """The visual tokens of each row, those of its images one after the other."""
        features, grid = self._clips(images)
        given = {}
        if text is not None:
            if not self.connector.reads_text:
                raise ValueError(
                    f"The connector {self.config.connector.name!r} reads no text: leave `text` out."
                )
            given = {"text": text, "text_mask": text_mask}
        tokens, _ = self.connector(features, None, grid, **given)
        return tokens.reshape(images.shape[0], -1, tokens.shape[-1])

    def name_images(self, images: Float[Array, "b i h w c"]) -> Float[Array, "b m v"]:
        """The logarithm of the share that each entry of the vocabulary has in each visual token;
        see `Connector.name`."""
        features, grid = self._clips(images)
        shares = self.connector.name(features, None, grid)
        return shares.reshape(images.shape[0], -1, shares.shape[-1])

    def features(self, images: Float[Array, "n h w c"]) -> Float[Array, "n p d"]:
        """What the connector reads of each image."""
        config = self.config
        out = self.encoder(images, features=config.features)
        layers = self.encoder.final_norm(out.features) if config.features_norm else out.features
        layers = layers[:, :, config.encoder.prefix - config.extra :]
        return layers[0] if len(layers) == 1 else jnp.concatenate(list(layers), axis=-1)

    def _clips(self, images: Array) -> tuple[Float[Array, "n p d"], Grid]:
        """What the connector reads of each clip, and the grid of an image's patches."""
        frames = self.config.connector.frames
        batch, count, *size = images.shape
        if count % frames:
            raise ValueError(
                f"The connector reads clips of {frames} images, but rows have {count}: give each "
                f"a multiple of {frames}."
            )
        features = self.features(images.reshape(batch * count, *size))
        features = features.reshape(batch * count // frames, -1, features.shape[-1])
        return features, self.encoder.patch.grid(*size[:2])

    def _places(self, tokens: Array, mask: Array | None) -> Int[Array, "b t"]:
        return placeholders(tokens, self.config.image_token, mask)
