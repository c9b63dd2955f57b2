"""Text transformer: the text tower of CLIP (causal) and of SigLIP (bidirectional)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx

from mmjax.models.checks import check_dtype
from mmjax.models.projection import Projection, ProjectionConfig
from mmjax.nn import masks
from mmjax.nn.linear import Embedding
from mmjax.nn.norm import NORMS
from mmjax.nn.partition import constrain
from mmjax.nn.pooling import AttentionPool, masked_mean
from mmjax.nn.stack import BlockConfig, Stack
from mmjax.registry import check_choice
from mmjax.typing import Array, Bool, Float, Int, Key

ATTENTIONS = ("causal", "bidirectional")
POOLINGS = ("eos", "argmax", "last", "mean", "map")
PADDINGS = ("attend", "mask")


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Everything that decides what a text tower computes. `text_size("S")` gives four fields.

    Attributes:
      vocab_size: number of tokens.
      max_len: the longest text, in tokens.
      width, depth, heads, mlp_width: of the transformer.
      activation: a name in `mmjax.nn.mlp.ACTIVATIONS`. Checkpoints differ in it.
      norm_eps: of all layer norms. 1e-5 in CLIP, 1e-6 in SigLIP.
      attention: "causal" (CLIP) or "bidirectional" (SigLIP).
      pooling: "eos" (first `eos_id`), "argmax" (largest id: OpenAI's CLIP, whose configs say
        `eos_token_id = 2`), "last" (SigLIP), "mean" or "map" (over the tokens that the mask
        calls valid).
      padding: "attend" (SigLIP, always padded to `max_len`; CLIP, where padding follows the
        end) or "mask".
      eos_id: of the end-of-text token; for pooling "eos".
      remat, unroll, dtype, drop_path: as in `ViTConfig`.
      projection: what the pooled vector goes through, or None.
    """

    vocab_size: int
    max_len: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    activation: str
    norm_eps: float
    attention: str
    pooling: str
    padding: str
    eos_id: int | None = None
    drop_path: float = 0.0
    remat: str = "none"
    unroll: int = 1
    dtype: str = "float32"
    projection: ProjectionConfig | None = None

    def __post_init__(self):
        check_choice("attention", self.attention, ATTENTIONS)
        check_choice("pooling", self.pooling, POOLINGS)
        check_choice("padding", self.padding, PADDINGS)
        check_dtype(self.dtype)
        if (self.pooling == "eos") != (self.eos_id is not None):
            raise ValueError(
                f"pooling={self.pooling!r} with eos_id={self.eos_id}: pooling 'eos' needs an "
                "eos_id below vocab_size, the others have none."
            )
        if self.eos_id is not None and not 0 <= self.eos_id < self.vocab_size:
            raise ValueError(
                f"eos_id={self.eos_id} is outside of a vocabulary of {self.vocab_size}."
            )
        if self.pooling == "last" and self.padding == "mask":
            raise ValueError(
                "pooling='last' reads the last position, which padding='mask' hides where a text "
                "is short: use padding='attend', or pooling 'mean' or 'map'."
            )

    @property
    def pooled_width(self) -> int:
        return self.width if self.projection is None else self.projection.width

    @property
    def block(self) -> BlockConfig:
        return BlockConfig(
            width=self.width,
            heads=self.heads,
            mlp_width=self.mlp_width,
            activation=self.activation,
            norm="layernorm",
            norm_eps=self.norm_eps,
        )


class TextOutput(NamedTuple):
    """What a text tower returns.

    Attributes:
      tokens: [B, T, D] after the final norm.
      pooled: [B, D], or [B, projection.width] where there is a projection; None where a model has
        no such vector.
      features: [F, B, T, D], outputs of the blocks asked for, before any final norm, or None.
    """

    tokens: Array
    pooled: Array | None
    features: Array | None


class TextTransformer(nnx.Module):
    """tokens [B, T] -> `TextOutput`."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        self.config = config
        width = config.width
        init = nnx.initializers.normal(0.02)
        self.token = Embedding(config.vocab_size, width, init=init, rngs=rngs)
        init = nnx.initializers.normal(0.01)  # both as in OpenAI's CLIP
        self.position = Embedding(config.max_len, width, init=init, rngs=rngs)
        self.encoder = Stack(
            config.block,
            config.depth,
            remat=config.remat,
            drop_path=config.drop_path,
            unroll=config.unroll,
            rngs=rngs,
        )
        self.final_norm = NORMS["layernorm"](width, eps=config.norm_eps)
        self.pool = AttentionPool(config.block, rngs=rngs) if config.pooling == "map" else None
        self.projection = (
            None if config.projection is None else Projection(width, config.projection, rngs=rngs)
        )

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        mask: Bool[Array, "b t"] | None = None,
        *,
        rng: Key | None = None,
        features: Sequence[int] = (),
    ) -> TextOutput:
        """See `TextOutput`.

        Args:
          mask: True at tokens, False at padding; None where there is no padding.
          rng: turns stochastic depth on.
          features: blocks whose outputs are wanted; -1 is the last, -2 the penultimate.

        Raises:
          ValueError: if the text is longer than `max_len`, or a block does not exist.
        """
        config = self.config
        length = tokens.shape[1]
        if length > config.max_len:
            raise ValueError(
                f"A text of {length} tokens is longer than the model's max_len={config.max_len}: "
                "truncate it when tokenising."
            )
        x = self.token(tokens).astype(config.dtype)
        x = x + self.position.embedding[...][:length].astype(x.dtype)
        x = constrain(x, "batch", "tokens", "embed")
        hidden = mask if config.padding == "mask" else None
        attention_mask = _MASK[config.attention](length, hidden)
        x, outputs = self.encoder.run(x, features, mask=attention_mask, rng=rng)
        x = self.final_norm(x)
        pooled = _POOL[config.pooling](self, x, tokens, mask)
        if self.projection is not None:
            pooled = self.projection(pooled)
        return TextOutput(x, pooled, outputs)


def _causal(length: int, valid: Array | None) -> masks.Mask:
    if valid is None:
        return masks.causal(length)
    return masks.blocks(jnp.ones_like(valid), group=valid)


def _bidirectional(length: int, valid: Array | None) -> masks.Mask | None:
    return None if valid is None else masks.padding(valid)


_MASK: dict[str, Callable[[int, Array | None], masks.Mask | None]] = {
    "causal": _causal,
    "bidirectional": _bidirectional,
}


def _at(x: Float[Array, "b t d"], place: Int[Array, " b"]) -> Float[Array, "b d"]:
    return jnp.take_along_axis(x, place[:, None, None], axis=1)[:, 0]


def _eos(text: TextTransformer, x: Array, tokens: Array, mask: Array | None) -> Array:
    return _at(x, jnp.argmax(tokens == text.config.eos_id, axis=1))


def _argmax(text: TextTransformer, x: Array, tokens: Array, mask: Array | None) -> Array:
    return _at(x, jnp.argmax(tokens, axis=1))


def _last(text: TextTransformer, x: Array, tokens: Array, mask: Array | None) -> Array:
    return x[:, -1]


def _mean(text: TextTransformer, x: Array, tokens: Array, mask: Array | None) -> Array:
    return masked_mean(x, mask)


def _map(text: TextTransformer, x: Array, tokens: Array, mask: Array | None) -> Array:
    if mask is None:
        return text.pool(x)
    return text.pool(x, masks.cross(jnp.ones_like(mask[:, :1]), mask))


_POOL: dict[str, Callable[[TextTransformer, Array, Array, Array | None], Array]] = {
    "eos": _eos,
    "argmax": _argmax,
    "last": _last,
    "mean": _mean,
    "map": _map,
}
