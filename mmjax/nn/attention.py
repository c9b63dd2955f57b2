"""Attention: the layer, and the one function that chooses a kernel for it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from mmjax.nn import backend
from mmjax.nn.linear import XAVIER, Linear
from mmjax.nn.masks import Mask
from mmjax.nn.norm import NORMS
from mmjax.nn.partition import constrain
from mmjax.nn.position import rotary
from mmjax.registry import Registry
from mmjax.typing import Array, Float, Int

# Names the operations of causal attention in traced programs, for those who count FLOPs.
CAUSAL_SCOPE = "causal_attention"

KERNELS: Registry[Callable[..., Array]] = Registry("attention kernel")


def attend(
    query: Float[Array, "b q h d"],
    key: Float[Array, "b k g d"],
    value: Float[Array, "b k g d"],
    mask: Mask | None = None,
    *,
    scale: float | None = None,
    kernel: str | None = None,
) -> Float[Array, "b q h d"]:
    """Scaled dot-product attention, by the fastest kernel that is correct for its arguments.

    Heads of the query share the key and value heads in groups where there are fewer of those.
    The softmax is in float32. Queries that the mask lets attend to nothing get zeros.

    Args:
      scale: of the logits; 1 / sqrt(d) if None.
      kernel: a name in `KERNELS` instead of the choice.

    Raises:
      ValueError: if the query heads are no multiple of the key heads.
    """
    heads, kv_heads = query.shape[2], key.shape[2]
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads are no multiple of {kv_heads} key/value heads.")
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    name = pick_kernel(query, key, mask) if kernel is None else kernel
    causal = mask is not None and mask.triangle
    with jax.named_scope(CAUSAL_SCOPE) if causal else contextlib.nullcontext():
        return KERNELS[name](query, key, value, mask, scale)


def pick_kernel(query: Array, key: Array, mask: Mask | None) -> str:
    """Flash attention ("cudnn") where that handles the arguments, "cpu" on CPUs, else "xla"."""
    if backend.platform() == "cpu":
        return "cpu"
    # With a bias, which is how a general mask reaches it, cuDNN trains even lengths only.
    lengths = mask is None or mask.triangle or query.shape[1] % 2 == key.shape[1] % 2 == 0
    fits = query.shape[-1] % 8 == 0 and query.shape[-1] <= 128
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    return "cudnn" if backend.platform() == "gpu" and half and fits and lengths else "xla"


@KERNELS.register("xla")
def _xla(query: Array, key: Array, value: Array, mask: Mask | None, scale: float) -> Array:
    batch, length, heads, width = query.shape
    kv_heads = key.shape[2]
    query = query.reshape(batch, length, kv_heads, heads // kv_heads, width)
    logits = scale * jnp.einsum("bqhgd,bkhd->bhgqk", query, key, preferred_element_type=jnp.float32)
    if mask is None:
        weights = jax.nn.softmax(logits)
    else:
        allowed = mask.dense()[:, None, None]
        # Finite, so that a row with nothing to attend to has no NaN, nor have its gradients.
        weights = jax.nn.softmax(jnp.where(allowed, logits, jnp.finfo(jnp.float32).min))
        if not mask.triangle:
            weights = jnp.where(allowed, weights, 0.0)
    out = jnp.einsum("bhgqk,bkhd->bqhgd", weights.astype(value.dtype), value)
    return out.reshape(batch, length, heads, width)


@KERNELS.register("cpu")
def _cpu(query: Array, key: Array, value: Array, mask: Mask | None, scale: float) -> Array:
    batch, length, heads, width = query.shape
    kv_heads = key.shape[2]

    def rows(x: Array) -> Array:
        """[B, N, H, d] -> [B, K, G * N, d]: heads that share keys are further rows of queries."""
        x = x.reshape(batch, x.shape[1], kv_heads, -1, width).transpose(0, 2, 3, 1, 4)
        return x.reshape(batch, kv_heads, -1, width)

    allowed = None
    if mask is not None:
        allowed = jnp.tile(mask.dense(), (1, heads // kv_heads, 1))[:, None]
    out = _head_by_head(rows(query) * scale, rows(key), rows(value), allowed)
    out = out.reshape(batch, kv_heads, heads // kv_heads, length, width)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, width)


# XLA's CPU backend multiplies matrices fast only where they stand one after the other, and what it
# makes of the derivative of a softmax reads [N, N] arrays several times. With heads first and the
# derivative written out, attention of a ViT-S/16 trains more than twice as fast.
@jax.custom_vjp
def _head_by_head(query: Array, key: Array, value: Array, allowed: Array | None) -> Array:
    """softmax(query @ key^T) @ value for operands [B, H, N, d] and a mask [B, 1, N, K]."""
    return _head_by_head_forward(query, key, value, allowed)[0]


def _head_by_head_forward(query: Array, key: Array, value: Array, allowed: Array | None):
    logits = _matmul(query, key, (3, 3))
    if allowed is not None:
        logits = jnp.where(allowed, logits, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    if allowed is not None:
        weights = jnp.where(allowed, weights, 0.0)
    # A row with nothing to attend to has weights of 0 over a sum of 0.
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / (total if allowed is None else jnp.where(total == 0, 1.0, total))
    out = _matmul(weights.astype(value.dtype), value, (3, 2)).astype(value.dtype)
    return out, (query, key, value, weights, out)


def _head_by_head_backward(saved: tuple[Array, ...], gradient: Array):
    query, key, value, weights, out = saved
    d_value = _matmul(weights.astype(gradient.dtype), gradient, (2, 2))
    d_weights = _matmul(gradient, value, (3, 3))
    # Each row of softmax's derivative needs sum(weights * d_weights), which is sum(out * gradient).
    inner = jnp.sum(gradient.astype(jnp.float32) * out, axis=-1, keepdims=True)
    d_logits = (weights * (d_weights - inner)).astype(query.dtype)
    d_query = _matmul(d_logits, key, (3, 2))
    d_key = _matmul(d_logits, query, (2, 2))
    gradients = (d_query, d_key, d_value)
    return *(d.astype(x.dtype) for d, x in zip(gradients, (query, key, value), strict=True)), None


def _matmul(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """Contracts one of the last two dimensions of [B, H, ., .] operands; float32 results."""
    dims = (((contract[0],), (contract[1],)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


_head_by_head.defvjp(_head_by_head_forward, _head_by_head_backward)


@KERNELS.register("cudnn")
def _cudnn(query: Array, key: Array, value: Array, mask: Mask | None, scale: float) -> Array:
    if mask is None or mask.triangle:
        return jax.nn.dot_product_attention(
            query, key, value, scale=scale, is_causal=mask is not None, implementation="cudnn"
        )
    allowed = mask.dense()[:, None]
    out = jax.nn.dot_product_attention(
        query, key, value, mask=allowed, scale=scale, implementation="cudnn"
    )
    # Its masking is a large negative bias: a row with nothing to attend to is a mean of all.
    return jnp.where(jnp.any(allowed, axis=3)[:, 0, :, None, None], out, 0)


class Attention(nnx.Module):
    """Multi-head or grouped-query attention, of a stream to itself or to another.

    Args:
      width: of the queries' stream and of the output.
      heads: number of query heads.
      kv_heads: number of key and value heads; as many as query heads if None.
      head_dim: width of a head; width / heads if None.
      context_width: width of the stream attended to, where it is another one.
      bias: whether the four linear maps have biases.
      qk_norm: a name in `NORMS`: queries and keys are normalised over each head's width.
      norm_eps: of those norms.
      rope_theta: base of the rotary embedding; None for no rotation.

    Raises:
      ValueError: if the heads do not divide the width, or the query heads not into groups; if a
        rotary embedding is asked for with another stream or with an odd head_dim.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        context_width: int | None = None,
        bias: bool = True,
        qk_norm: str | None = None,
        norm_eps: float = 1e-6,
        rope_theta: float | None = None,
        rngs: nnx.Rngs,
    ):
        if head_dim is None and width % heads:
            raise ValueError(
                f"{heads} heads do not divide a width of {width}: choose a divisor or a head_dim."
            )
        kv_heads = heads if kv_heads is None else kv_heads
        if heads % kv_heads:
            raise ValueError(f"{heads} query heads are no multiple of {kv_heads} key/value heads.")
        head_dim = width // heads if head_dim is None else head_dim
        if rope_theta is not None and head_dim % 2:
            raise ValueError(f"A rotary embedding needs an even head_dim, not {head_dim}.")
        if rope_theta is not None and context_width is not None:
            raise ValueError(
                "A rotary embedding needs positions that both streams share: it is "
                "for self-attention only. Leave out rope_theta or context_width."
            )
        context_width = width if context_width is None else context_width
        self.heads = heads
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.rope_theta = rope_theta

        def linear(inputs: int, outputs: int) -> Linear:
            return Linear(inputs, outputs, bias=bias, kernel_init=XAVIER, rngs=rngs)

        self.query = linear(width, heads * head_dim)
        self.key = linear(context_width, kv_heads * head_dim)
        self.value = linear(context_width, kv_heads * head_dim)
        self.out = linear(heads * head_dim, width)
        self.query_norm = None if qk_norm is None else NORMS[qk_norm](head_dim, eps=norm_eps)
        self.key_norm = None if qk_norm is None else NORMS[qk_norm](head_dim, eps=norm_eps)

    def __call__(
        self,
        x: Float[Array, "b q d"],
        context: Float[Array, "b k e"] | None = None,
        *,
        mask: Mask | None = None,
        positions: Int[Array, "#b q"] | None = None,
    ) -> Float[Array, "b q d"]:
        """Attend from `x` to `context`, or to `x` itself where there is none.

        Args:
          positions: of the tokens, for the rotary embedding; 0, 1, 2, ... if None.
        """
        context = x if context is None else context
        query = self._split(self.query(x), self.heads)
        key = self._split(self.key(context), self.kv_heads)
        value = self._split(self.value(context), self.kv_heads)
        if self.query_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.rope_theta is not None:
            if positions is None:
                positions = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
            query = rotary(query, positions, self.rope_theta)
            key = rotary(key, positions, self.rope_theta)
        out = attend(query, key, value, mask)
        return self.out(out.reshape(*out.shape[:2], self.heads * self.head_dim))

    def _split(self, x: Float[Array, "b n hd"], heads: int) -> Float[Array, "b n h d"]:
        x = x.reshape(*x.shape[:2], heads, self.head_dim)
        return constrain(x, "batch", "tokens", "heads", None)
