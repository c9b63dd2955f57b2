"""Normalisations over the last dimension, computed in float32 whatever the input."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from mmjax.registry import Registry
from mmjax.typing import Array, Float

NORMS: Registry[type[nnx.Module]] = Registry("norm")


@NORMS.register("layernorm")
class LayerNorm(nnx.Module):
    """Zero mean, unit variance, then scale and bias (Ba et al., 2016).

    Args:
      width: of the last dimension.
      eps: added to the variance.
      each: of the dimensions before it, those that have scales and biases of their own, as heads of
        attention have in Chameleon.
    """

    def __init__(self, width: int, *, eps: float, each: tuple[int, ...] = ()):
        self.scale = nnx.Param(jnp.ones((*each, width), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((*each, width), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        y = _standardise(x.astype(jnp.float32), self.eps)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


@NORMS.register("layernorm_unbiased")
class UnbiasedLayerNorm(nnx.Module):
    """Zero mean, unit variance, then scale alone, as in MPT."""

    def __init__(self, width: int, *, eps: float):
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        y = _standardise(x.astype(jnp.float32), self.eps)
        return (y * self.scale[...]).astype(x.dtype)


@NORMS.register("rmsnorm")
class RMSNorm(nnx.Module):
    """Unit root mean square, then scale (Zhang and Sennrich, 2019), as in Llama."""

    def __init__(self, width: int, *, eps: float):
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        y = _unit_rms(x.astype(jnp.float32), self.eps)
        return (y * self.scale[...]).astype(x.dtype)


@NORMS.register("rmsnorm_offset")
class OffsetRMSNorm(nnx.Module):
    """Unit root mean square, then 1 + scale, as in Gemma: weight decay pulls to the identity."""

    def __init__(self, width: int, *, eps: float):
        self.scale = nnx.Param(jnp.zeros((width,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        y = _unit_rms(x.astype(jnp.float32), self.eps)
        return (y * (1.0 + self.scale[...].astype(jnp.float32))).astype(x.dtype)


@NORMS.register("layernorm_plain")
class PlainLayerNorm(nnx.Module):
    """Zero mean and unit variance; no parameters."""

    def __init__(self, width: int, *, eps: float):
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        return _standardise(x.astype(jnp.float32), self.eps).astype(x.dtype)


class GroupNorm(nnx.Module):
    """Zero mean, unit variance over groups of channels of a whole grid, then scale and bias (Wu and
    He, 2018).

    Args:
      width: number of channels.
      groups: a divisor of it.

    Raises:
      ValueError: if it is none.
    """

    def __init__(self, width: int, *, groups: int = 32, eps: float):
        if width % groups:
            raise ValueError(f"{width} channels do not make {groups} groups.")
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))
        self.groups, self.eps = groups, eps

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        y = x.astype(jnp.float32)
        y = y - self._mean(y)
        factor = jax.lax.rsqrt(self._mean(jnp.square(y)) + self.eps)
        return (y * (factor * self.scale[...]) + self.bias[...]).astype(x.dtype)

    def _mean(self, x: Float[Array, "b h w c"]) -> Float[Array, "b 1 1 c"]:
        """Of each channel's group. Channels first, then groups: on CPUs a mean over rows, columns
        and the channels of a group at once, with its gradient, was four times as slow."""
        means = jnp.mean(x, axis=(1, 2), keepdims=True)
        groups = means.reshape(*means.shape[:-1], self.groups, -1)
        groups = jnp.broadcast_to(jnp.mean(groups, axis=-1, keepdims=True), groups.shape)
        return groups.reshape(means.shape)


def _unit_rms(x: Float[Array, "*batch d"], eps: float) -> Float[Array, "*batch d"]:
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


# The backward pass keeps the result and one number per row; left to itself, differentiation keeps
# the input and each step of the formula as well.
@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _standardise(x: Float[Array, "*batch d"], eps: float) -> Float[Array, "*batch d"]:
    """Zero mean and unit variance over the last dimension."""
    return _standardise_with_factor(x, eps)[0]


def _standardise_with_factor(x: Array, eps: float) -> tuple[Array, Array]:
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    factor = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    return centred * factor, factor


@_standardise.defjvp
def _standardise_jvp(eps: float, primals: tuple[Array], tangents: tuple[Array]):
    y, factor = _standardise_with_factor(*primals, eps)
    (t,) = tangents
    along = jnp.mean(y * t, axis=-1, keepdims=True)
    return y, factor * (t - jnp.mean(t, axis=-1, keepdims=True) - y * along)
