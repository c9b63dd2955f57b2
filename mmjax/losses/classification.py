"""Cross entropy for classifiers."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mmjax.typing import Array, Bool, Float, Int


def softmax_cross_entropy(
    logits: Float[Array, "b k"],
    labels: Int[Array, " b"],
    *,
    mask: Bool[Array, " b"] | None = None,
    label_smoothing: float = 0.0,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Cross entropy with label smoothing (Szegedy et al. 2016, arXiv:1512.00567, section 7).

    Args:
      logits: any float type; computed in float32.
      labels: class indices. One outside of [0, k) makes the loss NaN: it cannot be raised from
        compiled code, and must not be learnt from silently.
      mask: True = counts. Rows that only fill up a batch are False.
      label_smoothing: share of the target spread evenly over all k classes.

    Returns:
      (sum over the rows that count, in nats, number of such rows), float32 scalars.

    Raises:
      ValueError: if label_smoothing is not in [0, 1).
    """
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}.")
    classes = logits.shape[-1]
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    # Negative indices would count from the end; send them out of bounds, where "fill" gives NaN.
    index = jnp.where(labels < 0, classes, labels)[:, None]
    log_p_label = jnp.take_along_axis(log_p, index, axis=-1, mode="fill")[:, 0]
    losses = -(1.0 - label_smoothing) * log_p_label
    if label_smoothing:
        losses -= label_smoothing * jnp.mean(log_p, axis=-1)
    if mask is None:
        return jnp.sum(losses), jnp.float32(len(labels))
    return jnp.sum(jnp.where(mask, losses, 0.0)), jnp.sum(mask, dtype=jnp.float32)
