"""Normalisations over the last dimension, computed in float32 whatever the input."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from mmjax.registry import Registry
from mmjax.typing import Array, Float

NORMS: Registry[type[nnx.Module]] = Registry("norm")


@NORMS.register("layernorm")
class LayerNorm(nnx.Module):
    """Zero mean, unit variance, then scale and bias (Ba et al., 2016)."""

    def __init__(self, width: int, *, eps: float):
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


@NORMS.register("rmsnorm")
class RMSNorm(nnx.Module):
    """Unit root mean square, then scale (Zhang and Sennrich, 2019), as in Llama."""

    def __init__(self, width: int, *, eps: float):
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return (y * self.scale[...]).astype(x.dtype)
