"""One transformer over one stream of text tokens and image codes, in any order.

Chameleon Team, "Chameleon: Mixed-Modal Early-Fusion Foundation Models" (2024); Wang et al., "Emu3:
Next-Token Prediction is All You Need" (2024). An image tokenizer makes codes of an image; a code is
a token as a word is, read and predicted by the same language model. There is no connector.

A stream is text, then `begin`, the ids of an image's codes row by row, `end`, then text again:

    a  red  heart  <begin>  c0  c1  ...  c63  <end>  <eos>

The grammar of such streams says which tokens may follow each one, so that what is generated always
holds whole images.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmjax.models.lm import LM, Cache, LMConfig
from mmjax.models.seeing import TEXT, placeholders
from mmjax.models.tokenizers import TokenizerConfig, make_tokenizer
from mmjax.models.vlm import positions_of
from mmjax.models.vqgan import check_sides
from mmjax.nn import masks
from mmjax.nn.linear import Embedding, Linear
from mmjax.nn.mlp import ACTIVATIONS
from mmjax.nn.partition import constrain
from mmjax.registry import check_choice
from mmjax.typing import Array, Bool, Float, Int, Key

FOLLOW = ("grammar", "any", "never")

# What may follow a token: text and `begin`; `end`; the end of a row; else codes, CODES + d those of
# the d-th quantiser of a residual one.
WORDS, END, ROW, CODES = 0, 1, 2, 3
# Of a token: which of `Experts` it takes, and which modality's vector is added to it.
TEXT_KIND, IMAGE_KIND = 0, 1
KINDS = 2


@dataclasses.dataclass(frozen=True)
class CodesConfig:
    """The codes of one modality, and their places in the vocabulary.

    Attributes:
      tokenizer: makes codes of images, and images of codes.
      ids: the id of code 0, which the others follow; or the id of each code. Where a vector has
        several codes (residual quantisers), those of the second quantiser come after all of the
        first.
      begin, end: the ids before and after an image. `end` None: none follows (Janus).
      row: the id that ends each row of codes, or None (Emu3 has one).
      shape: rows and columns of codes of an image; those of `tokenizer.image_size` if None.
    """

    tokenizer: TokenizerConfig
    ids: int | tuple[int, ...]
    begin: int
    end: int | None
    row: int | None = None
    shape: tuple[int, int] | None = None

    def __post_init__(self):
        if not isinstance(self.ids, int) and len(self.ids) != self.size:
            raise ValueError(f"ids are {len(self.ids)}, but the tokenizer has {self.size} codes.")
        # Ids that follow each other are said by the first: equal configs compute the same.
        listed = not isinstance(self.ids, int)
        if listed and self.ids == tuple(range(self.ids[0], self.ids[0] + self.size)):
            object.__setattr__(self, "ids", self.ids[0])
        if self.shape == self._square:
            object.__setattr__(self, "shape", None)
        if min(self.grid) < 1:
            raise ValueError(f"shape={self.shape}: an image has a row of codes, and each a code.")

    @property
    def depth(self) -> int:
        """Codes of one place of the grid."""
        return int(np.prod(self.tokenizer.quantizer.shape, dtype=int))

    @property
    def size(self) -> int:
        """Number of different codes."""
        return self.tokenizer.quantizer.size * self.depth

    @property
    def all_ids(self) -> np.ndarray:
        """[size] int32, the id of each code."""
        if isinstance(self.ids, int):
            return np.arange(self.ids, self.ids + self.size, dtype=np.int32)
        return np.array(self.ids, np.int32)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes of an image."""
        return self._square if self.shape is None else self.shape

    @property
    def _square(self) -> tuple[int, int]:
        side = self.tokenizer.image_size // self.tokenizer.factor
        return side, side

    @property
    def row_length(self) -> int:
        """Ids of a row of codes, its end included."""
        return self.grid[1] * self.depth + (self.row is not None)

    @property
    def length(self) -> int:
        """Ids of an image, without `begin` and `end`."""
        return self.grid[0] * self.row_length

    @property
    def marks(self) -> tuple[int, ...]:
        """The ids around codes."""
        return tuple(one for one in (self.begin, self.end, self.row) if one is not None)


@dataclasses.dataclass(frozen=True)
class ApartConfig:
    """Tables of their own for the codes, so that the language model's stay as they are (Janus).

    Attributes:
      embed_width: of the codes' vectors; that of the language model if None.
      depth: linear maps between these and the language model, with the activation between them. A
        vector of another width needs at least one.
      hidden: width within them; that of the language model if None.
      head_hidden: width within the head of the codes; None: it is one linear map.
      activation: a name in `mmjax.nn.mlp.ACTIVATIONS`.
    """

    embed_width: int | None = None
    depth: int = 0
    hidden: int | None = None
    head_hidden: int | None = None
    activation: str = "gelu"


@dataclasses.dataclass(frozen=True)
class UnifiedConfig:
    """Everything that decides what a unified model computes.

    Attributes:
      lm: the language model. Its vocabulary is the whole one, unless codes are `apart`: then its
        own, and their ids begin with `lm.vocab_size`.
      image: the codes of images.
      image_token: the id that holds the places of an image's ids in a text.
      follow: which tokens can follow: "grammar": those that the grammar of streams allows, so that
        a code competes with codes only, and a word with words; "any": all; "never": no codes at all
        (what transformers does with Chameleon, which was published to read images only). The
        logits of others are the lowest number there is.
      apart: of the codes' tables and head; None: they are part of the language model's, one head
        for all.
      modality_embeddings: whether a learned vector is added to all codes, another to all text.
      grid_positions: whether learned vectors of its row and of its column are added to each code.
    """

    lm: LMConfig
    image: CodesConfig
    image_token: int
    follow: str = "grammar"
    apart: ApartConfig | None = None
    modality_embeddings: bool = False
    grid_positions: bool = False
    name: str = dataclasses.field(default="unified", init=False)

    def __post_init__(self):
        check_choice("follow", self.follow, FOLLOW)
        ids, marks, image = self.image.all_ids, self.image.marks, self.image
        if self.apart is not None and not np.array_equal(
            ids, np.arange(image.size) + self.lm.vocab_size
        ):
            raise ValueError(
                f"apart: the ids of codes must begin with lm.vocab_size={self.lm.vocab_size}, "
                f"but image.ids={image.ids}."
            )
        given = [*ids.tolist(), *marks]
        if min(given) < 0 or max(given) >= self.vocab_size:
            raise ValueError(
                f"The ids of image ({min(given)} to {max(given)}) are outside of a vocabulary of "
                f"{self.vocab_size} tokens: a language model that reads codes needs a token for "
                "each of them. Set lm.vocab_size."
            )
        if len(set(given)) < len(given):
            raise ValueError(
                f"image: begin={image.begin}, end={image.end}, row={image.row} and the ids of "
                "codes must all differ."
            )
        if self.lm.experts not in (1, KINDS):
            raise ValueError(
                f"lm.experts={self.lm.experts}: there is one MLP for all tokens (1), or one for "
                f"text and one for images ({KINDS})."
            )
        if self.lm.embed_width is not None:
            raise ValueError(
                f"lm.embed_width={self.lm.embed_width}: take a language model whose token table "
                "has the width of its blocks."
            )
        limit = self.lm.limit
        if limit is not None and image.length + len(marks) > limit:
            raise ValueError(
                f"lm.max_len={limit} has no room for an image of {image.length} ids: raise it, or "
                "take a tokenizer with fewer codes."
            )

    @property
    def vocab_size(self) -> int:
        """Of text and codes together."""
        return self.lm.vocab_size + (0 if self.apart is None else self.image.size)

    @property
    def limit(self) -> int | None:
        """The longest stream that the language model can take; None if there is no limit."""
        return self.lm.limit

    # As `VLMConfig` has them, for prompts with images.

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of an image."""
        (rows, columns), tokenizer = self.image.grid, self.image.tokenizer
        return rows * tokenizer.factor, columns * tokenizer.factor, tokenizer.channels

    @property
    def image_tokens(self) -> int:
        """Ids of an image between `begin` and `end`."""
        return self.image.length

    @property
    def places(self) -> int:
        """Numbers that `place` counts for each image."""
        return self.image_tokens

    @property
    def frames(self) -> int:
        return 1

    @property
    def newline(self) -> bool:
        return False


class UnifiedOutput(NamedTuple):
    """What a unified model computes.

    Attributes:
      logits: [B, T, V] float32.
      hidden: [B, T, E], what the logits are computed from.
      follows: [B, T], how many ids of an image come before what follows each token; -1: text does.
      tokens: [B, T], the stream with the ids of images at their places.
    """

    logits: Array
    hidden: Array
    follows: Array
    tokens: Array


class UnifiedCache(NamedTuple):
    """What decoding remembers: the language model's cache, and `UnifiedOutput.follows` of the last
    token, [B]."""

    lm: Cache
    follows: Array

    def select(self, rows: Int[Array, " n"]) -> UnifiedCache:
        """The cache of these texts, which may be repeated, in this order."""
        return UnifiedCache(self.lm.select(rows), self.follows[rows])


class Apart(nnx.Module):
    """The codes' own tables: of vectors, and of logits; see `ApartConfig`."""

    def __init__(self, config: ApartConfig, size: int, width: int, *, rngs: nnx.Rngs):
        embed_width = width if config.embed_width is None else config.embed_width
        hidden = width if config.hidden is None else config.hidden
        if embed_width != width and not config.depth:
            raise ValueError(
                f"apart.embed_width={embed_width} is not the language model's width {width}: set "
                "apart.depth to 1 or more."
            )
        init = nnx.initializers.normal(0.02)
        self.activation = ACTIVATIONS[config.activation]
        self.table = Embedding(size, embed_width, init=init, rngs=rngs)
        widths = [embed_width, *[hidden] * (config.depth - 1), width][: config.depth + 1]
        self.maps = nnx.List(
            Linear(inputs, outputs, rngs=rngs) for inputs, outputs in itertools.pairwise(widths)
        )
        last = width if config.head_hidden is None else config.head_hidden
        self.head_in = None if config.head_hidden is None else Linear(width, last, rngs=rngs)
        self.head = Linear(last, size, kernel_init=init, rngs=rngs)

    def embed(self, codes: Int[Array, "*b"], dtype: str) -> Float[Array, "*b e"]:
        x = self.table(codes).astype(dtype)
        for number, linear in enumerate(self.maps):
            x = linear(self.activation(x) if number else x)
        return x

    def logits(self, hidden: Float[Array, "*b e"]) -> Float[Array, "*b k"]:
        """float32"""
        if self.head_in is not None:
            hidden = self.activation(self.head_in(hidden))
        return self.head(hidden, jnp.float32)


class Unified(nnx.Module):
    """tokens [B, T], images [B, I, H, W, C] -> logits [B, T, V]. See `run`."""

    encoder_decoder = False
    takes_images = True

    def __init__(self, config: UnifiedConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, init = config.lm.width, nnx.initializers.normal(0.02)
        self.tokenizer = make_tokenizer(config.image.tokenizer, rngs=rngs)
        self.lm = LM(config.lm, rngs=rngs)
        self.apart = (
            None
            if config.apart is None
            else Apart(config.apart, config.image.size, width, rngs=rngs)
        )
        self.modality = (
            Embedding(KINDS, width, init=init, rngs=rngs) if config.modality_embeddings else None
        )
        rows, columns = config.image.grid[0], config.image.row_length
        grid = config.grid_positions
        self.row = Embedding(rows, width, init=init, rngs=rngs) if grid else None
        self.column = Embedding(columns, width, init=init, rngs=rngs) if grid else None

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        images: Float[Array, "b i h w c"] | None = None,
        mask: Bool[Array, "b t"] | None = None,
        *,
        place: Int[Array, "b t"] | None = None,
        segments: Int[Array, "b t"] | None = None,
    ) -> Float[Array, "b t v"]:
        """The logits of the token after each one; see `run`."""
        return self.run(tokens, images, mask, place=place, segments=segments).logits

    def run(
        self,
        tokens: Int[Array, "b t"],
        images: Float[Array, "b i h w c"] | None = None,
        mask: Bool[Array, "b t"] | None = None,
        *,
        place: Int[Array, "b t"] | None = None,
        segments: Int[Array, "b t"] | None = None,
        rng: Key | None = None,
    ) -> UnifiedOutput:
        """See `UnifiedOutput`.

        Args:
          tokens: the stream. The ids of an image may stand in it, or be made of `images`.
          images: normalised pixels, I images of each row.
          mask: True at tokens, False at padding; None for no padding.
          place: which id of the row's images stands at each position, counted over its images one
            after the other; -1 where the token itself does. None: they stand, in order, where
            tokens are `config.image_token`.
          segments: samples packed in a row, numbered from 1; 0 is padding. Replaces `mask`.
          rng: turns dropout on.

        Raises:
          ValueError: images whose sides do not make whole codes; a stream longer than the limit.
        """
        attention = positions = None
        if segments is not None:
            mask, positions = segments > 0, positions_of(segments)
            attention = masks.blocks(
                jnp.ones_like(mask), group=segments, window=self.config.lm.window
            )
        tokens, follows, number, embeddings = self._enter(tokens, images, mask, place)
        out = self.lm.run(
            embeddings=embeddings,
            mask=mask,
            attention=attention,
            positions=positions,
            rng=rng,
            **self._routes(number),
        )
        logits = self.logits(out.hidden, follows)
        return UnifiedOutput(logits, out.hidden, follows, tokens)

    def fill(
        self,
        tokens: Int[Array, "b t"],
        images: Float[Array, "b i h w c"] | None = None,
        mask: Bool[Array, "b t"] | None = None,
        place: Int[Array, "b t"] | None = None,
    ) -> Int[Array, "b t"]:
        """The stream with the ids of images at their places; see `run`. A place that no image fills
        is -1."""
        if mask is not None:
            tokens = jnp.where(mask, tokens, 0)
        if images is None:
            return tokens
        if place is None:
            place = placeholders(tokens, self.config.image_token, mask)
        ids = self.image_ids(images).reshape(images.shape[0], -1)
        found = jnp.take_along_axis(ids, jnp.maximum(place, 0), axis=1, mode="fill", fill_value=-1)
        return jnp.where(place >= 0, found, tokens)

    def image_ids(self, images: Float[Array, "b i h w c"]) -> Int[Array, "b i n"]:
        """The ids of the codes of each image, ends of rows included."""
        image = self.config.image
        codes = self.tokenizer.encode(images.reshape(-1, *images.shape[2:]))
        count, rows, columns, *_ = codes.shape
        codes = codes.reshape(count, rows, columns, image.depth)
        codes = codes + image.tokenizer.quantizer.size * jnp.arange(image.depth)
        ids = jnp.asarray(image.all_ids)[codes].reshape(count, rows, -1)
        if image.row is not None:
            ids = jnp.pad(ids, ((0, 0), (0, 0), (0, 1)), constant_values=image.row)
        return ids.reshape(*images.shape[:2], -1)

    def images_of(self, ids: Int[Array, "n l"]) -> Float[Array, "n h w c"]:
        """The images of whole rows of ids, as between `begin` and `end`; an id that is no code
        counts as code 0. Pixels are as those that the tokenizer was given, normalised.

        Raises:
          ValueError: it is another number of ids; the tokenizer cannot decode.
        """
        image = self.config.image
        if ids.shape[1] != image.length:
            raise ValueError(f"An image has {image.length} ids, not {ids.shape[1]}.")
        rows, columns = image.grid
        ids = ids.reshape(ids.shape[0], rows, image.row_length)[:, :, : columns * image.depth]
        codes = jnp.maximum(jnp.asarray(_tables(self.config).codes)[ids], 0)
        codes = codes % image.tokenizer.quantizer.size
        shape = image.tokenizer.quantizer.shape
        return self.tokenizer.decode(codes.reshape(ids.shape[0], rows, columns, *shape))

    def is_code(self, tokens: Int[Array, "*b"]) -> Bool[Array, "*b"]:
        """Whether these ids are codes."""
        return jnp.asarray(_tables(self.config).codes >= 0)[tokens]

    def logits(
        self, hidden: Float[Array, "*b e"], follows: Int[Array, "*b"] | None = None
    ) -> Float[Array, "*b v"]:
        """The output head, for `UnifiedOutput.hidden` or some of its vectors; float32.

        Args:
          follows: as in `UnifiedOutput`; where it is given, tokens that cannot follow have the
            lowest number there is.
        """
        logits = self.lm.logits(hidden)
        if self.apart is not None:
            logits = jnp.concatenate([logits, self.apart.logits(hidden)], axis=-1)
        if follows is None or self.config.follow == "any":
            return logits
        return jnp.where(self._allowed(follows), logits, jnp.finfo(jnp.float32).min)

    def prefill(
        self,
        tokens: Int[Array, "b t"],
        mask: Bool[Array, "b t"],
        *,
        length: int,
        images: Float[Array, "b i h w c"] | None = None,
        place: Int[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b v"], UnifiedCache]:
        """Read the prompts; see `LM.prefill`, and `run` for images and places."""
        _, follows, number, embeddings = self._enter(tokens, images, mask, place)
        hidden, cache = self.lm.prefill_hidden(
            None,
            mask,
            length=length,
            embeddings=embeddings,
            **self._routes(number),
        )
        follows = follows[:, -1]
        return self.logits(hidden, follows), UnifiedCache(cache, follows)

    def step(
        self, tokens: Int[Array, " b"], cache: UnifiedCache
    ) -> tuple[Float[Array, "b v"], UnifiedCache]:
        """Read one more token of each text; see `LM.step`."""
        image, before = self.config.image, cache.follows
        number = jnp.where((before >= 0) & (before < image.length), before, TEXT)
        follows = jnp.where(number >= 0, number + 1, TEXT)
        follows = jnp.where(tokens == image.begin, 0, follows)
        if image.end is None:
            follows = jnp.where(follows == image.length, TEXT, follows)
        hidden, lm = self.lm.step_hidden(
            None, cache.lm, embeddings=self._embed(tokens, number), **self._routes(number)
        )
        return self.logits(hidden, follows), UnifiedCache(lm, follows)

    def unstack(self) -> Unified:
        """A model for `step` alone; see `LM.unstack`."""
        result = copy.copy(self)
        result.lm = self.lm.unstack()
        return result

    def following(self, follow: str) -> Unified:
        """The same model with another `config.follow`; parameters are shared."""
        result = copy.copy(self)
        result.config = dataclasses.replace(self.config, follow=follow)
        return result

    def sized(self, height: int, width: int) -> Unified:
        """The same model for images of another size in pixels (Emu3); parameters are shared.

        Raises:
          ValueError: such images do not make whole codes, or are too long for the model; it has a
            vector for each row and column of its own size.
        """
        config, factor = self.config, self.config.image.tokenizer.factor
        check_sides((height, width), factor)
        if config.grid_positions:
            raise ValueError(
                f"grid_positions=True: this model knows images of {config.image.grid} codes only."
            )
        image = dataclasses.replace(config.image, shape=(height // factor, width // factor))
        result = copy.copy(self)
        result.config = dataclasses.replace(config, image=image)
        return result

    def _enter(
        self, tokens: Array, images: Array | None, mask: Array | None, place: Array | None
    ) -> tuple[Int[Array, "b t"], Int[Array, "b t"], Int[Array, "b t"], Float[Array, "b t e"]]:
        """The filled stream, both that `_read` says of it, and what the language model reads."""
        tokens = self.fill(tokens, images, mask, place)
        follows, number = self._read(tokens, mask)
        return tokens, follows, number, self._embed(tokens, number)

    def _read(
        self, tokens: Int[Array, "b t"], mask: Array | None
    ) -> tuple[Int[Array, "b t"], Int[Array, "b t"]]:
        """`UnifiedOutput.follows` of a stream, and which id of its image each token is; `TEXT` for
        text, `begin` and `end`."""
        image = self.config.image
        begins = tokens == image.begin
        begins = begins if mask is None else begins & mask
        index = jnp.arange(tokens.shape[1], dtype=jnp.int32)
        far = -image.length - 2
        since = index - jax.lax.cummax(jnp.where(begins, index, far), axis=1)
        number = jnp.where((since >= 1) & (since <= image.length), since - 1, TEXT)
        last = image.length - (image.end is None)
        return jnp.where(since <= last, since, TEXT), number

    def _embed(self, tokens: Int[Array, "*b"], number: Int[Array, "*b"]) -> Float[Array, "*b e"]:
        """What the language model reads."""
        if self.apart is None:
            x = self.lm.embed(tokens)
        else:
            first = self.config.lm.vocab_size
            is_code = tokens >= first
            codes = self.apart.embed(jnp.maximum(tokens - first, 0), self.config.lm.dtype)
            x = jnp.where(is_code[..., None], codes, self.lm.embed(jnp.where(is_code, 0, tokens)))
        inside = number >= 0
        if self.modality is not None:
            x = x + self.modality(inside.astype(jnp.int32)).astype(x.dtype)
        if self.row is not None:
            place, length = jnp.maximum(number, 0), self.config.image.row_length
            grid = self.row(place // length) + self.column(place % length)
            x = x + jnp.where(inside[..., None], grid, 0.0).astype(x.dtype)
        return constrain(x, "batch", "tokens", "embed") if x.ndim == 3 else x

    def _routes(self, number: Int[Array, "*b"]) -> dict[str, Array]:
        """The MLP of each token, where there are several."""
        if self.config.lm.experts == 1:
            return {}
        return {"expert": jnp.where(number >= 0, IMAGE_KIND, TEXT_KIND)}

    def _allowed(self, follows: Int[Array, "*b"]) -> Bool[Array, "*b v"]:
        image = self.config.image
        if self.config.follow == "never":
            allowed = jnp.asarray(_tables(self.config).codes < 0)
            return jnp.broadcast_to(allowed, (*follows.shape, self.config.vocab_size))
        column = follows % image.row_length
        kind = CODES + column % image.depth
        if image.row is not None:
            kind = jnp.where(column == image.row_length - 1, ROW, kind)
        kind = jnp.where(follows == image.length, END, kind)
        follow = jnp.asarray(_tables(self.config).follow)
        return follow[jnp.where(follows < 0, WORDS, kind)]


class _Tables(NamedTuple):
    """
    Attributes:
      codes: [V], the code of each id; -1 for those that are none.
      follow: [kinds, V], which tokens may follow; see `WORDS`.
    """

    codes: np.ndarray
    follow: np.ndarray


@functools.lru_cache(maxsize=16)
def _tables(config: UnifiedConfig) -> _Tables:
    image = config.image
    codes = np.full(config.vocab_size, -1, np.int32)
    codes[image.all_ids] = np.arange(image.size)
    follow = np.zeros((CODES + image.depth, config.vocab_size), bool)
    follow[WORDS] = codes < 0
    for kind, mark in ((END, image.end), (ROW, image.row)):
        if mark is not None:
            follow[WORDS, mark], follow[kind, mark] = False, True
    for depth in range(image.depth):
        follow[CODES + depth] = (codes >= 0) & (codes // image.tokenizer.quantizer.size == depth)
    return _Tables(codes, follow)
