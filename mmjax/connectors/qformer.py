"""A Q-Former: learned queries that look at the features of an image, and may read the question too.

Li et al., "BLIP-2: Bootstrapping Language-Image Pre-training with Frozen Image Encoders and Large
Language Models" (2023); with text, Dai et al., "InstructBLIP: Towards General-purpose
Vision-Language Models with Instruction Tuning" (2023). It is a BERT whose tokens are the queries,
then those of the text: all attend to each other, and in every second block the queries attend to
the features. Queries and text have MLPs of their own.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx

from mmjax.connectors.base import (
    CONNECTORS,
    Connector,
    ConnectorConfig,
    ConnectorError,
    Grid,
    all_valid,
    at_least_one,
    check_heads,
)
from mmjax.nn import masks
from mmjax.nn.attention import Attention
from mmjax.nn.linear import Embedding, Linear
from mmjax.nn.masks import Mask
from mmjax.nn.mlp import MLP
from mmjax.nn.norm import NORMS
from mmjax.nn.stack import Stack
from mmjax.typing import Array, Bool, Float, Int

INIT = nnx.initializers.normal(0.02)  # as in BERT


@dataclasses.dataclass(frozen=True)
class QFormerConfig(ConnectorConfig):
    """Its defaults are BLIP-2's.

    Attributes:
      queries: number of them, and of the tokens made of an image.
      width, depth, heads, mlp_width: of the transformer.
      cross_every: the first of so many blocks attends to the features.
      activation: a name in `mmjax.nn.mlp.ACTIVATIONS`.
      norm_eps: of all layer norms.
      vocab_size: of the texts it reads; None if it reads none.
      max_len: the longest of them, in tokens.
    """

    queries: int = 32
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_width: int = 3072
    cross_every: int = 2
    activation: str = "gelu"
    norm_eps: float = 1e-12
    vocab_size: int | None = None
    max_len: int = 512
    name: str = dataclasses.field(default="qformer", init=False)

    def __post_init__(self):
        at_least_one(queries=self.queries, depth=self.depth, cross_every=self.cross_every)
        check_heads(self.heads, self.width)

    def tokens(self, grid: Grid, extra: int = 0) -> int:
        return self.queries

    @property
    def reads_text(self) -> bool:
        return self.vocab_size is not None

    @property
    def group(self) -> int:
        """Blocks of a group, of which the first attends to the features."""
        return min(self.cross_every, self.depth)


@CONNECTORS.register("qformer")
class QFormer(Connector):
    """Each query becomes a token, of any number of features."""

    def __init__(self, config: QFormerConfig, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.config = config
        self.reads_text = config.reads_text
        width = config.width

        def table(count: int) -> Embedding:
            return Embedding(count, width, init=INIT, rngs=rngs)

        self.queries = nnx.Param(INIT(rngs.params(), (config.queries, width), jnp.float32))
        self.token = table(config.vocab_size) if config.reads_text else None
        self.position = table(config.max_len) if config.reads_text else None
        self.embed_norm = NORMS["layernorm"](width, eps=config.norm_eps)
        groups, rest = divmod(config.depth, config.group)
        self.groups = Stack(
            GroupConfig(config, inputs, config.group), groups, block=Group, rngs=rngs
        )
        # The blocks after the last whole group.
        self.rest = Group(GroupConfig(config, inputs, rest), rngs=rngs) if rest else None
        self.projection = Linear(width, outputs, rngs=rngs)

    def __call__(
        self,
        features: Float[Array, "b n d"],
        mask: Bool[Array, "b n"] | None,
        grid: Grid,
        *,
        text: Int[Array, "b l"] | None = None,
        text_mask: Bool[Array, "b l"] | None = None,
    ) -> tuple[Float[Array, "b m e"], Bool[Array, "b m"]]:
        """
        Args:
          text: tokens of the question to each image.
          text_mask: True at tokens, False at padding; None where there is none.

        Raises:
          ConnectorError: if there is text which it does not read, or too long a text.
        """
        batch, queries = features.shape[0], self.config.queries
        x = jnp.broadcast_to(self.queries[...], (batch, *self.queries.shape))
        own = None
        if text is not None:
            x = jnp.concatenate([x, self._embed(text)], axis=1)
            if text_mask is not None:
                own = masks.padding(
                    jnp.concatenate([jnp.ones((batch, queries), bool), text_mask], axis=1)
                )
        x = self.embed_norm(x).astype(features.dtype)
        context = Context(features)
        if mask is not None:
            context = Context(features, masks.cross(jnp.ones((batch, queries), bool), mask))
        x, _ = self.groups.run(x, (), mask=own, context=context)
        if self.rest is not None:
            x = self.rest(x, mask=own, context=context)
        tokens = self.projection(x[:, :queries])
        return tokens, all_valid(tokens)

    def _embed(self, text: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        if self.token is None:
            raise ConnectorError(
                "This Q-Former reads no text: leave it out, or give its config a vocab_size."
            )
        length, limit = text.shape[1], self.config.max_len
        if length > limit:
            raise ConnectorError(
                f"A text of {length} tokens is longer than the Q-Former's max_len={limit}: "
                "truncate it when tokenising."
            )
        return self.token(text) + self.position(jnp.arange(length, dtype=jnp.int32))


class Context(NamedTuple):
    """The features that queries attend to, and the mask from queries to them."""

    features: Array
    mask: Mask | None = None


class GroupConfig(NamedTuple):
    """Of a group of blocks.

    Attributes:
      inputs: width of the features.
      blocks: their number.
    """

    qformer: QFormerConfig
    inputs: int
    blocks: int


class Group(nnx.Module):
    """Blocks of which the first attends to the features: what is repeated in a Q-Former."""

    def __init__(self, config: GroupConfig, *, rngs: nnx.Rngs):
        self.blocks = nnx.List(
            QFormerBlock(config.qformer, config.inputs, cross=block == 0, rngs=rngs)
            for block in range(config.blocks)
        )

    def __call__(
        self, x: Float[Array, "b n d"], *, mask: Mask | None, context: Context, **unused: None
    ) -> Float[Array, "b n d"]:
        """`unused`: what a stack offers to blocks, and these do not have."""
        for block in self.blocks:
            x = block(x, mask, context)
        return x


class QFormerBlock(nnx.Module):
    """Attention of the stream to itself, of its queries to the features, and an MLP for each kind.

    Each is added to the stream, which is then normalised, as in BERT.
    """

    def __init__(self, config: QFormerConfig, inputs: int, *, cross: bool, rngs: nnx.Rngs):
        width = config.width

        def norm() -> nnx.Module:
            return NORMS["layernorm"](width, eps=config.norm_eps)

        def mlp() -> MLP:
            return MLP(width, config.mlp_width, activation=config.activation, rngs=rngs)

        self.queries = config.queries
        self.attention, self.attention_norm = Attention(width, config.heads, rngs=rngs), norm()
        self.cross = (
            Attention(width, config.heads, context_width=inputs, rngs=rngs) if cross else None
        )
        self.cross_norm = norm() if cross else None
        self.mlp, self.mlp_norm = mlp(), norm()
        self.text_mlp = mlp() if config.reads_text else None
        self.text_norm = norm() if config.reads_text else None

    def __call__(
        self, x: Float[Array, "b n d"], mask: Mask | None, context: Context
    ) -> Float[Array, "b n d"]:
        x = self.attention_norm(x + self.attention(x, mask=mask))
        queries, text = x[:, : self.queries], x[:, self.queries :]
        if self.cross is not None:
            seen = self.cross(queries, context.features, mask=context.mask)
            queries = self.cross_norm(queries + seen)
        queries = self.mlp_norm(queries + self.mlp(queries))
        if text.shape[1] == 0:
            return queries
        text = self.text_norm(text + self.text_mlp(text))
        return jnp.concatenate([queries, text], axis=1)
