"""Attention: the layer, and the one function that chooses a kernel for it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mmjax.nn import backend
from mmjax.nn.linear import XAVIER, Linear
from mmjax.nn.masks import Mask
from mmjax.nn.norm import NORMS
from mmjax.nn.partition import constrain
from mmjax.nn.rope import Rotation, rotary
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
    scale: float | Float[Array, ""] | None = None,
    softcap: float | None = None,
    bias: Float[Array, "#b h #q k"] | None = None,
    kernel: str | None = None,
) -> Float[Array, "b q h d"]:
    """Scaled dot-product attention, by the fastest kernel that is correct for its arguments.

    Heads of the query share the key and value heads in groups where there are fewer of those.
    The softmax is in float32. Queries that the mask lets attend to nothing get zeros.

    Args:
      scale: of the logits; 1 / sqrt(d) if None.
      softcap: logits x become softcap * tanh(x / softcap), as in Gemma 2.
      bias: added to the logits after that, as the relative positions of T5 are.
      kernel: a name in `KERNELS` instead of the choice; with a softcap or a bias it is "xla".

    Raises:
      ValueError: if the query heads are no multiple of the key heads.
    """
    heads, kv_heads = query.shape[2], key.shape[2]
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads are no multiple of {kv_heads} key/value heads.")
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    causal = mask is not None and mask.triangle
    with jax.named_scope(CAUSAL_SCOPE) if causal else contextlib.nullcontext():
        # The kernels made for speed have neither of these, nor a scale that differs by layer.
        if softcap is not None or bias is not None or isinstance(scale, jax.Array):
            return _xla(query, key, value, mask, scale, softcap, bias)
        name = pick_kernel(query, key, mask) if kernel is None else kernel
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
def _xla(
    query: Array,
    key: Array,
    value: Array,
    mask: Mask | None,
    scale: float | Array,
    softcap: float | None = None,
    bias: Array | None = None,
) -> Array:
    batch, length, heads, width = query.shape
    kv_heads = key.shape[2]
    query = query.reshape(batch, length, kv_heads, heads // kv_heads, width)
    logits = scale * jnp.einsum("bqhgd,bkhd->bhgqk", query, key, preferred_element_type=jnp.float32)
    logits = _capped(logits, softcap)
    if bias is not None:
        logits = logits + bias.reshape(bias.shape[0], kv_heads, -1, *bias.shape[2:])
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
def _cpu(query: Array, key: Array, value: Array, mask: Mask | None, scale: float | Array) -> Array:
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
def _cudnn(
    query: Array, key: Array, value: Array, mask: Mask | None, scale: float | Array
) -> Array:
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


class KV(NamedTuple):
    """Keys and values of one layer, each [B, kv_heads, tokens, head_dim]: heads first, so that a
    decoding step multiplies matrices that stand one after the other."""

    key: Array
    value: Array


def attend_cached(
    query: Float[Array, "b q h d"],
    cache: KV,
    mask: Mask,
    *,
    scale: float | Float[Array, ""] | None = None,
    softcap: float | None = None,
    bias: Float[Array, "#b h #q k"] | None = None,
) -> Float[Array, "b q h d"]:
    """`attend` for few queries and the keys and values of a cache; no derivative of its own."""
    batch, length, heads, width = query.shape
    kv_heads = cache.key.shape[1]
    scale = 1.0 / math.sqrt(width) if scale is None else scale
    query = query.reshape(batch, length, kv_heads, -1, width).transpose(0, 2, 3, 1, 4)
    query = query.reshape(batch, kv_heads, -1, width)
    logits = _capped(scale * _matmul(query, cache.key, (3, 3)), softcap)
    logits = logits.reshape(batch, heads, length, -1)
    if bias is not None:
        logits = logits + bias
    allowed = mask.dense()[:, None]
    weights = jax.nn.softmax(jnp.where(allowed, logits, jnp.finfo(jnp.float32).min))
    # A query that may attend to nothing gets zeros, as in `attend`.
    weights = jnp.where(allowed, weights, 0).astype(cache.value.dtype)
    out = _matmul(weights.reshape(batch, kv_heads, -1, weights.shape[-1]), cache.value, (3, 2))
    out = out.reshape(batch, heads, length, width).swapaxes(1, 2)
    return out.astype(query.dtype)


def _capped(logits: Array, softcap: float | None) -> Array:
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


class Attention(nnx.Module):
    """Multi-head or grouped-query attention, of a stream to itself or to another.

    Args:
      width: of the queries' stream and of the output.
      heads: number of query heads.
      kv_heads: number of key and value heads; as many as query heads if None.
      head_dim: width of a head; width / heads if None.
      context_width: width of the stream attended to, where it is another one.
      qkv_bias, out_bias: whether these linear maps have biases.
      qk_norm: a name in `NORMS`: queries and keys are normalised over each head's width.
      norm_eps: of those norms.
      qk_norm_each: whether each head has a scale and a bias of its own; of "layernorm".
      scale: of the logits; 1 / sqrt(head_dim) if None.
      softcap: see `attend`.

    Raises:
      ValueError: if the heads do not divide the width, or the query heads not into groups.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        context_width: int | None = None,
        qkv_bias: bool = True,
        out_bias: bool = True,
        qk_norm: str | None = None,
        norm_eps: float = 1e-6,
        qk_norm_each: bool = False,
        scale: float | None = None,
        softcap: float | None = None,
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
        context_width = width if context_width is None else context_width
        self.heads = heads
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.scale = scale
        self.softcap = softcap

        def linear(inputs: int, outputs: int, bias: bool) -> Linear:
            return Linear(inputs, outputs, bias=bias, kernel_init=XAVIER, rngs=rngs)

        self.query = linear(width, heads * head_dim, qkv_bias)
        self.key = linear(context_width, kv_heads * head_dim, qkv_bias)
        self.value = linear(context_width, kv_heads * head_dim, qkv_bias)
        self.out = linear(heads * head_dim, width, out_bias)

        def norm(heads: int) -> nnx.Module | None:
            if qk_norm is None:
                return None
            each = {"each": (heads,)} if qk_norm_each else {}
            return NORMS[qk_norm](head_dim, eps=norm_eps, **each)

        self.query_norm, self.key_norm = norm(heads), norm(kv_heads)

    def __call__(
        self,
        x: Float[Array, "b q d"],
        context: Float[Array, "b k e"] | None = None,
        *,
        values: Float[Array, "b k e"] | None = None,
        mask: Mask | None = None,
        rotation: Rotation | None = None,
        scale: float | Float[Array, ""] | None = None,
        bias: Float[Array, "#b h #q k"] | None = None,
    ) -> Float[Array, "b q d"]:
        """Attend from `x` to `context`, or to `x` itself where there is none.

        Args:
          values: the stream that values are computed of, where it is not the one of the keys.
          rotation: of queries and keys, by their places; for self-attention.
          scale: of the logits, instead of the layer's own.
          bias: added to the logits.
        """
        return self._attend(x, context, values, mask, rotation, scale, bias)[0]

    def with_cache(
        self,
        x: Float[Array, "b q d"],
        context: Float[Array, "b k e"] | None = None,
        *,
        mask: Mask | None = None,
        rotation: Rotation | None = None,
        scale: float | Float[Array, ""] | None = None,
        bias: Float[Array, "#b h #q k"] | None = None,
    ) -> tuple[Float[Array, "b q d"], KV]:
        """The same, and the keys and values, for `step`."""
        out, key, value = self._attend(x, context, None, mask, rotation, scale, bias)
        return out, KV(_heads_first(key), _heads_first(value))

    def step(
        self,
        x: Float[Array, "b q d"],
        cache: KV,
        slot: Int[Array, ""] | None,
        *,
        mask: Mask,
        rotation: Rotation | None = None,
        scale: float | Float[Array, ""] | None = None,
        bias: Float[Array, "#b h #q k"] | None = None,
    ) -> tuple[Float[Array, "b q d"], KV]:
        """Attend from the next tokens to those of a cache, which they join.

        Args:
          cache: its tokens dimension has room for all that is to come.
          slot: where the tokens of `x` go in it; None: they do not (another stream's cache).
          mask: of the queries to all slots; it decides which of them count.

        Returns:
          The output, and the cache with the new keys and values.
        """
        query = self._turned(self._split(self.query(x), self.heads), self.query_norm, rotation)
        if slot is not None:
            cache = KV(
                *(
                    jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), slot, axis=2)
                    for old, new in zip(cache, self.remember(x, rotation), strict=True)
                )
            )
        scale = self.scale if scale is None else scale
        out = attend_cached(query, cache, mask, scale=scale, softcap=self.softcap, bias=bias)
        return self._joined(out), cache

    def remember(self, context: Float[Array, "b k e"], rotation: Rotation | None = None) -> KV:
        """The keys and values of a stream, for `step`: all that attention needs of it."""
        return KV(*map(_heads_first, self._keys_values(context, rotation)))

    def _attend(
        self,
        x: Array,
        context: Array | None,
        values: Array | None,
        mask: Mask | None,
        rotation: Rotation | None,
        scale: float | Array | None,
        bias: Array | None,
    ) -> tuple[Array, Array, Array]:
        """The output, keys and values; the arguments are those of `__call__`."""
        context = x if context is None else context
        query = self._turned(self._split(self.query(x), self.heads), self.query_norm, rotation)
        key, value = self._keys_values(context, rotation, values)
        scale = self.scale if scale is None else scale
        out = attend(query, key, value, mask, scale=scale, softcap=self.softcap, bias=bias)
        return self._joined(out), key, value

    def _keys_values(
        self, context: Array, rotation: Rotation | None, values: Array | None = None
    ) -> tuple[Array, Array]:
        key = self._turned(self._split(self.key(context), self.kv_heads), self.key_norm, rotation)
        values = context if values is None else values
        return key, self._split(self.value(values), self.kv_heads)

    def _split(self, x: Float[Array, "b n hd"], heads: int) -> Float[Array, "b n h d"]:
        x = x.reshape(*x.shape[:2], heads, self.head_dim)
        return constrain(x, "batch", "tokens", "heads", None)

    def _turned(
        self, x: Float[Array, "b n h d"], norm: nnx.Module | None, rotation: Rotation | None
    ) -> Float[Array, "b n h d"]:
        x = x if norm is None else norm(x)
        return x if rotation is None else rotary(x, rotation)

    def _joined(self, x: Float[Array, "b n h d"]) -> Float[Array, "b n e"]:
        return self.out(x.reshape(*x.shape[:2], self.heads * self.head_dim))


def _heads_first(x: Float[Array, "b n h d"]) -> Float[Array, "b h n d"]:
    return constrain(x.swapaxes(1, 2), "batch", "heads", "tokens", None)
