"""T5 (Raffel et al., 2019): a text encoder and a decoder that attends to it.

T5 1.0, T5 1.1 and Flan-T5 by config. Distances between tokens are all that it knows of positions:
each head adds a learned number for each bucket of distances to the logits of its attention.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmjax.models.checks import check_dtype
from mmjax.nn import masks
from mmjax.nn.attention import KV, Attention
from mmjax.nn.linear import Embedding, Linear, project
from mmjax.nn.masks import Mask
from mmjax.nn.norm import NORMS
from mmjax.nn.partition import constrain
from mmjax.nn.stack import Block, BlockConfig, Stack
from mmjax.typing import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5EncoderConfig:
    """Everything that decides what T5's encoder computes.

    Attributes:
      vocab_size: number of tokens.
      width, depth, heads, mlp_width: of the transformer.
      head_dim: width of a head, which need not be width / heads.
      activation: a name in `mmjax.nn.mlp.ACTIVATIONS`: "relu" in T5 1.0, "gelu_tanh" in 1.1.
      gated: whether the MLP has a gate, as it has in T5 1.1.
      norm_eps: of all norms.
      buckets: number of buckets of distances; half of them for each direction in the encoder.
      max_distance: from here on all distances share a bucket, in tokens.
      remat, unroll, dtype: as in `ViTConfig`.
    """

    vocab_size: int
    width: int
    depth: int
    heads: int
    head_dim: int
    mlp_width: int
    activation: str
    gated: bool
    norm_eps: float = 1e-6
    buckets: int = 32
    max_distance: int = 128
    remat: str = "none"
    unroll: int = 1
    dtype: str = "float32"

    def __post_init__(self):
        check_dtype(self.dtype)
        # The fewest for which both directions have a bucket that grows with the distance.
        if self.buckets < 4 or self.max_distance <= self.buckets // 2:
            raise ValueError(
                f"buckets={self.buckets} with max_distance={self.max_distance}: there must be at "
                "least 4 buckets, and half of them must be fewer than max_distance."
            )

    @property
    def block(self) -> BlockConfig:
        return BlockConfig(
            width=self.width,
            heads=self.heads,
            head_dim=self.head_dim,
            mlp_width=self.mlp_width,
            activation=self.activation,
            gated=self.gated,
            norm="rmsnorm",
            norm_eps=self.norm_eps,
            qkv_bias=False,
            out_bias=False,
            mlp_bias=False,
            scale=1.0,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config(T5EncoderConfig):
    """Everything that decides what T5 computes.

    Attributes:
      decoder_depth: number of the decoder's blocks.
      tied: whether logits are products with the token embeddings, as in T5 1.0; in 1.1 they have
        a matrix of their own.
      scale_logits: whether the last hidden state is multiplied by width ** -0.5, as in T5 1.0.
      decoder_start_id: the token that a decoder's text begins with; padding in all published ones.
    """

    decoder_depth: int
    tied: bool
    scale_logits: bool
    decoder_start_id: int = 0
    name: str = dataclasses.field(default="t5", init=False)

    @property
    def limit(self) -> None:
        """The longest text that the model can take: there is no limit."""
        return None

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.decoder_start_id < self.vocab_size:
            raise ValueError(
                f"decoder_start_id={self.decoder_start_id} is outside of a vocabulary of "
                f"{self.vocab_size}."
            )


class RelativeBias(nnx.Module):
    """What each head adds to its logits for each bucket of distances."""

    def __init__(self, config: T5EncoderConfig, *, bidirectional: bool, rngs: nnx.Rngs):
        init = nnx.initializers.normal(config.width**-0.5)
        self.embedding = nnx.Param(init(rngs.params(), (config.buckets, config.heads), jnp.float32))
        self.bidirectional = bidirectional
        self.max_distance = config.max_distance

    def __call__(
        self, queries: int, keys: int, first: int | Int[Array, ""] = 0
    ) -> Float[Array, "1 h q k"]:
        """For queries that stand at `first`, `first` + 1, ... among the keys."""
        distances = np.arange(1 - keys, keys)
        table = bucket(
            distances,
            bidirectional=self.bidirectional,
            buckets=self.embedding.shape[0],
            max_distance=self.max_distance,
        )
        places = first + jnp.arange(queries, dtype=jnp.int32)
        relative = jnp.arange(keys, dtype=jnp.int32) - places[:, None]
        # By distance first: the gather of [queries, keys] is then from a few rows.
        by_distance = self.embedding[...].astype(jnp.float32)[table]
        return by_distance[relative + keys - 1].transpose(2, 0, 1)[None]


def bucket(
    relative: np.ndarray, *, bidirectional: bool, buckets: int, max_distance: int
) -> np.ndarray:
    """The bucket of each distance, as in Mesh TensorFlow's `_relative_position_bucket`.

    Half of a direction's buckets hold one distance each; the others grow with the logarithm of the
    distance up to `max_distance`.

    Args:
      relative: the key's place minus the query's.
      bidirectional: whether keys behind the query have buckets of their own; if not, they share
        that of distance 0.
    """
    start = np.zeros_like(relative)
    if bidirectional:
        buckets //= 2
        start = np.where(relative > 0, buckets, 0)
        distance = np.abs(relative)
    else:
        distance = np.maximum(-relative, 0)
    exact = buckets // 2
    # In float32, as the reference: where a bucket begins is a matter of rounding.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    ratio = ratio / np.float32(math.log(max_distance / exact)) * np.float32(buckets - exact)
    grown = np.minimum(exact + ratio.astype(np.int32), buckets - 1)
    return start + np.where(distance < exact, distance, grown)


class DecoderBlock(Block):
    """A block whose attention to its own stream is followed by attention to the encoder's."""

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.cross_norm = NORMS[config.norm](config.width, eps=config.norm_eps)
        self.cross = Attention(
            config.width,
            config.heads,
            head_dim=config.head_dim,
            qkv_bias=config.qkv_bias,
            out_bias=config.out_bias,
            scale=config.scale,
            rngs=rngs,
        )

    def __call__(
        self,
        x: Float[Array, "b n d"],
        *,
        context: Float[Array, "b k d"],
        context_mask: Mask | None,
        drop_rate: None = None,
        rng: None = None,
        **options,
    ) -> Float[Array, "b n d"]:
        """`options`: of the attention to the own stream."""

        def attend(y: Array) -> tuple[Array, None]:
            y = self.attention(y, **options)
            return y + self.cross(self.cross_norm(x + y), context, mask=context_mask), None

        return self._run(x, attend)[0]

    def step(
        self,
        x: Float[Array, "b n d"],
        cache: KV,
        slot: Int[Array, ""],
        *,
        context: KV,
        context_mask: Mask,
        **options,
    ) -> tuple[Float[Array, "b n d"], KV]:
        """The next tokens; `context`: what `cross` remembers of the encoder's stream."""

        def attend(y: Array) -> tuple[Array, KV]:
            y, joined = self.attention.step(y, cache, slot, **options)
            z, _ = self.cross.step(self.cross_norm(x + y), context, None, mask=context_mask)
            return y + z, joined

        return self._run(x, attend)


class T5Stack(nnx.Module):
    """Blocks, the relative positions that they share, and the final norm."""

    def __init__(
        self, config: T5EncoderConfig, depth: int, *, decoder: bool = False, rngs: nnx.Rngs
    ):
        self.relative = RelativeBias(config, bidirectional=not decoder, rngs=rngs)
        self.blocks = Stack(
            config.block,
            depth,
            block=DecoderBlock if decoder else Block,
            remat=config.remat,
            unroll=config.unroll,
            rngs=rngs,
        )
        self.final_norm = NORMS["rmsnorm"](config.width, eps=config.norm_eps)

    def __call__(
        self, x: Float[Array, "b n d"], features: Sequence[int], mask: Mask | None, **inputs
    ) -> tuple[Float[Array, "b n d"], Float[Array, "f b n d"] | None]:
        bias = self.relative(x.shape[1], x.shape[1])
        x, outputs = self.blocks.run(x, features, mask=mask, bias=bias, **inputs)
        return self.final_norm(x), outputs


class T5Encoder(nnx.Module):
    """tokens [B, T] -> [B, T, D] and the outputs of the blocks asked for, or None.

    The encoder alone, as text-to-image models use it.
    """

    def __init__(self, config: T5EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        init = nnx.initializers.normal(1.0)
        self.token = Embedding(config.vocab_size, config.width, init=init, rngs=rngs)
        self.encoder = T5Stack(config, config.depth, rngs=rngs)

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        mask: Bool[Array, "b t"] | None = None,
        *,
        features: Sequence[int] = (),
    ) -> tuple[Float[Array, "b t d"], Float[Array, "f b t d"] | None]:
        """After the final norm; what stands at padding is of no meaning.

        Args:
          mask: True at tokens, False at padding, on either side; None where there is none.
          features: blocks whose outputs are wanted; -1 is the last, -2 the penultimate.

        Raises:
          ValueError: if a block of `features` does not exist.
        """
        return self.encode(tokens, mask, features=features)

    def encode(
        self,
        tokens: Int[Array, "b t"] | None,
        mask: Bool[Array, "b t"] | None = None,
        *,
        embeddings: Float[Array, "b t d"] | None = None,
        features: Sequence[int] = (),
    ) -> tuple[Float[Array, "b t d"], Float[Array, "f b t d"] | None]:
        """See `T5Encoder.__call__`.

        Args:
          embeddings: instead of tokens, vectors like those of `embed`.
        """
        attention_mask = None if mask is None else masks.padding(mask)
        x = self.embed(tokens) if embeddings is None else embeddings
        return self.encoder(constrain(x, "batch", "tokens", "embed"), features, attention_mask)

    def embed(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """Vectors of the tokens, in the dtype of the computation."""
        return self.token(tokens).astype(self.config.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class T5Cache:
    """What decoding needs of the past.

    Attributes:
      own: keys and values of the decoder's tokens, of each layer [B, H, slots, d].
      context: those of the encoder's, [B, H, T, d].
      mask: [B, T], which tokens of the encoder are none of padding.
      slot: where the next token goes.
    """

    own: tuple[KV, ...]
    context: tuple[KV, ...]
    mask: Array
    slot: Array

    def select(self, rows: Int[Array, " r"]) -> T5Cache:
        """The cache of a batch that consists of these rows of this one."""
        own, context, mask = jax.tree.map(lambda x: x[rows], (self.own, self.context, self.mask))
        return T5Cache(own, context, mask, self.slot)


class T5(T5Encoder):
    """tokens, decoder_tokens -> logits [B, U, V]; also `prefill` and `step` for generation."""

    # For those who generate: the prompt is no part of the text that is continued.
    encoder_decoder = True
    takes_images = False

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.decoder = T5Stack(config, config.decoder_depth, decoder=True, rngs=rngs)
        self.head = (
            None if config.tied else Linear(config.width, config.vocab_size, bias=False, rngs=rngs)
        )

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        decoder_tokens: Int[Array, "b u"],
        mask: Bool[Array, "b t"] | None = None,
        decoder_mask: Bool[Array, "b u"] | None = None,
    ) -> Float[Array, "b u v"]:
        """Logits of the token after each of the decoder's, float32.

        Args:
          decoder_tokens: they begin with `decoder_start_id`.
          mask, decoder_mask: True at tokens, False at padding; None where there is none.
        """
        encoded, _ = self.encode(tokens, mask)
        return self.logits(self.decode(encoded, decoder_tokens, mask, decoder_mask)[0])

    def decode(
        self,
        encoded: Float[Array, "b t d"],
        decoder_tokens: Int[Array, "b u"],
        mask: Bool[Array, "b t"] | None = None,
        decoder_mask: Bool[Array, "b u"] | None = None,
        *,
        features: Sequence[int] = (),
    ) -> tuple[Float[Array, "b u d"], Float[Array, "f b u d"] | None]:
        """The decoder's stream after its final norm, and outputs of its blocks.

        Args:
          encoded: what `encode` gave for the tokens that `mask` is of.
        """
        every = jnp.ones(decoder_tokens.shape, bool)
        own = masks.causal(decoder_tokens.shape[1])
        if decoder_mask is not None:
            own = masks.blocks(every, group=decoder_mask)
        context_mask = None if mask is None else masks.cross(every, mask)
        x = constrain(self.embed(decoder_tokens), "batch", "tokens", "embed")
        return self.decoder(x, features, own, context=encoded, context_mask=context_mask)

    def logits(self, x: Float[Array, "b u d"]) -> Float[Array, "b u v"]:
        """Of a decoder's stream after its final norm; float32."""
        if self.config.scale_logits:
            x = x * self.config.width**-0.5
        if self.head is None:
            return project(x, self.token.embedding[...].T, jnp.float32)
        return self.head(x, jnp.float32)

    def prefill(
        self,
        tokens: Int[Array, "b t"] | None,
        mask: Bool[Array, "b t"],
        *,
        length: int,
        embeddings: Float[Array, "b t d"] | None = None,
    ) -> tuple[Float[Array, "b v"], T5Cache]:
        """Runs the encoder, and the decoder on its start token.

        Args:
          mask: True at tokens, False at padding, on either side.
          length: slots of the cache: for the start token and all new ones.
          embeddings: instead of tokens, vectors like those of `embed`.

        Returns:
          Logits of the first token, float32, and the cache for `step`.
        """
        config = self.config
        encoded, _ = self.encode(tokens, mask, embeddings=embeddings)
        batch = mask.shape[0]
        room = jnp.zeros((batch, config.heads, length, config.head_dim), encoded.dtype)
        layers = range(config.decoder_depth)
        cache = T5Cache(
            own=tuple(KV(room, room) for _ in layers),
            context=tuple(self.decoder.blocks.block(i).cross.remember(encoded) for i in layers),
            mask=mask,
            slot=jnp.zeros((), jnp.int32),
        )
        return self.step(jnp.full((batch,), config.decoder_start_id, jnp.int32), cache)

    def step(self, tokens: Int[Array, " b"], cache: T5Cache) -> tuple[Float[Array, "b v"], T5Cache]:
        """The decoder's next token: logits of the one after it, and the cache that holds it."""
        slots = cache.own[0].key.shape[2]
        place = jnp.arange(slots, dtype=jnp.int32)[None]
        mask = Mask(masks.Labels(order=cache.slot[None, None]), masks.Labels(order=place))
        context_mask = masks.cross(jnp.ones((tokens.shape[0], 1), bool), cache.mask)
        bias = self.decoder.relative(1, slots, cache.slot)
        x = constrain(self.embed(tokens[:, None]), "batch", "tokens", "embed")
        own = []
        for layer, (kv, context) in enumerate(zip(cache.own, cache.context, strict=True)):
            x, kv = self.decoder.blocks.block(layer).step(
                x, kv, cache.slot, mask=mask, bias=bias, context=context, context_mask=context_mask
            )
            own.append(kv)
        logits = self.logits(self.decoder.final_norm(x))[:, 0]
        return logits, dataclasses.replace(cache, own=tuple(own), slot=cache.slot + 1)

    def unstack(self) -> T5:
        """The same for `prefill` and `step`, faster on CPUs; see `Stack.unstack`."""
        result = copy.copy(self)
        result.decoder = copy.copy(self.decoder)
        result.decoder.blocks = self.decoder.blocks.unstack()
        return result
