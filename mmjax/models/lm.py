"""Decoder-only language models: Llama, Qwen, Mistral, Gemma, OPT, GPT-2, GPT-NeoX and MPT.

They are one transformer with options: where norms stand and of which kind, rotary or learned
positions or none, layers that look back a few tokens only, caps on logits. A config says which.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mmjax.models.checks import check_dtype
from mmjax.nn import masks
from mmjax.nn.alibi import alibi
from mmjax.nn.attention import KV
from mmjax.nn.linear import Embedding, Linear, project
from mmjax.nn.norm import NORMS
from mmjax.nn.partition import constrain
from mmjax.nn.rope import Rope, Rotation
from mmjax.nn.stack import BlockConfig, LayerKind, Layers, Stack
from mmjax.typing import Array, Bool, Float, Int, Key


@dataclasses.dataclass(frozen=True)
class QKNorm:
    """How queries and keys are normalised.

    Attributes:
      norm: a name in `NORMS`.
      eps: of it.
      each: whether each head has a scale and a bias of its own (Chameleon).
    """

    norm: str
    eps: float
    each: bool = False


@dataclasses.dataclass(frozen=True)
class LMConfig:
    """Everything that decides what a language model computes. Defaults are those of Llama.

    Attributes:
      vocab_size: number of tokens.
      max_len: the longest text that the model is made for, in tokens. A limit with learned
        positions only.
      width, depth, heads, mlp_width: of the transformer.
      activation: a name in `mmjax.nn.mlp.ACTIVATIONS`. Checkpoints differ in it.
      norm_eps: of all norms.
      tied: whether the token table is the output head as well.
      rope: rotary embedding of queries and keys. None: learned positions are added to the tokens,
        unless there is `alibi`.
      alibi: see `mmjax.nn.alibi`; None for none.
      norm: a name in `NORMS`, of all norms.
      norm_placement: see `BlockConfig`.
      final_norm: whether there is a norm after the last block.
      gated: whether the MLP has a gate.
      qkv_bias, out_bias, mlp_bias: whether these linear maps have biases.
      qk_norm: whether queries and keys are normalised over each head's width.
      qk_norm_as: how, if not as the rest is.
      kv_heads: number of key and value heads; as many as query heads if None.
      head_dim: width of a head; width / heads if None.
      scale: of the attention logits; 1 / sqrt(head_dim) if None.
      scale_by_depth: whether layer i, from 1, divides its attention logits by i (an option of
        GPT-2).
      softcap, final_softcap: x becomes cap * tanh(x / cap): the attention logits, the output.
      window: number of tokens that a layer looks back, the token itself included; None for all.
      window_layers: which layers have the window, counted from 0; None for all.
      window_rope: rotary embedding of the layers with a window; `rope` if None.
      scale_embeddings: whether token vectors are multiplied by sqrt(width), rounded to the dtype of
        the computation (Gemma).
      embed_width: width of the token table; another one than `width` is mapped to it and back.
      position_offset: row of the position table at which the first token finds its vector.
      dropout: share of the numbers of each branch's output that become zero in training (Chameleon,
        Emu3).
      experts: MLPs of each block, of which a token takes one; see `mmjax.nn.mlp.Experts`.
      drop_path, remat, unroll, dtype: as in `ViTConfig`.
    """

    vocab_size: int
    max_len: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    activation: str
    norm_eps: float
    tied: bool
    rope: Rope | None
    norm: str = "rmsnorm"
    norm_placement: str = "pre"
    final_norm: bool = True
    gated: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    kv_heads: int | None = None
    head_dim: int | None = None
    scale: float | None = None
    scale_by_depth: bool = False
    softcap: float | None = None
    final_softcap: float | None = None
    window: int | None = None
    window_layers: tuple[int, ...] | None = None
    window_rope: Rope | None = None
    alibi: float | None = None
    scale_embeddings: bool = False
    embed_width: int | None = None
    position_offset: int = 0
    qk_norm_as: QKNorm | None = None
    dropout: float = 0.0
    experts: int = 1
    drop_path: float = 0.0
    remat: str = "none"
    unroll: int = 1
    dtype: str = "float32"
    name: str = dataclasses.field(default="lm", init=False)

    def __post_init__(self):
        check_dtype(self.dtype)
        self._check()
        # Fields that say what is so anyway become None: equal configs compute the same.
        usual = {
            "kv_heads": self.heads,
            "head_dim": self.width / self.heads,
            "embed_width": self.width,
            "scale": self.head_width**-0.5,
            "window_layers": tuple(range(self.depth)),
            "window_rope": self.rope,
            "qk_norm_as": QKNorm(self.norm, self.norm_eps),
        }
        for name, value in usual.items():
            if getattr(self, name) == value:
                object.__setattr__(self, name, None)

    def _check(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1: the token itself.")
        if self.window is None and (self.window_layers is not None or self.window_rope is not None):
            raise ValueError(
                f"window_layers={self.window_layers} and window_rope={self.window_rope} say which "
                "layers have a window, but there is none: set `window`."
            )
        if self.window_layers is not None:
            object.__setattr__(self, "window_layers", tuple(sorted(set(self.window_layers))))
            outside = [layer for layer in self.window_layers if not 0 <= layer < self.depth]
            if not self.window_layers:
                raise ValueError("window_layers=() names no layer: leave out the window as well.")
            if outside:
                raise ValueError(
                    f"window_layers names {outside}, but a model of depth={self.depth} has layers "
                    f"0 to {self.depth - 1}."
                )
        if self.rope is None and self.window_rope is not None:
            raise ValueError("window_rope without rope: give both, or learned positions only.")
        if self.rope is not None and self.alibi is not None:
            raise ValueError("rope and alibi both say where tokens are: give one of them.")
        if self.qk_norm_as is not None and not self.qk_norm:
            raise ValueError(f"qk_norm_as={self.qk_norm_as} without qk_norm=True has no meaning.")
        if not self.learned_positions and self.position_offset:
            raise ValueError(
                f"position_offset={self.position_offset} is a row of a position table, which there "
                "is not with a rotary embedding or alibi."
            )

    @property
    def head_width(self) -> int:
        """Of an attention head."""
        return self.width // self.heads if self.head_dim is None else self.head_dim

    @property
    def learned_positions(self) -> bool:
        """Whether there is a table of positions."""
        return self.rope is None and self.alibi is None

    @property
    def limit(self) -> int | None:
        """The longest text that the model can take, in tokens; None if there is no limit."""
        return self.max_len if self.learned_positions else None

    @property
    def block(self) -> BlockConfig:
        usual = QKNorm(self.norm, self.norm_eps)
        how = usual if self.qk_norm_as is None else self.qk_norm_as
        return BlockConfig(
            width=self.width,
            heads=self.heads,
            mlp_width=self.mlp_width,
            activation=self.activation,
            norm=self.norm,
            norm_eps=self.norm_eps,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            gated=self.gated,
            qkv_bias=self.qkv_bias,
            out_bias=self.out_bias,
            mlp_bias=self.mlp_bias,
            qk_norm=how.norm if self.qk_norm else None,
            qk_norm_eps=how.eps,
            qk_norm_each=how.each,
            dropout=self.dropout,
            experts=self.experts,
            norm_placement=self.norm_placement,
            scale=self.scale,
            softcap=self.softcap,
        )

    @property
    def windowed(self) -> tuple[bool, ...]:
        """For each layer, whether it has the window."""
        if self.window is None:
            return (False,) * self.depth
        if self.window_layers is None:
            return (True,) * self.depth
        return tuple(layer in self.window_layers for layer in range(self.depth))


class LMOutput(NamedTuple):
    """What a language model computes.

    Attributes:
      logits: [B, T, V] float32.
      hidden: [B, T, E], what the logits are computed from: after the final norm, and of the token
        table's width.
      features: [F, B, T, D], outputs of the blocks asked for, before any final norm, or None.
    """

    logits: Array
    hidden: Array
    features: Array | None


class Cache(NamedTuple):
    """What decoding remembers of a batch of texts.

    Attributes:
      layers: for each layer keys and values, [B, kv_heads, slots, head_dim].
      valid: [B, slots], which slots hold a token that counts.
      count: [B], number of those: the position of the next token.
      slot: [], where the next token goes.
    """

    layers: tuple[KV, ...]
    valid: Array
    count: Array
    slot: Array

    def select(self, rows: Int[Array, " n"]) -> Cache:
        """The cache of these texts, which may be repeated, in this order."""
        layers = jax.tree.map(lambda x: x[rows], self.layers)
        return self._replace(layers=layers, valid=self.valid[rows], count=self.count[rows])


class LM(nnx.Module):
    """tokens [B, T] -> logits [B, T, V]. See `run`, and `prefill` and `step` for decoding."""

    encoder_decoder = False
    takes_images = False

    def __init__(self, config: LMConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, init = config.width, nnx.initializers.normal(0.02)
        embed_width = width if config.embed_width is None else config.embed_width
        self.token = Embedding(config.vocab_size, embed_width, init=init, rngs=rngs)
        mapped = embed_width != width
        self.embed_in = Linear(embed_width, width, bias=False, rngs=rngs) if mapped else None
        rows = config.position_offset + config.max_len
        self.position = (
            Embedding(rows, width, init=init, rngs=rngs) if config.learned_positions else None
        )
        self.decoder = Stack(
            config.block,
            config.depth,
            remat=config.remat,
            drop_path=config.drop_path,
            unroll=config.unroll,
            rngs=rngs,
        )
        norm = NORMS[config.norm]
        self.final_norm = norm(width, eps=config.norm_eps) if config.final_norm else None
        self.embed_out = Linear(width, embed_width, bias=False, rngs=rngs) if mapped else None
        self.head = (
            None
            if config.tied
            else Linear(embed_width, config.vocab_size, bias=False, kernel_init=init, rngs=rngs)
        )

    def __call__(
        self, tokens: Int[Array, "b t"], mask: Bool[Array, "b t"] | None = None
    ) -> Float[Array, "b t v"]:
        """The logits of the token after each one; see `run`."""
        return self.run(tokens, mask=mask).logits

    def run(
        self,
        tokens: Int[Array, "b t"] | None = None,
        *,
        embeddings: Float[Array, "b t e"] | None = None,
        mask: Bool[Array, "b t"] | None = None,
        attention: masks.Mask | None = None,
        positions: Int[Array, "#b t"] | None = None,
        features: Sequence[int] = (),
        expert: Int[Array, "b t"] | None = None,
        rng: Key | None = None,
    ) -> LMOutput:
        """See `LMOutput`. Without `attention` each token sees itself and what is before it.

        Args:
          embeddings: instead of tokens, vectors like those of `embed`.
          mask: True at tokens, False at padding, which may stand on either side; None where there
            is no padding.
          attention: who attends to whom, padding included: prefixes, images, packed samples. Made
            with a window (any) if layers of the model have one; their own replaces it.
          positions: of the tokens; if None, the number of valid tokens before each.
          features: blocks whose outputs are wanted; -1 is the last, -2 the penultimate.
          expert: of each token the MLP that it takes, where blocks have several.
          rng: turns stochastic depth and dropout on.

        Raises:
          ValueError: if there are neither or both of tokens and embeddings, the text is longer than
            the model's limit, a block does not exist, or `attention` lacks the window.
        """
        x, positions = self._start(tokens, embeddings, mask, positions)
        rotation, layers = self._layers(positions)
        attention = self._attention(x.shape[1], mask, attention)
        x, outputs = self.decoder.run(
            x,
            features,
            mask=attention,
            rotation=rotation,
            bias=self._bias(positions),
            layers=layers,
            rng=rng,
            **self._routes(expert),
        )
        hidden = self._finish(x)
        return LMOutput(self.logits(hidden), hidden, outputs)

    def embed(self, tokens: Int[Array, "*b"]) -> Float[Array, "*b e"]:
        """Vectors of the tokens, without positions, in the dtype of the computation."""
        x = self.token(tokens).astype(self.config.dtype)
        if self.config.scale_embeddings:
            x = x * jnp.asarray(math.sqrt(self.config.width), x.dtype)
        return x

    def logits(self, hidden: Float[Array, "*b e"]) -> Float[Array, "*b v"]:
        """The output head, for `LMOutput.hidden` or some of its vectors; float32."""
        if self.head is None:
            logits = project(hidden, self.token.embedding[...].T, jnp.float32)
        else:
            logits = self.head(hidden, jnp.float32)
        cap = self.config.final_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def prefill(
        self,
        tokens: Int[Array, "b t"] | None,
        mask: Bool[Array, "b t"],
        *,
        length: int,
        embeddings: Float[Array, "b t e"] | None = None,
        attention: masks.Mask | None = None,
    ) -> tuple[Float[Array, "b v"], Cache]:
        """The logits of each prompt's next token, and what `step` needs; see `prefill_hidden`."""
        hidden, cache = self.prefill_hidden(
            tokens, mask, length=length, embeddings=embeddings, attention=attention
        )
        return self.logits(hidden), cache

    def prefill_hidden(
        self,
        tokens: Int[Array, "b t"] | None,
        mask: Bool[Array, "b t"],
        *,
        length: int,
        embeddings: Float[Array, "b t e"] | None = None,
        attention: masks.Mask | None = None,
        expert: Int[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b e"], Cache]:
        """Read the prompts.

        Args:
          tokens: padded on the left.
          mask: False at padding.
          length: slots of the cache: at least T and the tokens that are to come.
          embeddings, attention, expert: as in `run`.

        Returns:
          What the logits of each prompt's next token are computed from, and what `step` needs.

        Raises:
          ValueError: as `run`; if the cache has no room for the prompts.
        """
        x, positions = self._start(tokens, embeddings, mask, None)
        if length < x.shape[1]:
            raise ValueError(f"A cache of {length} slots has no room for {x.shape[1]} tokens.")
        rotation, layers = self._layers(positions)
        attention = self._attention(x.shape[1], mask, attention)
        x, caches = self.decoder.prefill(
            x,
            length,
            mask=attention,
            rotation=rotation,
            bias=self._bias(positions),
            layers=layers,
            **self._routes(expert),
        )
        cache = Cache(
            layers=caches,
            valid=jnp.pad(mask, ((0, 0), (0, length - mask.shape[1]))),
            count=jnp.sum(mask, axis=1, dtype=jnp.int32),
            slot=jnp.asarray(mask.shape[1], jnp.int32),
        )
        return self._finish(x[:, -1]), cache

    def step(self, tokens: Int[Array, " b"], cache: Cache) -> tuple[Float[Array, "b v"], Cache]:
        """Read one more token of each text: the logits of the token after it; see `step_hidden`."""
        hidden, cache = self.step_hidden(tokens, cache)
        return self.logits(hidden), cache

    def step_hidden(
        self,
        tokens: Int[Array, " b"] | None,
        cache: Cache,
        *,
        embeddings: Float[Array, "b e"] | None = None,
        expert: Int[Array, " b"] | None = None,
    ) -> tuple[Float[Array, "b e"], Cache]:
        """Read one more token of each text; embeddings and expert as in `run`.

        Returns:
          What the logits of the token after it are computed from, and the cache with it. NaN if the
          cache is full: under `jit` that is the only way to be noticed.
        """
        tokens, embeddings = (None if one is None else one[:, None] for one in (tokens, embeddings))
        x, positions = self._start(tokens, embeddings, None, cache.count[:, None])
        rotation, layers = self._layers(positions)
        slots = cache.valid.shape[1]
        valid = cache.valid.at[:, cache.slot].set(True)
        place = jnp.arange(slots, dtype=jnp.int32)[None]
        attention = masks.Mask(
            masks.Labels(group=jnp.ones((1, 1), jnp.int32), position=cache.slot[None, None]),
            masks.Labels(group=valid.astype(jnp.int32), position=place),
            window=self.config.window if layers is None else None,
        )
        x, caches = self.decoder.step(
            x,
            cache.layers,
            cache.slot,
            mask=attention,
            rotation=rotation,
            bias=self._bias(_positions(slots, valid)),
            layers=layers,
            **self._routes(None if expert is None else expert[:, None]),
        )
        hidden = jnp.where(cache.slot < slots, self._finish(x[:, 0]), jnp.nan)
        return hidden, Cache(caches, valid, cache.count + 1, cache.slot + 1)

    def unstack(self) -> LM:
        """A model for `step` alone whose layers have parameters of their own; see `Stack`."""
        result = copy.copy(self)
        result.decoder = self.decoder.unstack()
        return result

    def _start(
        self,
        tokens: Array | None,
        embeddings: Array | None,
        mask: Array | None,
        positions: Array | None,
    ) -> tuple[Float[Array, "b t d"], Int[Array, "#b t"]]:
        """What enters the first block, and the tokens' positions."""
        if (tokens is None) == (embeddings is None):
            raise ValueError(
                "A language model reads either tokens or embeddings: give one of them."
            )
        length = (embeddings if tokens is None else tokens).shape[1]
        limit = self.config.limit
        if limit is not None and length > limit:
            raise ValueError(
                f"A text of {length} tokens is longer than the model's max_len={limit}: truncate "
                "it when tokenising."
            )
        if embeddings is None:
            # Whatever stands at padding, -1 for instance, must not become a vector of NaN.
            embeddings = self.embed(tokens if mask is None else jnp.where(mask, tokens, 0))
        x = embeddings.astype(self.config.dtype)
        x = x if self.embed_in is None else self.embed_in(x)
        if positions is None:
            positions = _positions(length, mask)
        if self.position is not None:
            x = x + self.position(positions + self.config.position_offset).astype(x.dtype)
        return constrain(x, "batch", "tokens", "embed"), positions

    def _finish(self, x: Float[Array, "*b d"]) -> Float[Array, "*b e"]:
        x = x if self.final_norm is None else self.final_norm(x)
        return x if self.embed_out is None else self.embed_out(x)

    def _routes(self, expert: Array | None) -> dict[str, Array]:
        """What blocks with several MLPs are told."""
        if (expert is None) != (self.config.experts == 1):
            raise ValueError(
                f"Blocks have {self.config.experts} MLPs: `expert` says which of them each token "
                "takes, where there are several."
            )
        return {} if expert is None else {"expert": expert}

    def _bias(self, positions: Int[Array, "#b k"]) -> Float[Array, "#b h 1 k"] | None:
        """Of attention to keys at these places."""
        largest = self.config.alibi
        return None if largest is None else alibi(positions, self.config.heads, largest)

    def _layers(self, positions: Array) -> tuple[Rotation | None, Layers | None]:
        """The rotation of all layers, or else what they differ in."""
        config = self.config
        head_dim = config.head_width

        def rotation(windowed: bool) -> Rotation | None:
            rope = config.rope if config.window_rope is None or not windowed else config.window_rope
            return None if rope is None else rope.rotation(positions, head_dim)

        def scale(layer: int) -> float | None:
            base = head_dim**-0.5 if config.scale is None else config.scale
            return base / (layer + 1) if config.scale_by_depth else None

        layers = [(windowed, scale(layer)) for layer, windowed in enumerate(config.windowed)]
        different = list(dict.fromkeys(layers))
        if len(different) == 1 and not config.scale_by_depth:
            return rotation(different[0][0]), None
        kinds = tuple(
            LayerKind(config.window if windowed else None, rotation(windowed), scale)
            for windowed, scale in different
        )
        return None, Layers(kinds, tuple(different.index(layer) for layer in layers))

    def _attention(
        self, length: int, mask: Array | None, attention: masks.Mask | None
    ) -> masks.Mask:
        window = self.config.window
        if attention is None and mask is None:
            return masks.causal(length, window=window)
        if attention is None:
            return masks.blocks(jnp.ones_like(mask), group=mask, window=window)
        if window is None:
            return attention
        if attention.query.position is None:
            raise ValueError(
                f"Layers of this model look back {window} tokens only: make the attention mask "
                f"with window={window}."
            )
        return dataclasses.replace(attention, window=window)


def _positions(length: int, mask: Array | None) -> Int[Array, "#b t"]:
    """The number of valid tokens before each; that of the nearest valid one for padding."""
    if mask is None:
        return jnp.arange(length, dtype=jnp.int32)[None]
    return jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
