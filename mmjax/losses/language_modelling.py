"""The loss of the next token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mmjax.typing import Array, Float, Int


def next_token_loss(
    hidden: Float[Array, "b t d"],
    head: Callable[[Array], Array],
    tokens: Int[Array, "b t"],
    weights: Float[Array, "b t"],
    *,
    targets: int | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """The sum of `next_token_losses`, whose arguments it has.

    Returns:
      Sums over the supervised tokens: of weight * loss, of weight, and of weight where the most
      probable token is the right one.
    """
    each = next_token_losses(hidden, head, tokens, weights, targets=targets)
    return jnp.sum(each.loss), jnp.sum(each.weight), jnp.sum(each.weight * each.correct)


class TokenLosses(NamedTuple):
    """Of the tokens that were looked at, in each row.

    Attributes:
      loss: [B, N] float32, weight * loss; 0 where a token is not supervised.
      weight: [B, N] float32.
      correct: [B, N], whether no token is more probable than the right one.
      normaliser: [B, N] float32, logsumexp of the logits: its square, made small, keeps logits from
        drifting apart ("z-loss": Chowdhery et al., PaLM, 2022; Chameleon).
      tokens: [B, N], the right ones.
    """

    loss: Array
    weight: Array
    correct: Array
    normaliser: Array
    tokens: Array


def next_token_losses(
    hidden: Any,
    head: Callable[[Any], Array],
    tokens: Int[Array, "b t"],
    weights: Float[Array, "b t"],
    *,
    targets: int | None = None,
) -> TokenLosses:
    """Cross entropy of each token given what is before it, in nats, float32.

    Where few tokens are supervised most of the output head's work is for nothing, and its logits
    are the largest array of a step: with `targets` they are computed at supervised places only.

    Args:
      hidden: at each token, what its successor is predicted from: [B, T, D], or arrays [B, T, ...].
      head: hidden -> logits [..., V].
      tokens: the stream. One outside of [0, V) makes the loss NaN where it is supervised.
      weights: of the prediction of each token; 0 where it is not supervised. That of a row's first
        token does not count.
      targets: at most so many supervised tokens are in a row; a row that has more makes the loss
        NaN. None: as many as there are places.
    """
    hidden = jax.tree.map(lambda x: x[:, :-1], hidden)
    tokens, weights = tokens[:, 1:], weights[:, 1:].astype(jnp.float32)
    if targets is not None and targets < tokens.shape[1]:
        supervised = weights > 0
        # Stable: supervised places first, in their order.
        chosen = jnp.argsort(~supervised, axis=1, stable=True)[:, :targets]
        too_many = jnp.sum(supervised, axis=1, keepdims=True) > targets
        hidden = jax.tree.map(
            lambda x: jnp.take_along_axis(
                x, chosen.reshape(*chosen.shape, *[1] * (x.ndim - 2)), axis=1
            ),
            hidden,
        )
        tokens = jnp.take_along_axis(tokens, chosen, axis=1)
        weights = jnp.take_along_axis(weights, chosen, axis=1)
        weights = jnp.where(too_many, jnp.nan, weights)
    logits = head(hidden).astype(jnp.float32)
    # Negative ids would count from the end; out of bounds "fill" gives NaN.
    index = jnp.where(tokens < 0, logits.shape[-1], tokens)[:, :, None]
    right = jnp.take_along_axis(logits, index, axis=-1, mode="fill")[:, :, 0]
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    # What is not supervised may hold anything.
    losses = jnp.where(weights == 0, 0.0, weights * (normaliser - right))
    # Of equally probable tokens any is right: to find the first takes a CPU twenty times as long.
    correct = right >= jnp.max(logits, axis=-1)
    return TokenLosses(losses, weights, correct, normaliser, tokens)
