"""Losses of images that are made anew: of pixels, of features, and of a discriminator.

Each gives one number per image, so that sums over batches stay exact.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mmjax.typing import Array, Float


def absolute_error(
    made: Float[Array, "b h w c"], images: Float[Array, "b h w c"]
) -> Float[Array, " b"]:
    """The mean over pixels and channels (L1)."""
    return jnp.mean(jnp.abs(_difference(made, images)), axis=(1, 2, 3))


def squared_error(
    made: Float[Array, "b h w c"], images: Float[Array, "b h w c"]
) -> Float[Array, " b"]:
    """The mean over pixels and channels (L2)."""
    return jnp.mean(jnp.square(_difference(made, images)), axis=(1, 2, 3))


def perceptual_distance(
    made: Float[Array, "f b n d"], features: Float[Array, "f b n d"]
) -> Float[Array, " b"]:
    """How far apart the features of an encoder are, after Zhang et al., "The Unreasonable
    Effectiveness of Deep Features as a Perceptual Metric" (2018): squared distances of unit
    vectors, the mean over places, added over layers. All channels weigh the same.

    Args:
      made: features of the images that were made, of F layers at N places.
      features: those of the images themselves.
    """
    squares = jnp.sum(jnp.square(_unit(made) - _unit(features)), axis=-1)
    return jnp.sum(jnp.mean(squares, axis=-1), axis=0)


def hinge_real(scores: Float[Array, "b h w"]) -> Float[Array, " b"]:
    """What a discriminator minimises on real images: max(0, 1 - score), the mean over places."""
    return jnp.mean(jax.nn.relu(1 - scores.astype(jnp.float32)), axis=(1, 2))


def hinge_made(scores: Float[Array, "b h w"]) -> Float[Array, " b"]:
    """And on those that were made: max(0, 1 + score)."""
    return jnp.mean(jax.nn.relu(1 + scores.astype(jnp.float32)), axis=(1, 2))


def hinge_generator(scores: Float[Array, "b h w"]) -> Float[Array, " b"]:
    """What minimises who makes them: -score."""
    return -jnp.mean(scores.astype(jnp.float32), axis=(1, 2))


def _difference(made: Array, images: Array) -> Array:
    return made.astype(jnp.float32) - images.astype(jnp.float32)


def _unit(x: Array) -> Array:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-10)
