"""The loss of the next token."""

from __future__ import annotations

from collections.abc import Callable

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
    """Cross entropy of each token given what is before it, in nats, float32.

    Where few tokens are supervised most of the output head's work is for nothing, and its logits
    are the largest array of a step: with `targets` they are computed at supervised places only.

    Args:
      hidden: at each token, what its successor is predicted from.
      head: hidden vectors [..., D] -> logits [..., V].
      tokens: the stream. One outside of [0, V) makes the loss NaN where it is supervised.
      weights: of the prediction of each token; 0 where it is not supervised. That of a row's first
        token does not count.
      targets: at most so many supervised tokens are in a row; a row that has more makes the loss
        NaN. None: as many as there are places.

    Returns:
      Sums over the supervised tokens: of weight * loss, of weight, and of weight where the most
      probable token is the right one.
    """
    hidden, tokens, weights = hidden[:, :-1], tokens[:, 1:], weights[:, 1:].astype(jnp.float32)
    if targets is not None and targets < tokens.shape[1]:
        supervised = weights > 0
        # Stable: supervised places first, in their order.
        chosen = jnp.argsort(~supervised, axis=1, stable=True)[:, :targets]
        too_many = jnp.sum(supervised, axis=1, keepdims=True) > targets
        hidden = jnp.take_along_axis(hidden, chosen[:, :, None], axis=1)
        tokens = jnp.take_along_axis(tokens, chosen, axis=1)
        weights = jnp.take_along_axis(weights, chosen, axis=1)
        weights = jnp.where(too_many, jnp.nan, weights)
    logits = head(hidden).astype(jnp.float32)
    # Negative ids would count from the end; out of bounds "fill" gives NaN.
    index = jnp.where(tokens < 0, logits.shape[-1], tokens)[:, :, None]
    right = jnp.take_along_axis(logits, index, axis=-1, mode="fill")[:, :, 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - right
    # What is not supervised may hold anything.
    total = jnp.sum(jnp.where(weights == 0, 0.0, weights * losses))
    correct = jnp.sum(weights * (jnp.argmax(logits, axis=-1) == tokens))
    return total, jnp.sum(weights), correct
