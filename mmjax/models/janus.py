"""Janus: a unified model that reads images as a VLM does, and draws them as codes.

Wu et al., "Janus: Decoupling Visual Encoding for Unified Multimodal Understanding and Generation"
(2024); Chen et al., "Janus-Pro" (2025). What an image shows and how it is drawn ask for different
encoders. One that is read is visual tokens, an encoder's through a connector; one that is drawn is
the ids of its codes, which have a table and a head of their own (`ApartConfig`). Both stand in one
stream, of one language model.

Each image of a row has slots, which `place` chooses from: first its visual tokens, then the ids of
its codes. So the same batches serve for reading and drawing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from mmjax.connectors import ConnectorConfig, make_connector
from mmjax.models.seeing import TEXT, Seeing, SeeingConfig
from mmjax.models.unified import Unified, UnifiedConfig
from mmjax.models.vit import ViT, ViTConfig
from mmjax.nn.partition import constrain
from mmjax.typing import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class JanusConfig(SeeingConfig, UnifiedConfig):
    """Everything that decides what Janus computes: `UnifiedConfig`, of the images that are drawn,
    and of those that are read:

    Attributes:
      encoder, connector, features, features_norm, class_token: as in `VLMConfig`. The encoder takes
        images as the tokenizer does, of the same size.
    """

    encoder: ViTConfig
    connector: ConnectorConfig
    features: tuple[int, ...] = (-1,)
    features_norm: bool = True
    class_token: bool = False
    name: str = dataclasses.field(default="janus", init=False)

    def __post_init__(self):
        super().__post_init__()
        self.check_features()
        if self.connector.frames != 1:
            raise ValueError(
                f"The connector {self.connector.name!r} reads clips of {self.connector.frames} "
                "images, but images that may be drawn stand alone: take another connector."
            )
        drawn = super(SeeingConfig, self).image_shape  # that of `UnifiedConfig`
        if self.image_shape != drawn:
            raise ValueError(
                f"The encoder takes images of {self.image_shape} (height, width, channels), "
                f"image.tokenizer of {drawn}: both are given the same, so set one image_size."
            )

    @property
    def places(self) -> int:
        """Slots of an image: its visual tokens, then the ids of its codes."""
        return self.image_tokens + self.image.length


class Janus(Seeing, Unified):
    """tokens [B, T], images [B, I, H, W, C] -> logits [B, T, V]. As `Unified`, but for `place`: it
    chooses from the slots of the row's images, `config.places` of each, one image after the other.
    The first `config.image_tokens` are its visual tokens, those after them the ids of its codes.
    With place=None visual tokens stand, in order, where tokens are `config.image_token`.
    """

    def __init__(self, config: JanusConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        width = config.feature_width
        self.encoder = ViT(config.encoder, rngs=rngs)
        self.connector = make_connector(config.connector, width, config.lm.width, rngs=rngs)

    def fill(
        self,
        tokens: Int[Array, "b t"],
        images: Float[Array, "b i h w c"] | None = None,
        mask: Bool[Array, "b t"] | None = None,
        place: Int[Array, "b t"] | None = None,
    ) -> Int[Array, "b t"]:
        """The stream with the ids of drawn images at their places, and `config.image_token` at
        those of read ones; see `Unified.fill`."""
        if images is None:
            return super().fill(tokens, mask=mask)
        read, drawn = self._divide(tokens, mask, place)
        return self._fill(tokens, images, mask, read, drawn)

    def _enter(
        self, tokens: Array, images: Array | None, mask: Array | None, place: Array | None
    ) -> tuple[Int[Array, "b t"], Int[Array, "b t"], Int[Array, "b t"], Float[Array, "b t e"]]:
        if images is None:
            return super()._enter(tokens, None, mask, place)
        read, drawn = self._divide(tokens, mask, place)
        tokens = self._fill(tokens, images, mask, read, drawn)
        here = read >= 0
        # `begin` stands before images that are read, too: no codes follow it there.
        words = jnp.where(jnp.pad(here[:, 1:], ((0, 0), (0, 1))), TEXT, tokens)
        follows, number = self._read(words, mask)
        # The placeholder need not be in the vocabulary.
        x = self._embed(jnp.where(here, 0, tokens), number)
        # A place beyond the visual tokens is NaN: under `jit` the only way to be noticed.
        visual = _where_needed(here, self.encode_images, images)
        found = jnp.take_along_axis(
            visual, jnp.maximum(read, 0)[:, :, None], axis=1, mode="fill", fill_value=jnp.nan
        )
        x = jnp.where(here[:, :, None], found.astype(x.dtype), x)
        return tokens, follows, number, constrain(x, "batch", "tokens", "embed")

    def _divide(
        self, tokens: Array, mask: Array | None, place: Array | None
    ) -> tuple[Int[Array, "b t"], Int[Array, "b t"] | None]:
        """Which of the row's visual tokens, and which of its images' ids, stands at each place;
        `TEXT` for none. None: there are no ids at all."""
        if place is None:
            return self._places(tokens, mask), None
        config = self.config
        number, slot = place // config.places, place % config.places
        code = slot - config.image_tokens
        read = jnp.where((place >= 0) & (code < 0), number * config.image_tokens + slot, TEXT)
        drawn = jnp.where((place >= 0) & (code >= 0), number * config.image.length + code, TEXT)
        return read, drawn

    def _fill(
        self, tokens: Array, images: Array, mask: Array | None, read: Array, drawn: Array | None
    ) -> Int[Array, "b t"]:
        tokens = super().fill(tokens, mask=mask)
        tokens = jnp.where(read >= 0, self.config.image_token, tokens)
        if drawn is None:
            return tokens
        ids = _where_needed(drawn >= 0, self.image_ids, images).reshape(images.shape[0], -1)
        found = jnp.take_along_axis(ids, jnp.maximum(drawn, 0), axis=1, mode="fill", fill_value=-1)
        return jnp.where(drawn >= 0, found, tokens)


def _where_needed(
    here: Bool[Array, "b t"], make: Callable[[Array], Array], images: Float[Array, "b i h w c"]
) -> Array:
    """`make(images)`, or zeros where nothing is `here`: a batch in which all images are read takes
    no time of the tokenizer, one in which all are drawn none of the encoder."""
    result = jax.eval_shape(make, images)
    return jax.lax.cond(
        jnp.any(here), make, lambda _: jnp.zeros(result.shape, result.dtype), images
    )
