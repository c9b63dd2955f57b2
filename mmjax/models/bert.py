"""BERT (Devlin et al., 2018): a text encoder, and with pooling a sentence encoder (MiniLM).

RoBERTa and XLM-RoBERTa are the same network that counts positions in another way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from flax import nnx

from mmjax.models.checks import check_dtype
from mmjax.models.contrastive import unit
from mmjax.models.projection import Projection, ProjectionConfig
from mmjax.models.text import TextOutput
from mmjax.nn import masks
from mmjax.nn.linear import Embedding
from mmjax.nn.norm import NORMS
from mmjax.nn.partition import constrain
from mmjax.nn.pooling import masked_mean
from mmjax.nn.stack import BlockConfig, Stack
from mmjax.registry import check_choice
from mmjax.typing import Array, Bool, Float, Int, Key

POSITIONS = ("absolute", "offset")
POOLINGS = ("mean", "cls")


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Everything that decides what a BERT computes.

    Attributes:
      vocab_size: number of tokens.
      max_len: the longest text, in tokens.
      width, depth, heads, mlp_width: of the transformer.
      activation: a name in `mmjax.nn.mlp.ACTIVATIONS`.
      norm_eps: of all layer norms.
      token_types: number of segments a text may have: 2 in BERT, 1 in XLM-RoBERTa.
      positions: "absolute" (0, 1, 2, ...) or "offset" (RoBERTa: tokens other than `pad_id` are
        counted from pad_id + 1, and padding stands at pad_id).
      pad_id: of the padding token; for positions "offset".
      pooler: whether there is a dense layer with tanh on the first token.
      pooling: what `encode_text` makes a sentence's vector of: "mean" (of the tokens that the mask
        calls valid, as sentence-transformers does for MiniLM) or "cls" (the first token).
      remat, unroll, dtype, drop_path: as in `ViTConfig`.
    """

    vocab_size: int
    max_len: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    activation: str = "gelu"
    norm_eps: float = 1e-12
    token_types: int = 2
    positions: str = "absolute"
    pad_id: int | None = None
    pooler: bool = True
    pooling: str = "mean"
    drop_path: float = 0.0
    remat: str = "none"
    unroll: int = 1
    dtype: str = "float32"

    def __post_init__(self):
        check_choice("positions", self.positions, POSITIONS)
        check_choice("pooling", self.pooling, POOLINGS)
        check_dtype(self.dtype)
        if self.positions == "offset" and self.pad_id is None:
            raise ValueError("positions='offset' counts from the padding token: give pad_id.")
        if self.pad_id is not None and not 0 <= self.pad_id < self.vocab_size:
            raise ValueError(
                f"pad_id={self.pad_id} is outside of a vocabulary of {self.vocab_size}."
            )
        if self.max_len < 1:
            raise ValueError(f"max_len={self.max_len} must be at least 1.")

    @property
    def first_position(self) -> int:
        """Row of the position table at which the first token of a text stands."""
        return 0 if self.positions == "absolute" else self.pad_id + 1

    @property
    def block(self) -> BlockConfig:
        return BlockConfig(
            width=self.width,
            heads=self.heads,
            mlp_width=self.mlp_width,
            activation=self.activation,
            norm="layernorm",
            norm_eps=self.norm_eps,
            norm_placement="post",
        )


class Bert(nnx.Module):
    """tokens [B, T] -> `TextOutput`, whose `pooled` is the pooler's output or None."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        self.config = config
        width = config.width

        def table(count: int) -> Embedding:
            return Embedding(count, width, init=nnx.initializers.normal(0.02), rngs=rngs)

        self.token = table(config.vocab_size)
        self.position = table(config.first_position + config.max_len)
        self.token_type = table(config.token_types)
        self.embed_norm = NORMS["layernorm"](width, eps=config.norm_eps)
        self.encoder = Stack(
            config.block,
            config.depth,
            remat=config.remat,
            drop_path=config.drop_path,
            unroll=config.unroll,
            rngs=rngs,
        )
        pooler = ProjectionConfig(width, activation="tanh")
        self.pooler = Projection(width, pooler, rngs=rngs) if config.pooler else None

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        mask: Bool[Array, "b t"] | None = None,
        token_types: Int[Array, "b t"] | None = None,
        *,
        rng: Key | None = None,
        features: Sequence[int] = (),
    ) -> TextOutput:
        """See `TextOutput`; what stands at padding is of no meaning.

        Args:
          mask: True at tokens, False at padding; None where there is no padding.
          token_types: the segment each token belongs to; 0 if None.
          rng: turns stochastic depth on.
          features: blocks whose outputs are wanted; -1 is the last, -2 the penultimate.

        Raises:
          ValueError: if the text is longer than `max_len`, or a block does not exist.
        """
        config = self.config
        if tokens.shape[1] > config.max_len:
            raise ValueError(
                f"A text of {tokens.shape[1]} tokens is longer than the model's "
                f"max_len={config.max_len}: truncate it when tokenising."
            )
        token_types = jnp.zeros_like(tokens) if token_types is None else token_types
        x = self.token(tokens) + self.position(_PLACES[config.positions](config, tokens))
        x = self.embed_norm((x + self.token_type(token_types)).astype(config.dtype))
        x = constrain(x, "batch", "tokens", "embed")
        attention_mask = None if mask is None else masks.padding(mask)
        x, outputs = self.encoder.run(x, features, mask=attention_mask, rng=rng)
        pooled = None if self.pooler is None else self.pooler(x[:, 0])
        return TextOutput(x, pooled, outputs)

    def encode_text(
        self,
        tokens: Int[Array, "b t"],
        mask: Bool[Array, "b t"] | None = None,
        token_types: Int[Array, "b t"] | None = None,
        *,
        rng: Key | None = None,
    ) -> Float[Array, "b d"]:
        """Sentence vectors of unit length, float32, as sentence-transformers computes them."""
        x = self(tokens, mask, token_types, rng=rng).tokens
        return unit(_POOL[self.config.pooling](x, mask))


def _offset(config: BertConfig, tokens: Int[Array, "b t"]) -> Int[Array, "b t"]:
    token = (tokens != config.pad_id).astype(jnp.int32)
    return jnp.cumsum(token, axis=1) * token + config.pad_id


_PLACES: dict[str, Callable[[BertConfig, Array], Array]] = {
    "absolute": lambda config, tokens: jnp.arange(tokens.shape[1], dtype=jnp.int32)[None],
    "offset": _offset,
}

_POOL: dict[str, Callable[[Array, Array | None], Array]] = {
    "mean": masked_mean,
    "cls": lambda x, mask: x[:, 0],
}
