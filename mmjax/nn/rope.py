"""Rotary position embedding (Su et al., 2021), and the ways to stretch it to longer texts.

The convention is that of Llama in transformers: dimension i is paired with i + d / 2. What depends
on positions only is computed once for all layers: a `Rotation`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from mmjax.registry import Registry
from mmjax.typing import Array, Float, Int


class Rotation(NamedTuple):
    """Sines and cosines of each token's angles, each [B or 1, N, dims / 2] float32."""

    sin: Array
    cos: Array


@dataclasses.dataclass(frozen=True)
class Rope:
    """How positions become angles. The fields after `scaling` serve the scalings that name them.

    Attributes:
      theta: base of the frequencies, theta^(-2i / dims).
      dims: rotated dimensions of a head, its first ones; None for all.
      scaling: a name in `SCALINGS`.
      factor: by how much a text is longer than those of pretraining ("linear", "dynamic", "yarn",
        "llama3").
      original_length: of pretraining, in tokens ("dynamic", "yarn", "llama3").
      low_frequency_factor, high_frequency_factor: of "llama3".
      beta_fast, beta_slow, truncate: of "yarn": rotations over `original_length` above which a
        frequency stays, below which it is divided, and whether these bounds become integers.
      amplitude: what sines and cosines are multiplied by ("yarn" calls it attention factor).
    """

    theta: float
    dims: int | None = None
    scaling: str = "default"
    factor: float = 1.0
    original_length: int | None = None
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    amplitude: float = 1.0

    def __post_init__(self):
        _ = SCALINGS[self.scaling]  # raises, naming the nearest
        if self.dims is not None and (self.dims % 2 or self.dims < 2):
            raise ValueError(f"A rotary embedding turns pairs: dims={self.dims} must be even.")
        if self.scaling in ("dynamic", "yarn", "llama3") and self.original_length is None:
            raise ValueError(f"Rope scaling {self.scaling!r} needs original_length.")

    def rotation(self, positions: Int[Array, "#b n"], head_dim: int) -> Rotation:
        """Sines and cosines for tokens at these places.

        Raises:
          ValueError: if the head has an odd width, or is narrower than `dims`.
        """
        dims = head_dim if self.dims is None else self.dims
        if dims % 2 or dims > head_dim:
            raise ValueError(
                f"A rotary embedding of {dims} dimensions does not fit a head_dim of {head_dim}: "
                "it needs an even number of them, at most all."
            )
        frequencies = SCALINGS[self.scaling](self, dims, positions)
        angles = positions[:, :, None].astype(jnp.float32) * frequencies
        return Rotation(self.amplitude * jnp.sin(angles), self.amplitude * jnp.cos(angles))


def rotary(x: Float[Array, "b n h d"], rotation: Rotation) -> Float[Array, "b n h d"]:
    """Queries or keys turned by their positions, in float32."""
    dims = 2 * rotation.sin.shape[-1]
    sin, cos = rotation.sin[:, :, None], rotation.cos[:, :, None]
    turned, rest = x[..., :dims].astype(jnp.float32), x[..., dims:]
    first, second = jnp.split(turned, 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    turned = turned.astype(x.dtype)
    return turned if not rest.shape[-1] else jnp.concatenate([turned, rest], axis=-1)


# (rope, dims, positions) -> frequencies [dims / 2]. As in `modeling_rope_utils` of transformers.
SCALINGS: Registry[Callable[[Rope, int, Array], Array | np.ndarray]] = Registry("rope scaling")


@SCALINGS.register("default")
def _default(rope: Rope, dims: int, positions: Array) -> np.ndarray:
    return _frequencies(rope.theta, dims)


@SCALINGS.register("linear")
def _linear(rope: Rope, dims: int, positions: Array) -> np.ndarray:
    """Position interpolation (Chen et al., 2023)."""
    return _frequencies(rope.theta, dims) / np.float32(rope.factor)


@SCALINGS.register("dynamic")
def _dynamic(rope: Rope, dims: int, positions: Array) -> Array:
    """NTK-aware scaling by the length of this call's longest text, where it exceeds the original.

    The one scaling by which a sample depends on its neighbours, as in the reference.
    """
    length = jnp.maximum(jnp.max(positions) + 1, rope.original_length).astype(jnp.float32)
    stretch = rope.factor * length / rope.original_length - (rope.factor - 1)
    theta = rope.theta * stretch ** (dims / (dims - 2))
    return theta ** (-np.arange(0, dims, 2, dtype=np.float32) / dims)


@SCALINGS.register("llama3")
def _llama3(rope: Rope, dims: int, positions: Array) -> np.ndarray:
    """Low frequencies are divided by the factor, high ones stay, those between are blended."""
    frequencies = _frequencies(rope.theta, dims)
    rotations = rope.original_length * frequencies / (2 * math.pi)
    low, high = rope.low_frequency_factor, rope.high_frequency_factor
    kept = np.clip((rotations - low) / (high - low), 0, 1)
    return (frequencies * (kept + (1 - kept) / rope.factor)).astype(np.float32)


@SCALINGS.register("yarn")
def _yarn(rope: Rope, dims: int, positions: Array) -> np.ndarray:
    """YaRN (Peng et al., 2023): a linear ramp over the dimensions; the amplitude is a field."""
    frequencies = _frequencies(rope.theta, dims)

    def dimension(rotations: float) -> float:
        """The pair that makes so many rotations over the original length."""
        wavelength = rope.original_length / (2 * math.pi * rotations)
        return dims * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    high = high + 0.001 if low == high else high
    divided = np.clip((np.arange(dims // 2) - low) / (high - low), 0, 1)
    return (frequencies * (1 - divided + divided / rope.factor)).astype(np.float32)


def _frequencies(theta: float, dims: int) -> np.ndarray:
    exponents = np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims)
    return (1.0 / np.float32(theta) ** exponents).astype(np.float32)
