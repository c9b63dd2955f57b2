"""What the two-tower models have in common."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from mmjax.typing import Array, Float


def unit(x: Float[Array, "b d"]) -> Float[Array, "b d"]:
    """Rows of length 1, float32; a row of zeros stays one, with finite gradients."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=1, keepdims=True), 1e-24))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def at_most(x: Float[Array, ""], limit: float) -> Float[Array, ""]:
    """min(x, limit), whose gradient is not lost at the limit: it still leads back from there.

    Equal to clamping the parameter after each update, as OpenAI's CLIP does: beyond the limit,
    gradients that would lead further away are zero, the others pass.
    """
    return jnp.minimum(x, limit)


def _forward(x: Array, limit: float) -> tuple[Array, Array]:
    return jnp.minimum(x, limit), x


def _backward(limit: float, x: Array, gradient: Array) -> tuple[Array]:
    # A descending step goes against the gradient: a positive one lowers x.
    return (jnp.where((x < limit) | (gradient > 0), gradient, 0.0),)


at_most.defvjp(_forward, _backward)
