"""Mixtures of the language model's own token embeddings: the connector of AlignVLM.

Masry et al., "AlignVLM: Bridging Vision and Language Latent Spaces for Multimodal Document
Understanding" (2025): each feature becomes a distribution over the vocabulary,
softmax(LayerNorm(W2 LayerNorm(W1 f))), and its token is the mean of the embeddings under it. So
visual tokens stay where the language model has its words, and what it does with a word in a text,
to find it again for instance, it can do with a picture of the thing.

W2 begins as the output head of the language model, and the embeddings are its own. A connector
knows no language model, so both tables are parameters here, which rows of `config.init` fill:
("connector/(head|token)/embedding", LM, "token/embedding").
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from mmjax.connectors.base import (
    CONNECTORS,
    Connector,
    ConnectorConfig,
    Grid,
    all_valid,
    at_least_one,
)
from mmjax.nn.linear import Embedding, Linear, project
from mmjax.nn.norm import NORMS
from mmjax.typing import Array, Bool, Float


@dataclasses.dataclass(frozen=True)
class AlignConfig(ConnectorConfig):
    """
    Attributes:
      vocab_size: that of the language model.
    """

    vocab_size: int
    name: str = dataclasses.field(default="align", init=False)

    def __post_init__(self):
        at_least_one(vocab_size=self.vocab_size)

    @property
    def names_words(self) -> bool:
        return True

    def tokens(self, grid: Grid, extra: int = 0) -> int:
        return extra + grid[0] * grid[1]


@CONNECTORS.register("align")
class Align(Connector):
    """Each feature becomes a token, a convex combination of the rows of `token`."""

    def __init__(self, config: AlignConfig, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        init = nnx.initializers.normal(outputs**-0.5)
        self.hidden = Linear(inputs, outputs, rngs=rngs)
        self.norm = NORMS["layernorm"](outputs, eps=1e-5)
        self.head = Embedding(config.vocab_size, outputs, init=init, rngs=rngs)
        self.head_norm = NORMS["layernorm"](config.vocab_size, eps=1e-5)
        self.token = Embedding(config.vocab_size, outputs, init=init, rngs=rngs)

    def name(
        self, features: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None, grid: Grid
    ) -> Float[Array, "b m v"]:
        hidden = self.norm(self.hidden(features))
        logits = project(hidden, self.head.embedding[...].T, jnp.float32)
        return jax.nn.log_softmax(self.head_norm(logits), axis=-1)

    def __call__(
        self, features: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None, grid: Grid
    ) -> tuple[Float[Array, "b m e"], Bool[Array, "b m"]]:
        shares = jnp.exp(self.name(features, mask, grid)).astype(features.dtype)
        tokens = project(shares, self.token.embedding[...])
        return tokens, all_valid(tokens) if mask is None else mask
