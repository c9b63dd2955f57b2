"""Finite scalar quantisation: each number of a vector is rounded to one of a few levels.

Mentzer et al., "Finite Scalar Quantization: VQ-VAE Made Simple" (2024). Nothing is learnt, and no
loss is needed; the codes are all combinations of levels.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmjax.quantizers.base import (
    QUANTIZERS,
    Quantized,
    Quantizer,
    QuantizerConfig,
    straight_through,
)
from mmjax.typing import Array, Float, Int

# How far beyond the outermost levels numbers may go, as a share: a level is reached for certain.
_BEYOND = 1e-3


@dataclasses.dataclass(frozen=True)
class FSQConfig(QuantizerConfig):
    """
    Attributes:
      levels: of each number of a vector, 3 or more: (8, 5, 5, 5) has 1,000 codes.
    """

    levels: tuple[int, ...]
    name: str = dataclasses.field(default="fsq", init=False)

    def __post_init__(self):
        if not self.levels or min(self.levels) < 3:
            raise ValueError(f"levels={self.levels}: give one or more, each 3 or more.")

    @property
    def size(self) -> int:
        return math.prod(self.levels)

    @property
    def width(self) -> int:
        return len(self.levels)


@QUANTIZERS.register("fsq")
class FSQ(Quantizer):
    """Code 0 has the lowest level of each number; the first number counts fastest."""

    def __init__(self, config: FSQConfig, *, rngs: nnx.Rngs):
        self.config = config

    def __call__(self, x: Float[Array, "*b e"]) -> Quantized:
        levels = np.array(self.config.levels)
        half = (levels - 1) * (1 + _BEYOND) / 2
        # With an even number of levels they lie on both sides of zero, one more below it.
        offset = np.where(levels % 2 == 0, 0.5, 0.0)
        bounded = jnp.tanh(x.astype(jnp.float32) + np.arctanh(offset / half)) * half - offset
        rounded = jnp.round(bounded)
        # In whole numbers: those of float32 end at 2^24.
        codes = jnp.sum((rounded.astype(jnp.int32) + levels // 2) * self._steps(), axis=-1)
        vectors = straight_through(bounded, rounded) / (levels // 2)
        return Quantized(vectors.astype(x.dtype), codes.astype(jnp.int32), jnp.float32(0.0))

    def vectors(self, codes: Int[Array, "*b"]) -> Float[Array, "*b e"]:
        levels = np.array(self.config.levels)
        numbers = codes[..., None] // self._steps() % levels
        return ((numbers - levels // 2) / (levels // 2)).astype(jnp.float32)

    def _steps(self) -> np.ndarray:
        """What one level more adds to the code."""
        return np.cumprod([1, *self.config.levels[:-1]])
