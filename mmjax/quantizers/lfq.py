"""Lookup-free quantisation: the signs of a vector's numbers are the bits of its code.

Yu et al., "Language Model Beats Diffusion: Tokenizer is Key to Visual Generation" (2024,
MAGVIT-v2). Nothing is learnt; a loss makes signs certain, and codes equally frequent.
"""

from __future__ import annotations

import dataclasses

import jax
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


@dataclasses.dataclass(frozen=True)
class LFQConfig(QuantizerConfig):
    """
    Attributes:
      bits: of a code: a vector has as many numbers.
      entropy: weight of the loss E[H(code)] - diversity * H(E[code]), of codes that are drawn with
        probabilities exp(2 x . c / temperature).
      diversity: see `entropy`.
      temperature: see `entropy`.
      commitment: weight of the loss that draws numbers to 1 and -1.
    """

    bits: int
    entropy: float = 0.1
    diversity: float = 1.0
    temperature: float = 0.01
    commitment: float = 0.25
    name: str = dataclasses.field(default="lfq", init=False)

    def __post_init__(self):
        # The loss has a probability for each vector and code.
        if not 1 <= self.bits <= 18:
            raise ValueError(f"bits={self.bits} must be in 1 to 18.")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be above 0.")

    @property
    def size(self) -> int:
        return 2**self.bits

    @property
    def width(self) -> int:
        return self.bits


@QUANTIZERS.register("lfq")
class LFQ(Quantizer):
    """The first number is the highest bit; zero counts as negative."""

    def __init__(self, config: LFQConfig, *, rngs: nnx.Rngs):
        self.config = config

    def __call__(self, x: Float[Array, "*b e"]) -> Quantized:
        config, given = self.config, x.astype(jnp.float32)
        codes = self.codes(x)
        found = self.vectors(codes)
        table = self.vectors(jnp.arange(config.size))
        likely = jax.nn.log_softmax(2 * given @ table.T / config.temperature, axis=-1)
        share = jnp.exp(likely)
        certain = -jnp.mean(jnp.sum(share * likely, axis=-1))
        mean = jnp.mean(share.reshape(-1, config.size), axis=0)
        # Of codes that no vector is near the share is 0, and the slope of its logarithm infinite.
        diverse = -jnp.sum(mean * jnp.log(jnp.maximum(mean, 1e-20)))
        loss = config.entropy * (certain - config.diversity * diverse)
        loss += config.commitment * jnp.mean(jnp.square(given - found))
        return Quantized(straight_through(given, found).astype(x.dtype), codes, loss)

    def codes(self, x: Float[Array, "*b e"]) -> Int[Array, "*b"]:
        return jnp.sum((x > 0) * self._values(), axis=-1).astype(jnp.int32)

    def vectors(self, codes: Int[Array, "*b"]) -> Float[Array, "*b e"]:
        return jnp.where(codes[..., None] & self._values(), 1.0, -1.0)

    def _values(self) -> np.ndarray:
        """Of the bits."""
        return 2 ** np.arange(self.config.bits)[::-1]
