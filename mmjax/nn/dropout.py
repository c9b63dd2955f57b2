"""Regularisers that drop things: numbers, paths of a residual network, patches of an image."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mmjax.typing import Array, Float, Key


def check_rate(name: str, rate: float) -> None:
    """Raises ValueError unless 0 <= rate < 1."""
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"{name}={rate} must be at least 0 and below 1.")


def dropout(x: Float[Array, "*b"], rate: float, rng: Key) -> Float[Array, "*b"]:
    """Numbers become zero, each by itself (Srivastava et al., 2014); the others are scaled by
    1 / (1 - rate)."""
    keep = jax.random.bernoulli(rng, 1.0 - rate, x.shape)
    return jnp.where(keep, x * jnp.asarray(1.0 / (1.0 - rate), x.dtype), jnp.zeros_like(x))


def drop_path(
    x: Float[Array, "b n d"], rate: float | Float[Array, ""], rng: Key
) -> Float[Array, "b n d"]:
    """Stochastic depth (Huang et al., 2016): whole samples of a residual branch become zero.

    What is kept is scaled by 1 / (1 - rate), so that the expectation does not change.
    """
    keep = jax.random.bernoulli(rng, 1.0 - rate, (x.shape[0], 1, 1))
    scale = jnp.asarray(1.0 / (1.0 - rate), x.dtype)
    return jnp.where(keep, x * scale, jnp.zeros_like(x))


def drop_patches(x: Float[Array, "b n d"], rate: float, rng: Key) -> Float[Array, "b m d"]:
    """Keep a random subset of the tokens, another one for each sample (Li et al., FLIP, 2022).

    The number kept, max(1, round((1 - rate) * n)), is the same for all; order is preserved.
    """
    batch, count, _ = x.shape
    kept = max(1, round((1.0 - rate) * count))
    order = jnp.argsort(jax.random.uniform(rng, (batch, count)), axis=1)
    chosen = jnp.sort(order[:, :kept], axis=1)
    return jnp.take_along_axis(x, chosen[:, :, None], axis=1)
