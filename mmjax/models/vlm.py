"""Vision-language models: an image encoder, a connector and a language model, any of each.

Visual tokens take their places in the stream of text ("prefix" fusing), as in LLaVA, PaliGemma,
BLIP-2 and Idefics3. Where they go is said by a token id, or by an array of places: which visual
token stands where. Places are plain indices, so that tiles of an image of any shape, several images
anywhere in a text, and several samples packed into one row need nothing else of the model.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mmjax.connectors import ConnectorConfig, make_connector
from mmjax.models.lm import LM, Cache, LMConfig
from mmjax.models.seeing import NEWLINE, TEXT, Seeing, SeeingConfig
from mmjax.models.t5 import T5, T5Cache, T5Config
from mmjax.models.vit import ViT, ViTConfig
from mmjax.nn import masks
from mmjax.nn.partition import constrain
from mmjax.registry import check_choice
from mmjax.typing import Array, Bool, Float, Int

ATTENTIONS = ("causal", "prefix", "image_blocks")


@dataclasses.dataclass(frozen=True)
class VLMConfig(SeeingConfig):
    """Everything that decides what a vision-language model computes.

    Attributes:
      encoder: of the images. Its pooling and head are not used: "cls" (the class token exists) or
        "none" are what to give.
      connector: one of `mmjax.connectors`, chosen by its `name`.
      lm: the language model, of `LMConfig`.
      image_token: the id that holds the places of visual tokens in a text.
      features: blocks of the encoder whose outputs are read, from 0, or from -1 backwards; those of
        several are concatenated. -2, the penultimate, in LLaVA.
      features_norm: whether the encoder's final norm is applied to them (PaliGemma, BLIP-2,
        Idefics3) or not (LLaVA).
      class_token: whether the class token and registers are features too (BLIP-2), or the patches
        only.
      attention: "causal"; "prefix": the tokens of a prefix see each other (PaliGemma);
        "image_blocks": the tokens of an image see each other (Gemma 3).
      newline: whether there is a learned token that ends each row of an image's visual tokens
        (LLaVA-NeXT).
    """

    encoder: ViTConfig
    connector: ConnectorConfig
    lm: LMConfig
    image_token: int
    features: tuple[int, ...] = (-2,)
    features_norm: bool = False
    class_token: bool = False
    attention: str = "causal"
    newline: bool = False
    name: str = dataclasses.field(default="vlm", init=False)

    def __post_init__(self):
        check_choice("attention", self.attention, ATTENTIONS)
        if isinstance(self.lm, LMConfig) and self.lm.embed_width is not None:
            raise ValueError(
                f"lm.embed_width={self.lm.embed_width} is not the width {self.lm.width} of visual "
                "tokens: take a language model whose token table has the width of its blocks."
            )
        self.check_features()

    @property
    def limit(self) -> int | None:
        """The longest stream that the language model can take; None if there is no limit."""
        return self.lm.limit

    @property
    def vocab_size(self) -> int:
        return self.lm.vocab_size

    @property
    def visual_width(self) -> int:
        """Of visual tokens."""
        return self.lm.width


@dataclasses.dataclass(frozen=True)
class Seq2SeqVLMConfig(VLMConfig):
    """The same with an encoder-decoder: visual tokens and the prompt go to its encoder."""

    lm: T5Config
    name: str = dataclasses.field(default="seq2seq_vlm", init=False)

    @property
    def decoder_start_id(self) -> int:
        return self.lm.decoder_start_id


class VLMOutput(NamedTuple):
    """What a vision-language model computes.

    Attributes:
      logits: [B, T, V] float32.
      hidden: [B, T, E], what the logits are computed from.
    """

    logits: Array
    hidden: Array


class Packing(NamedTuple):
    """Several samples in a row; see `VLM.run`. None: there is one in each."""

    segments: Array | None = None
    parents: Array | None = None
    positions: Array | None = None


class VLM(Seeing):
    """tokens [B, T], images [B, I, H, W, C] -> logits [B, T, V]. See `run`."""

    encoder_decoder = False
    takes_images = True
    language_model: type[nnx.Module] = LM

    def __init__(self, config: VLMConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = ViT(config.encoder, rngs=rngs)
        width = config.feature_width
        self.connector = make_connector(config.connector, width, config.lm.width, rngs=rngs)
        init, width = nnx.initializers.normal(config.lm.width**-0.5), config.lm.width
        self.newline = (
            nnx.Param(init(rngs.params(), (width,), jnp.float32)) if config.newline else None
        )
        self.lm = self.language_model(config.lm, rngs=rngs)

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        images: Float[Array, "b i h w c"] | None = None,
        mask: Bool[Array, "b t"] | None = None,
        **options: Any,
    ) -> Float[Array, "b t v"]:
        """The logits of the token after each one; see `run`."""
        return self.run(tokens, images, mask, **options).logits

    def run(
        self,
        tokens: Int[Array, "b t"],
        images: Float[Array, "b i h w c"] | None = None,
        mask: Bool[Array, "b t"] | None = None,
        *,
        place: Int[Array, "b t"] | None = None,
        segments: Int[Array, "b t"] | None = None,
        parents: Int[Array, "b t"] | None = None,
        prefix: Bool[Array, "b t"] | None = None,
        text: Int[Array, "n l"] | None = None,
        text_mask: Bool[Array, "n l"] | None = None,
    ) -> VLMOutput:
        """See `VLMOutput`.

        Args:
          tokens: the stream; what stands where visual tokens go does not count.
          images: normalised pixels, I images (tiles, frames) of each row.
          mask: True at tokens, visual ones included, False at padding; None for no padding.
          place: which visual token of the row stands at each position, counted over its images one
            after the other; `TEXT` for text, `NEWLINE` for the learned newline. None: they stand,
            in order, where tokens are `config.image_token`.
          segments: samples packed in a row, numbered from 1; 0 is padding. Replaces `mask`.
          parents: of each token's segment the one that it continues, 0 for none: several questions
            about an image, each a segment, share the segment of the image.
          prefix: tokens that see each other, where attention is "prefix"; None: all of them.
          text, text_mask: the questions, for connectors that read them, one for each image or clip.

        Raises:
          ValueError: if there are neither images nor visual tokens given to fill places, or an
            option does not fit the model.
        """
        embeddings, place = self._embed(tokens, images, mask, place, text, text_mask)
        positions = None
        if segments is not None:
            mask, positions = segments > 0, positions_of(segments, parents)
        elif parents is not None:
            raise ValueError("parents are those of segments: give both.")
        packing = Packing(segments, parents, positions)
        out = self.lm.run(
            embeddings=embeddings,
            mask=mask,
            attention=self._attention(tokens.shape[1], mask, packing, prefix, place),
            positions=positions,
        )
        return VLMOutput(out.logits, out.hidden)

    def logits(self, hidden: Float[Array, "*b e"]) -> Float[Array, "*b v"]:
        """The output head, for `VLMOutput.hidden` or some of its vectors; float32."""
        return self.lm.logits(hidden)

    def prefill(
        self,
        tokens: Int[Array, "b t"],
        mask: Bool[Array, "b t"],
        *,
        length: int,
        images: Float[Array, "b i h w c"] | None = None,
        place: Int[Array, "b t"] | None = None,
        text: Int[Array, "n l"] | None = None,
        text_mask: Bool[Array, "n l"] | None = None,
    ) -> tuple[Float[Array, "b v"], Cache | T5Cache]:
        """Read the prompts; see `LM.prefill`, and `run` for images and what goes with them."""
        embeddings, place = self._embed(tokens, images, mask, place, text, text_mask)
        attention = self._attention(tokens.shape[1], mask, Packing(), None, place)
        return self.lm.prefill(
            None, mask, length=length, embeddings=embeddings, attention=attention
        )

    def step(
        self, tokens: Int[Array, " b"], cache: Cache | T5Cache
    ) -> tuple[Float[Array, "b v"], Cache | T5Cache]:
        """Read one more token of each text; see `LM.step`."""
        return self.lm.step(tokens, cache)

    def unstack(self) -> VLM:
        """A model for `step` alone; see `LM.unstack`."""
        result = copy.copy(self)
        result.lm = self.lm.unstack()
        return result

    def _embed(
        self,
        tokens: Array,
        images: Array | None,
        mask: Array | None,
        place: Array | None,
        text: Array | None,
        text_mask: Array | None,
    ) -> tuple[Float[Array, "b t d"], Int[Array, "b t"] | None]:
        """What the language model reads, and which visual token stands where."""
        if images is None:
            return self._embed_text(tokens, mask), None
        visual = self.encode_images(images, text=text, text_mask=text_mask)
        place = self._places(tokens, mask) if place is None else place
        # The placeholder need not be in the vocabulary of the language model.
        words = self._embed_text(jnp.where(place == TEXT, tokens, 0), mask)
        # A place beyond the visual tokens is NaN: under `jit` the only way to be noticed.
        found = jnp.take_along_axis(
            visual, jnp.maximum(place, 0)[:, :, None], axis=1, mode="fill", fill_value=jnp.nan
        ).astype(words.dtype)
        embeddings = jnp.where((place >= 0)[:, :, None], found, words)
        if self.newline is not None:
            newline = self.newline[...].astype(words.dtype)
            embeddings = jnp.where((place == NEWLINE)[:, :, None], newline, embeddings)
        return constrain(embeddings, "batch", "tokens", "embed"), place

    def _embed_text(self, tokens: Array, mask: Array | None) -> Float[Array, "b t d"]:
        # Whatever stands at padding, -1 for instance, must not become a vector of NaN.
        return self.lm.embed(tokens if mask is None else jnp.where(mask, tokens, 0))

    def _attention(
        self,
        length: int,
        mask: Array | None,
        packing: Packing,
        prefix: Array | None,
        place: Array | None,
    ) -> masks.Mask | None:
        """Who sees whom; None: each token itself and what is before it."""
        kind, window = self.config.attention, self.config.lm.window
        if prefix is not None and kind != "prefix":
            raise ValueError(f"A prefix has no meaning where attention is {kind!r}.")
        segments = packing.segments
        group = mask if segments is None else segments
        if kind == "causal" and segments is None:
            return None
        if kind == "image_blocks" and place is None:
            kind = "causal"
        if group is None:
            group = jnp.ones((1, length), bool)
        options = dict(
            group=group, window=window, parent=packing.parents, positions=packing.positions
        )
        if kind == "causal":
            return masks.blocks(jnp.ones_like(group, bool), **options)
        if kind == "prefix":
            prefix = jnp.ones_like(group, bool) if prefix is None else prefix
            return masks.prefix_lm(prefix, **options)
        per_image = self.config.image_tokens
        image = jnp.where(place >= 0, place // per_image + 1, 0)
        return masks.image_blocks(image, **options)


class Seq2SeqVLM(VLM):
    """tokens, images, decoder_tokens -> logits [B, U, V] of the decoder."""

    encoder_decoder = True
    language_model = T5

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        images: Float[Array, "b i h w c"] | None = None,
        mask: Bool[Array, "b t"] | None = None,
        *,
        decoder_tokens: Int[Array, "b u"],
        decoder_mask: Bool[Array, "b u"] | None = None,
        **options: Any,
    ) -> Float[Array, "b u v"]:
        """Logits of the token after each of the decoder's; see `run`."""
        out = self.run(
            tokens,
            images,
            mask,
            decoder_tokens=decoder_tokens,
            decoder_mask=decoder_mask,
            **options,
        )
        return out.logits

    def run(
        self,
        tokens: Int[Array, "b t"],
        images: Float[Array, "b i h w c"] | None = None,
        mask: Bool[Array, "b t"] | None = None,
        *,
        decoder_tokens: Int[Array, "b u"],
        decoder_mask: Bool[Array, "b u"] | None = None,
        place: Int[Array, "b t"] | None = None,
        text: Int[Array, "n l"] | None = None,
        text_mask: Bool[Array, "n l"] | None = None,
    ) -> VLMOutput:
        """`VLMOutput` of the decoder. What is not said here is said of `VLM.run`.

        Args:
          decoder_tokens: they begin with the language model's `decoder_start_id`.
          mask, decoder_mask: True at tokens, False at padding.
        """
        embeddings, _ = self._embed(tokens, images, mask, place, text, text_mask)
        encoded, _ = self.lm.encode(None, mask, embeddings=embeddings)
        hidden, _ = self.lm.decode(encoded, decoder_tokens, mask, decoder_mask)
        return VLMOutput(self.lm.logits(hidden), hidden)

    def prefill(
        self,
        tokens: Int[Array, "b t"],
        mask: Bool[Array, "b t"],
        *,
        length: int,
        images: Float[Array, "b i h w c"] | None = None,
        place: Int[Array, "b t"] | None = None,
        text: Int[Array, "n l"] | None = None,
        text_mask: Bool[Array, "n l"] | None = None,
    ) -> tuple[Float[Array, "b v"], T5Cache]:
        """Runs the encoder, and the decoder on its start token; see `T5.prefill`."""
        embeddings, _ = self._embed(tokens, images, mask, place, text, text_mask)
        return self.lm.prefill(None, mask, length=length, embeddings=embeddings)


def positions_of(
    segments: Int[Array, "b t"], parents: Int[Array, "b t"] | None = None
) -> Int[Array, "b t"]:
    """The place of each token in its own sample, of several packed in a row.

    Args:
      segments, parents: see `VLM.run`. What continues a parent is counted from its end.
    """
    index = jnp.arange(segments.shape[1], dtype=jnp.int32)[None]
    before = jnp.pad(segments[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    starts = jnp.where(segments != before, index, 0)
    positions = index - jax.lax.cummax(starts, axis=1)
    if parents is None:
        return positions
    of_parent = (parents[:, :, None] == segments[:, None, :]) & (segments[:, None, :] > 0)
    return positions + jnp.sum(of_parent, axis=2, dtype=jnp.int32)
