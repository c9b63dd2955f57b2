"""A codebook that is learnt by gradients, as in VQ-VAE, VQGAN and ViT-VQGAN."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from mmjax.quantizers.base import (
    QUANTIZERS,
    Quantized,
    Quantizer,
    QuantizerConfig,
    straight_through,
)
from mmjax.registry import check_choice
from mmjax.typing import Array, Float, Int

COMPARE, THROUGH = ("distance", "cosine"), ("straight", "rotation")


@dataclasses.dataclass(frozen=True)
class CodebookConfig(QuantizerConfig):
    """
    Attributes:
      size: number of codes.
      width: of a vector.
      compare: the nearest code is that of the least "distance", or of the greatest "cosine", which
        uses more of the codes (Yu et al., "Vector-quantized Image Modeling with Improved VQGAN",
        2022).
      unit: whether vectors are scaled to unit length, given ones and those of codes. LlamaGen's
        tokenizer compares by cosine and has unit=True; what transformers makes of it for Janus
        compares distances before scaling.
      commitment: weight of the loss that draws vectors to their codes; the one that draws codes to
        vectors has 1.
      through: how gradients pass from a code's vector to the given one: "straight", as they are, or
        by the "rotation" that takes one to the other (Fifty et al., "Restructuring Vector
        Quantization with the Rotation Trick", 2025).
    """

    size: int
    width: int
    compare: str = "distance"
    unit: bool = False
    commitment: float = 0.25
    through: str = "straight"
    name: str = dataclasses.field(default="codebook", init=False)

    def __post_init__(self):
        check_choice("compare", self.compare, COMPARE)
        check_choice("through", self.through, THROUGH)
        if self.size < 1 or self.width < 1:
            raise ValueError(f"size={self.size}, width={self.width}: both must be 1 or more.")


@QUANTIZERS.register("codebook")
class Codebook(Quantizer):
    """The nearest code (van den Oord et al., "Neural Discrete Representation Learning", 2017)."""

    def __init__(self, config: CodebookConfig, *, rngs: nnx.Rngs):
        self.config = config
        # As VQGAN: near zero, so that at first no code is far from all vectors.
        shape, bound = (config.size, config.width), 1 / config.size
        self.embedding = nnx.Param(
            jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)
        )

    def __call__(self, x: Float[Array, "*b e"]) -> Quantized:
        codes = self.codes(x)
        found, given = self.vectors(codes), x.astype(jnp.float32)
        given = unit(given) if self.config.unit else given
        through = rotated if self.config.through == "rotation" else straight_through
        return Quantized(through(given, found).astype(x.dtype), codes, self.loss(given, found))

    def loss(self, given: Float[Array, "*b e"], found: Float[Array, "*b e"]) -> Array:
        loss = jnp.mean(jnp.square(jax.lax.stop_gradient(given) - found))
        return loss + self.config.commitment * drawn(given, found)

    def codes(self, x: Float[Array, "*b e"]) -> Int[Array, "*b"]:
        return nearest(x.astype(jnp.float32), self.embedding[...], self.config.compare)

    def vectors(self, codes: Int[Array, "*b"]) -> Float[Array, "*b e"]:
        found = self.embedding[...][codes]
        return unit(found) if self.config.unit else found


def nearest(x: Float[Array, "*b e"], table: Float[Array, "k e"], compare: str) -> Int[Array, "*b"]:
    """The row of the table, int32; of equally near ones the first. See `CodebookConfig.compare`."""
    if compare == "cosine":
        far = -x @ unit(table).T
    else:
        # The squared distance, without the part that all codes share.
        far = jnp.sum(jnp.square(table), axis=-1) - 2 * x @ table.T
    return jnp.argmin(far, axis=-1).astype(jnp.int32)


def drawn(given: Float[Array, "*b e"], found: Float[Array, "*b e"]) -> Array:
    """The loss that draws vectors to their codes."""
    return jnp.mean(jnp.square(given - jax.lax.stop_gradient(found)))


def unit(x: Float[Array, "*b e"]) -> Float[Array, "*b e"]:
    """Of length 1, or 0 where it is 0."""
    length = jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))
    return x / length


def rotated(given: Float[Array, "*b e"], found: Float[Array, "*b e"]) -> Float[Array, "*b e"]:
    """`found`; seen from `given`, it is that, rotated and scaled by constants."""
    start, end = (jax.lax.stop_gradient(unit(x)) for x in (given, found))
    length, other = (jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (given, found))
    scale = jax.lax.stop_gradient(other / jnp.maximum(length, 1e-12))
    middle = unit(start + end)

    def along(direction: Array) -> Array:
        return jnp.sum(given * direction, axis=-1, keepdims=True)

    return scale * (given - 2 * along(middle) * middle + 2 * along(start) * end)
