"""Flamingo: a language model that looks at images between its blocks ("cross" fusing).

Alayrac et al., "Flamingo: a Visual Language Model for Few-Shot Learning" (2022); open counterparts
are OpenFlamingo (Awadalla et al., 2023) and IDEFICS (Laurençon et al., 2023). Visual tokens do not
stand in the stream of text. Before some blocks of the language model there is a gated block:
attention from the text to the visual tokens of the images that it may see, and an MLP, each
multiplied by tanh of a learned gate. Gates are zero at first, so that a new model computes what its
language model does, and nothing else.

Where an image stands in a text, there is one token for it. Everything else of an image is keys and
values.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmjax.connectors import make_connector
from mmjax.models import image_masks
from mmjax.models.lm import LM, Cache
from mmjax.models.vit import ViT
from mmjax.models.vlm import VLM, VLMConfig, VLMOutput, positions_of
from mmjax.nn import masks
from mmjax.nn.attention import KV, Attention
from mmjax.nn.linear import Embedding, Linear, project
from mmjax.nn.masks import Labels, Mask
from mmjax.nn.mlp import MLP
from mmjax.nn.norm import NORMS
from mmjax.nn.partition import constrain
from mmjax.nn.rope import Rotation
from mmjax.nn.stack import Layers, Stack, layer_options
from mmjax.registry import check_choice
from mmjax.typing import Array, Bool, Float, Int, Key

GATES = ("scalar", "vector")
SEES = ("last", "all")


@dataclasses.dataclass(frozen=True)
class GatedConfig:
    """What a gated block is made of. Its defaults are those of OpenFlamingo.

    Attributes:
      heads, kv_heads, head_dim: of its attention; see `Attention`.
      mlp_width: None: four times the width of the stream.
      activation: a name in `mmjax.nn.mlp.ACTIVATIONS`.
      norm, norm_eps: of both branches.
      mlp_gated: whether the MLP has a gate of its own (as Llama's; IDEFICS).
      qk_norm: whether queries and keys are normalised over each head's width.
      gate: "scalar": one for each branch; "vector": one for each number of the stream.
      copies: if not 0, values begin as the identity and outputs as so much of it: what is looked at
        is added to the stream as it is, so many times as large. For visual tokens that are made of
        the language model's own embeddings (the connector `align`), so that a picture of a thing
        begins as its word.
    """

    heads: int = 8
    kv_heads: int | None = None
    head_dim: int = 64
    mlp_width: int | None = None
    activation: str = "gelu"
    norm: str = "layernorm"
    norm_eps: float = 1e-5
    mlp_gated: bool = False
    qk_norm: bool = False
    gate: str = "scalar"
    copies: float = 0.0

    def __post_init__(self):
        check_choice("gate", self.gate, GATES)


@dataclasses.dataclass(frozen=True)
class FlamingoConfig(VLMConfig):
    """Everything that decides what a Flamingo computes.

    Attributes: those of `VLMConfig`, but that attention is causal and there is no newline, and
      image_token: stands in the text where an image is, and has a vector like any other.
      new_tokens: number of tokens that the language model has not: the ids after its own. Their
        vectors, and their rows of the head, are parameters of their own, to be trained while the
        language model is frozen.
      gated: of each gated block.
      every: there is one gated block to so many blocks of the language model.
      after: so many of these come before it. 0 in IDEFICS, every - 1 in OpenFlamingo.
      sees: a token sees the "last" image before it, or "all" that are before it. Tokens before any
        image see none.
      sight_ends: ids of tokens after which what is before them is no longer seen: the text that
        follows sees no image until the next one. An end token itself still sees. Of IDEFICS, the
        end of a document.
      context_width: of the visual tokens; None: that of the language model.
    """

    gated: GatedConfig = GatedConfig()
    new_tokens: int = 0
    every: int = 1
    after: int = 0
    sees: str = "last"
    sight_ends: tuple[int, ...] = ()
    context_width: int | None = None
    name: str = dataclasses.field(default="flamingo", init=False)

    def __post_init__(self):
        super().__post_init__()
        check_choice("sees", self.sees, SEES)
        object.__setattr__(self, "sight_ends", tuple(sorted(set(self.sight_ends))))
        if self.attention != "causal" or self.newline:
            raise ValueError(
                f"attention={self.attention!r}, newline={self.newline}: no visual token stands in "
                "a Flamingo's text; leave both at their defaults."
            )
        if self.every < 1 or self.lm.depth % self.every:
            raise ValueError(
                f"every={self.every} is no divisor of the language model's depth={self.lm.depth}."
            )
        if not 0 <= self.after < self.every:
            raise ValueError(f"after={self.after} must be at least 0 and below every={self.every}.")
        heads = {self.gated.heads, self.gated.kv_heads or self.gated.heads}
        widths = {self.visual_width, *(count * self.gated.head_dim for count in heads)}
        if self.gated.copies and widths != {self.lm.width}:
            raise ValueError(
                f"copies={self.gated.copies}: the language model is {self.lm.width} wide, so that "
                f"visual tokens (visual_width={self.visual_width}), heads * head_dim and kv_heads "
                f"* head_dim must be too, not {', '.join(map(str, sorted(widths)))}."
            )
        if not 0 <= self.image_token < self.vocab_size:
            raise ValueError(
                f"image_token={self.image_token} stands in the text, but there are vectors for "
                f"{self.vocab_size} tokens only: take one of them, or more new_tokens."
            )
        if self.sight_ends and not 0 <= self.sight_ends[0] <= self.sight_ends[-1] < self.vocab_size:
            raise ValueError(
                f"sight_ends={self.sight_ends}: give ids of the {self.vocab_size} tokens that the "
                "model reads."
            )
        _ = self.visual_tokens  # raises where the connector does not fit

    @property
    def vocab_size(self) -> int:
        """Tokens of the language model, and new ones."""
        return self.lm.vocab_size + self.new_tokens

    @property
    def image_tokens(self) -> int:
        """Tokens of an image in the text."""
        return 1

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of an image, or of a clip where the connector reads several."""
        return self.connector.tokens(self.encoder.grid, self.extra)

    @property
    def runs(self) -> tuple[int, int]:
        """Blocks of the language model before and after a gated one, of those that repeat."""
        return self.after, self.every - self.after

    @property
    def visual_width(self) -> int:
        return self.lm.width if self.context_width is None else self.context_width


class Context(NamedTuple):
    """What gated blocks look at.

    Attributes:
      tokens: [B, M, E], visual ones; while decoding, the keys and values of each gated block stand
        for them.
      mask: from the text to them.
      looks: [B, T], False at tokens whose stream the MLPs of gated blocks leave as it is; None: at
        none.
    """

    tokens: Array | tuple[KV, ...]
    mask: Mask
    looks: Array | None = None

    def ahead(self, remembered: tuple[KV, ...]) -> Context:
        """Of the tokens that come next: they see what the last token sees.

        Args:
          remembered: of each gated block the keys and values of `tokens`.
        """
        last = jax.tree.map(lambda label: label[:, -1:], (self.mask.query, self.looks))
        seen = dataclasses.replace(self.mask, query=last[0]).dense()[:, 0].astype(jnp.int32)
        mask = Mask(Labels(group=jnp.ones_like(seen[:, :1])), Labels(group=seen))
        return Context(remembered, mask, last[1])

    def hidden(self, rows: Bool[Array, " b"]) -> Context:
        """The same, of which these rows see nothing."""
        group = jnp.where(rows[:, None], 0, self.mask.query.group)
        query = self.mask.query._replace(group=group)
        return self._replace(mask=dataclasses.replace(self.mask, query=query))


class FlamingoCache(NamedTuple):
    """What decoding remembers.

    Attributes:
      lm: of the language model.
      context: what the next token looks at.
    """

    lm: Cache
    context: Context

    def select(self, rows: Int[Array, " n"]) -> FlamingoCache:
        """The cache of these texts, which may be repeated, in this order."""
        return FlamingoCache(self.lm.select(rows), jax.tree.map(lambda x: x[rows], self.context))


class GatedBlock(nnx.Module):
    """Attention to visual tokens, then an MLP, each added to the stream as far as its gate says.

    Args:
      config: of a model, with `gated`.
    """

    def __init__(self, config: VLMConfig, *, rngs: nnx.Rngs):
        width, gated = config.lm.width, config.gated
        shape = () if gated.gate == "scalar" else (width,)

        def norm() -> nnx.Module:
            return NORMS[gated.norm](width, eps=gated.norm_eps)

        self.attention_norm = norm()
        self.attention = Attention(
            width,
            gated.heads,
            kv_heads=gated.kv_heads,
            head_dim=gated.head_dim,
            context_width=config.visual_width,
            qkv_bias=False,
            out_bias=False,
            qk_norm=gated.norm if gated.qk_norm else None,
            norm_eps=gated.norm_eps,
            rngs=rngs,
        )
        if gated.copies:
            self.attention.value.kernel[...] = jnp.eye(width)
            self.attention.out.kernel[...] = gated.copies * jnp.eye(width)
        self.attention_gate = nnx.Param(jnp.zeros(shape, jnp.float32))
        self.mlp_norm = norm()
        self.mlp = MLP(
            width,
            4 * width if gated.mlp_width is None else gated.mlp_width,
            activation=gated.activation,
            gated=gated.mlp_gated,
            bias=False,
            rngs=rngs,
        )
        self.mlp_gate = nnx.Param(jnp.zeros(shape, jnp.float32))

    def __call__(
        self, x: Float[Array, "b t d"], context: Context, **unused: None
    ) -> Float[Array, "b t d"]:
        """`unused`: what a stack offers to blocks, and these do not have."""
        y = self.attention_norm(x)
        return self._add(x, self.attention(y, context.tokens, mask=context.mask), context.looks)

    def step(self, x: Float[Array, "b t d"], cache: KV, context: Context) -> Float[Array, "b t d"]:
        """The same for the next token, with the keys and values of the visual tokens."""
        y = self.attention_norm(x)
        attended = self.attention.step(y, cache, None, mask=context.mask)[0]
        return self._add(x, attended, context.looks)

    def _add(self, x: Array, attended: Array, looks: Array | None) -> Array:
        x = x + _opened(self.attention_gate, x) * attended
        fed = self.mlp(self.mlp_norm(x))
        fed = fed if looks is None else jnp.where(looks[:, :, None], fed, 0)
        x = x + _opened(self.mlp_gate, x) * fed
        return constrain(x, "batch", "tokens", "embed")


def _opened(gate: nnx.Param, x: Array) -> Array:
    return jnp.tanh(gate[...]).astype(x.dtype)


class Interleaved:
    """The blocks of a language model with gated blocks between them, in place of its `Stack`.

    Args:
      own, gated: the blocks of both kinds.
      runs: what repeats: so many of their own, a gated one, so many of their own, a gated one, ...,
        so many of their own.
      context: what the gated ones look at.
    """

    def __init__(self, own: Stack, gated: Stack, runs: Sequence[int], context: Context):
        self.own, self.gated, self.runs, self.context = own, gated, runs, context
        self.groups = gated.depth // (len(runs) - 1)

    def run(
        self,
        x: Float[Array, "b t d"],
        features: Sequence[int],
        *,
        mask: Mask | None,
        rotation: Rotation | None,
        bias: Array | None,
        layers: Layers | None,
        rng: Key | None,
    ) -> tuple[Float[Array, "b t d"], None]:
        """See `Stack.run`; without outputs of single blocks, and without stochastic depth."""
        if features or rng is not None:
            raise ValueError(
                "A language model with gated blocks gives no features, and drops no blocks."
            )

        def call(block, x, **given):
            return block(x, bias=bias, **given), ()

        return self._run(x, mask, rotation, layers, call)[0], None

    def prefill(
        self,
        x: Float[Array, "b t d"],
        length: int,
        *,
        mask: Mask | None,
        rotation: Rotation | None,
        bias: Array | None,
        layers: Layers | None,
    ) -> tuple[Float[Array, "b t d"], tuple[KV, ...]]:
        """See `Stack.prefill`."""

        def call(block, x, **given):
            return block.with_cache(x, bias=bias, **given)

        x, caches = self._run(x, mask, rotation, layers, call)
        room = ((0, 0), (0, 0), (0, length - x.shape[1]), (0, 0))
        every = sum(self.runs)
        return x, tuple(
            KV(*(jnp.pad(stacked[divmod(layer, every)], room) for stacked in caches))
            for layer in range(self.own.depth)
        )

    def step(
        self,
        x: Float[Array, "b t d"],
        caches: tuple[KV, ...],
        slot: Int[Array, ""],
        **options: Any,
    ) -> tuple[Float[Array, "b t d"], tuple[KV, ...]]:
        """See `Stack.step`."""
        # Of each gated block the own one that it stands before; the last may stand after all.
        stands = np.cumsum(self.runs)[:-1] + sum(self.runs) * np.arange(self.groups)[:, None]

        def before(x: Array, layer: int) -> Array:
            for number in np.flatnonzero(stands.reshape(-1) == layer).tolist():
                cache = self.context.tokens[number]
                x = self.gated.block(number).step(x, cache, self.context)
            return x

        x, caches = self.own.step(x, caches, slot, before=before, **options)
        return before(x, self.own.depth), caches

    def _run(self, x, mask, rotation, layers, call):
        """A scan over groups of blocks: `call(block, x, ...)` gives x and what is kept of it."""
        graph, params = nnx.split(self.own.layers)
        gated_graph, gated = nnx.split(self.gated.layers)
        options, table = layer_options(mask, rotation, layers)
        kinds = None if layers is None else jnp.array(layers.index, jnp.int32)
        grouped = jax.tree.map(
            lambda leaf: leaf.reshape(self.groups, -1, *leaf.shape[1:]), ((params, kinds), gated)
        )

        def some(x, inputs):
            def one(x, inputs):
                layer, kind = inputs
                return call(nnx.merge(graph, layer), x, **options(table, kind))

            return jax.lax.scan(one, x, inputs)

        def group(x, inputs):
            own, looks = inputs
            kept, start = [], 0
            for number, length in enumerate(self.runs):
                if number:
                    look = jax.tree.map(lambda leaf, i=number - 1: leaf[i], looks)
                    x = nnx.merge(gated_graph, look)(x, self.context)
                if length:
                    run = slice(start, start + length)
                    x, some_kept = some(x, jax.tree.map(lambda leaf, run=run: leaf[run], own))
                    kept.append(some_kept)
                    start += length
            return x, jax.tree.map(lambda *parts: jnp.concatenate(parts), *kept)

        if self.own.policy is not None:
            group = jax.checkpoint(group, policy=self.own.policy, prevent_cse=False)
        return jax.lax.scan(group, x, grouped)


class Grown:
    """A table of tokens, and after it that of new ones."""

    def __init__(self, own: Embedding, new: Embedding):
        self.own, self.new = own, new

    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t e"]:
        count = self.own.embedding.shape[0]
        is_new = tokens >= count
        words = self.own(jnp.where(is_new, 0, tokens))
        return jnp.where(is_new[..., None], self.new(jnp.maximum(tokens - count, 0)), words)


def logits_of(
    head: Linear | None, table: Embedding, hidden: Float[Array, "*b e"], dtype: Any
) -> Float[Array, "*b v"]:
    """By a head or, where there is none, by the table of the tokens."""
    return project(hidden, table.embedding[...].T, dtype) if head is None else head(hidden, dtype)


class Flamingo(VLM):
    """tokens [B, T], images [B, I, H, W, C] -> logits [B, T, V]. See `run`."""

    def __init__(self, config: FlamingoConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = ViT(config.encoder, rngs=rngs)
        width = config.feature_width
        self.connector = make_connector(config.connector, width, config.visual_width, rngs=rngs)
        self.gated = Stack(config, config.lm.depth // config.every, block=GatedBlock, rngs=rngs)
        self.lm = LM(config.lm, rngs=rngs)
        width, init = config.lm.width, nnx.initializers.normal(0.02)
        grows, tied = config.new_tokens > 0, config.lm.tied
        self.new_token = (
            Embedding(config.new_tokens, width, init=init, rngs=rngs) if grows else None
        )
        self.new_head = (
            Linear(width, config.new_tokens, bias=False, kernel_init=init, rngs=rngs)
            if grows and not tied
            else None
        )

    def run(
        self,
        tokens: Int[Array, "b t"],
        images: Float[Array, "b i h w c"] | None = None,
        mask: Bool[Array, "b t"] | None = None,
        *,
        place: Int[Array, "b t"] | None = None,
        segments: Int[Array, "b t"] | None = None,
        parents: Int[Array, "b t"] | None = None,
        text: Int[Array, "n l"] | None = None,
        text_mask: Bool[Array, "n l"] | None = None,
    ) -> VLMOutput:
        """See `VLMOutput`, and `VLM.run` for the arguments.

        Args:
          place: which image of the row (or clip) stands at each position, -1 for none; in any
            order. None: they stand, in order, where tokens are `config.image_token`.
          images: None: no row has any.
        """
        positions, attention = None, None
        if segments is not None:
            mask, positions = segments > 0, positions_of(segments, parents)
            attention = masks.blocks(
                jnp.ones_like(mask),
                group=segments,
                window=self.config.lm.window,
                parent=parents,
                positions=positions,
            )
        elif parents is not None:
            raise ValueError("parents are those of segments: give both.")
        embeddings, context = self._start(
            tokens, images, mask, place, segments, parents, text, text_mask
        )
        out = self._looking(context).run(
            embeddings=embeddings, mask=mask, attention=attention, positions=positions
        )
        return VLMOutput(out.logits, out.hidden)

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
    ) -> tuple[Float[Array, "b v"], FlamingoCache]:
        """Read the prompts; see `LM.prefill`, and `run` for images and what goes with them."""
        embeddings, context = self._start(tokens, images, mask, place, None, None, text, text_mask)
        lm = self._looking(context)
        logits, cache = lm.prefill(None, mask, length=length, embeddings=embeddings)
        remembered = tuple(
            self.gated.block(number).attention.remember(context.tokens)
            for number in range(self.gated.depth)
        )
        return logits, FlamingoCache(cache, self._after(tokens[:, -1], context.ahead(remembered)))

    def step(
        self, tokens: Int[Array, " b"], cache: FlamingoCache
    ) -> tuple[Float[Array, "b v"], FlamingoCache]:
        """Read one more token of each text, which is no image's; see `LM.step`."""
        logits, own = self._looking(cache.context).step(tokens, cache.lm)
        return logits, FlamingoCache(own, self._after(tokens, cache.context))

    def logits(self, hidden: Float[Array, "*b e"]) -> Float[Array, "*b v"]:
        """The output head, for `VLMOutput.hidden` or some of its vectors; float32."""
        return self._looking(None).logits(hidden)

    def unstack(self) -> Flamingo:
        """A model for `step` alone; see `LM.unstack`."""
        result = copy.copy(self)
        result.lm, result.gated = self.lm.unstack(), self.gated.unstack()
        return result

    def _looking(self, context: Context | None) -> LM:
        """The language model, looking at the context, and with the vocabulary of the whole."""
        lm = copy.copy(self.lm)
        if context is not None:
            decoder = Interleaved(self.lm.decoder, self.gated, self.config.runs, context)
            object.__setattr__(lm, "decoder", decoder)
        if self.new_token is not None:
            object.__setattr__(lm, "token", Grown(self.lm.token, self.new_token))
            object.__setattr__(lm, "head", self._grown_head)
        return lm

    def _grown_head(self, hidden: Array, dtype: Any) -> Array:
        """Logits of the language model's tokens and of the new ones."""
        parts = (self.lm.head, self.lm.token), (self.new_head, self.new_token)
        return jnp.concatenate([logits_of(*part, hidden, dtype) for part in parts], axis=-1)

    def _after(self, tokens: Int[Array, " b"], context: Context) -> Context:
        """What is seen after these tokens, by which it was seen."""
        ends = self.config.sight_ends
        return context.hidden(image_masks.is_end(tokens, ends)) if ends else context

    def _embed_text(self, tokens: Array, mask: Array | None) -> Float[Array, "b t d"]:
        # Whatever stands at padding, -1 for instance, must not become a vector of NaN.
        tokens = tokens if mask is None else jnp.where(mask, tokens, 0)
        return self._looking(None).embed(tokens)

    def _start(
        self,
        tokens: Array,
        images: Array | None,
        mask: Array | None,
        place: Array | None,
        segments: Array | None,
        parents: Array | None,
        text: Array | None,
        text_mask: Array | None,
    ) -> tuple[Float[Array, "b t d"], Context]:
        """What the language model reads, and what it looks at."""
        embeddings = self._embed_text(tokens, mask)
        if images is None:
            return embeddings, self._nothing(tokens, embeddings.dtype)
        visual = self.encode_images(images, text=text, text_mask=text_mask)
        count = visual.shape[1] // self.config.visual_tokens
        place = self._places(tokens, mask) if place is None else place
        # An image that is not there is NaN: under `jit` the only way to be noticed.
        embeddings = jnp.where((place < count)[:, :, None], embeddings, jnp.nan)
        segments, parents = image_masks.in_sight(tokens, self.config.sight_ends, segments, parents)
        return embeddings, Context(visual, self._seen(place, count, segments, parents))

    def _nothing(self, tokens: Array, dtype: Any) -> Context:
        """As of rows without images beside others: gated blocks see nothing, but have MLPs."""
        nothing = jnp.zeros((len(tokens), 1, self.config.visual_width), dtype)
        none, no_key = jnp.zeros_like(tokens), jnp.zeros_like(tokens[:, :1])
        return Context(nothing, Mask(Labels(group=none), Labels(group=no_key)))

    def _seen(self, place: Array, count: int, segments: Array, parents: Array | None) -> Mask:
        """The mask from the text to the visual tokens of so many images."""
        mask = image_masks.sees_all if self.config.sees == "all" else image_masks.sees_last
        return mask(place, count, self.config.visual_tokens, segments, parents)
