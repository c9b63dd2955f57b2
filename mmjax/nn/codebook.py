"""Vector quantisation: vectors become codes, numbers of the vectors of a codebook."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mmjax.registry import UnknownNameError, nearest
from mmjax.typing import Array, Float, Int

COMPARE = ("distance", "cosine")


@dataclasses.dataclass(frozen=True)
class CodebookConfig:
    """
    Attributes:
      size: number of codes.
      width: of a vector.
      compare: the nearest code is that of the least "distance", or of the greatest "cosine", which
        uses more of the codes (Yu et al., "Vector-quantized Image Modeling with Improved VQGAN",
        2022).
      unit: whether a code's vector is scaled to unit length when it is used. LlamaGen's tokenizer
        has compare="cosine" and unit=True; what transformers makes of it for Janus has
        compare="distance".
      commitment: weight of the loss that keeps vectors near their codes.
    """

    size: int
    width: int
    compare: str = "distance"
    unit: bool = False
    commitment: float = 0.25

    def __post_init__(self):
        if self.compare not in COMPARE:
            raise UnknownNameError(f"compare={self.compare!r}; {nearest(self.compare, COMPARE)}")
        if self.size < 1 or self.width < 1:
            raise ValueError(f"A codebook needs size={self.size} and width={self.width} above 0.")


class Quantized(NamedTuple):
    """
    Attributes:
      vectors: [..., D], those of the codes; their gradient goes to the vectors that were given
        (straight through).
      codes: [...] int32.
      loss: scalar float32: what moves codes to vectors and, as `commitment` says, vectors to codes.
    """

    vectors: Array
    codes: Array
    loss: Array


class Codebook(nnx.Module):
    """Vectors [..., D] -> their nearest codes (van den Oord et al., "Neural Discrete Representation
    Learning", 2017)."""

    def __init__(self, config: CodebookConfig, *, rngs: nnx.Rngs):
        self.config = config
        # As VQGAN: near zero, so that at first no code is far from all vectors.
        shape, bound = (config.size, config.width), 1 / config.size
        self.embedding = nnx.Param(
            jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)
        )

    def __call__(self, x: Float[Array, "*b d"]) -> Quantized:
        codes = self.codes(x)
        given = x.astype(jnp.float32)
        given = _unit(given) if self.config.unit else given
        found = self.vectors(codes)
        loss = jnp.mean((jax.lax.stop_gradient(given) - found) ** 2)
        loss += self.config.commitment * jnp.mean((given - jax.lax.stop_gradient(found)) ** 2)
        through = given + jax.lax.stop_gradient(found - given)
        return Quantized(through.astype(x.dtype), codes, loss)

    def codes(self, x: Float[Array, "*b d"]) -> Int[Array, "*b"]:
        """The numbers of the nearest codes; of equally near ones the first."""
        x, table = x.astype(jnp.float32), self.embedding[...]
        if self.config.compare == "cosine":
            x, table = _unit(x), _unit(table)
        # The squared distance, without the part that all codes share.
        far = jnp.sum(table**2, axis=-1) - 2 * x @ table.T
        return jnp.argmin(far, axis=-1).astype(jnp.int32)

    def vectors(self, codes: Int[Array, "*b"]) -> Float[Array, "*b d"]:
        """float32."""
        found = self.embedding[...][codes]
        return _unit(found) if self.config.unit else found


def _unit(x: Array) -> Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
