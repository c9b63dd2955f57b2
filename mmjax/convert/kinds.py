"""How the tensors of one Hugging Face module become parameters of ours, and back.

A kind lists the tensors a module may have. Every transform is a bijection, so one table of
(their module, our module, kind) serves loading and saving.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mmjax.typing import Array


@dataclasses.dataclass(frozen=True)
class Transform:
    """One tensor of theirs to one or several parameters of ours, and the inverse.

    Both functions are traceable.

    Attributes:
      to_ours: their tensor -> a tuple of our arrays.
      to_theirs: our arrays -> their tensor.
      spec: how their tensor is sharded where our (single) array has this partition spec; None where
        that cannot be said: it is then whole on every device before it is transformed.
    """

    to_ours: Callable[[Array], tuple[Array, ...]]
    to_theirs: Callable[..., Array]
    spec: Callable[[PartitionSpec], PartitionSpec] | None = None


class Leaf(NamedTuple):
    """One tensor of a module: what is appended to their name, what to ours, and the transform."""

    theirs: str
    ours: str
    transform: Transform


Kind = tuple[Leaf, ...]

# The functions below return the same object for the same arguments: what is compiled for a
# transform serves all loads.

SAME = Transform(lambda x: (x,), lambda x: x, lambda spec: spec)
TRANSPOSED = Transform(lambda x: (x.T,), lambda x: x.T, lambda spec: PartitionSpec(*spec[::-1]))


@functools.cache
def array(theirs: tuple[int, ...], ours: tuple[int, ...]) -> Kind:
    """A tensor on its own that has another shape here; each shape may contain one -1."""
    return (Leaf("", "", Transform(lambda x: (x.reshape(ours),), lambda x: x.reshape(theirs))),)


@functools.cache
def patch(patch_size: int, channels: int) -> Kind:
    """The convolution [D, C, p, p] of a patch embedding as our matrix [p * p * C, D]."""

    def to_ours(x: Array) -> tuple[Array]:
        return (x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),)

    def to_theirs(x: Array) -> Array:
        kernel = x.reshape(patch_size, patch_size, channels, -1)
        return kernel.transpose(3, 2, 0, 1)

    return (Leaf(".weight", "/kernel", Transform(to_ours, to_theirs)), Leaf(".bias", "/bias", SAME))


@functools.cache
def split(parts: tuple[int, ...], *, transposed: bool) -> Transform:
    """Outputs of one linear map that are several here, of relative sizes `parts`.

    Args:
      transposed: whether their weight is [outputs, inputs], as that of a linear layer is; vectors
        and GPT-2's weights have the outputs last.
    """
    total = sum(parts)
    cuts = [sum(parts[:i]) for i in range(1, len(parts))]

    def to_ours(x: Array) -> tuple[Array, ...]:
        x = x.T if transposed else x
        unit = x.shape[-1] // total
        return tuple(jnp.split(x, [cut * unit for cut in cuts], axis=-1))

    def to_theirs(*xs: Array) -> Array:
        x = jnp.concatenate(xs, axis=-1)
        return x.T if transposed else x

    return Transform(to_ours, to_theirs)


@functools.cache
def fused(*sizes: int, weight: str = ".weight", bias: str = ".bias") -> Kind:
    """A linear layer [outputs, inputs] whose outputs are several linear layers here.

    Args:
      sizes: outputs of each.
      weight, bias: what their names end in.
    """
    unit = math.gcd(*sizes)
    parts = tuple(size // unit for size in sizes)
    return (
        Leaf(weight, "/kernel", split(parts, transposed=True)),
        Leaf(bias, "/bias", split(parts, transposed=False)),
    )


@functools.cache
def fused_by_head(heads: int) -> Kind:
    """A linear layer [heads * 3 * d, inputs]: of each head query, key and value."""

    def to_ours(x: Array) -> tuple[Array, ...]:
        parts = x.reshape(heads, 3, -1, *x.shape[1:])
        return tuple(parts[:, i].reshape(-1, *x.shape[1:]).T for i in range(3))

    def to_theirs(*xs: Array) -> Array:
        parts = [x.T.reshape(heads, -1, *x.shape[:-1]) for x in xs]
        return jnp.stack(parts, axis=1).reshape(-1, *xs[0].shape[:-1])

    both = Transform(to_ours, to_theirs)
    return (Leaf(".weight", "/kernel", both), Leaf(".bias", "/bias", both))


@functools.cache
def table(first: int) -> Kind:
    """A table of vectors that are two tables here: the first `first` rows, and the others."""
    transform = Transform(lambda x: (x[:first], x[first:]), lambda *xs: jnp.concatenate(xs))
    return (Leaf(".weight", "/embedding", transform),)


@functools.cache
def mixed(width: int) -> Kind:
    """A linear layer of two kinds of inputs: first `width` numbers, then those of several vectors
    of that width, number by number. Here the vectors stand one after the other."""

    def to_ours(x: Array) -> tuple[Array]:
        vectors = x.T[width:].reshape(width, -1, x.shape[0]).swapaxes(0, 1)
        return (jnp.concatenate([x.T[:width], vectors.reshape(-1, x.shape[0])]),)

    def to_theirs(x: Array) -> Array:
        numbers = x[width:].reshape(-1, width, x.shape[1]).swapaxes(0, 1)
        return jnp.concatenate([x[:width], numbers.reshape(-1, x.shape[1])]).T

    return (Leaf(".weight", "/kernel", Transform(to_ours, to_theirs)), Leaf(".bias", "/bias", SAME))


LINEAR: Kind = (Leaf(".weight", "/kernel", TRANSPOSED), Leaf(".bias", "/bias", SAME))
# Convolutions [outputs, inputs, k, k]; those with k = 1 are linear layers here.
CONV: Kind = (
    Leaf(
        ".weight",
        "/kernel",
        Transform(lambda x: (x.transpose(2, 3, 1, 0),), lambda x: x.transpose(3, 2, 0, 1)),
    ),
    Leaf(".bias", "/bias", SAME),
)
POINTWISE: Kind = (
    Leaf(
        ".weight",
        "/kernel",
        Transform(lambda x: (x[:, :, 0, 0].T,), lambda x: x.T[:, :, None, None]),
    ),
    Leaf(".bias", "/bias", SAME),
)
# Convolutions [outputs, inputs, t, k, k].
CONV3D: Kind = (
    Leaf(
        ".weight",
        "/kernel",
        Transform(lambda x: (x.transpose(2, 3, 4, 1, 0),), lambda x: x.transpose(4, 3, 0, 1, 2)),
    ),
    Leaf(".bias", "/bias", SAME),
)
# GPT-2's "Conv1D": a linear layer whose weight is [inputs, outputs].
CONV1D: Kind = (Leaf(".weight", "/kernel", SAME), Leaf(".bias", "/bias", SAME))
NORM: Kind = (Leaf(".weight", "/scale", SAME), Leaf(".bias", "/bias", SAME))
BATCH_NORM: Kind = (
    *NORM,
    Leaf(".running_mean", "/mean", SAME),
    Leaf(".running_var", "/variance", SAME),
    Leaf(".num_batches_tracked", "/batches", SAME),
)
EMBEDDING: Kind = (Leaf(".weight", "/embedding", SAME),)
ARRAY: Kind = (Leaf("", "", SAME),)
# torch.nn.MultiheadAttention: queries, keys and values in one.
IN_PROJ: Kind = fused(1, 1, 1, weight="_weight", bias="_bias")
# The same of GPT-2.
CONV1D_QKV: Kind = (
    Leaf(".weight", "/kernel", split((1, 1, 1), transposed=False)),
    Leaf(".bias", "/bias", split((1, 1, 1), transposed=False)),
)
