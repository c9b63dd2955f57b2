"""Residual quantisation: what one quantiser leaves, the next one takes.

Lee et al., "Autoregressive Image Generation using Residual Quantization" (2022).
"""

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
    Statistics,
    make_quantizer,
    straight_through,
)
from mmjax.quantizers.codebook import CodebookConfig
from mmjax.typing import Array, Float, Int, Key


@dataclasses.dataclass(frozen=True)
class ResidualConfig(QuantizerConfig):
    """
    Attributes:
      each: a codebook. What the others make has a size of its own, which what is left has not.
      depth: how many follow each other; a vector has as many codes.
    """

    each: CodebookConfig
    depth: int
    name: str = dataclasses.field(default="residual", init=False)

    def __post_init__(self):
        if self.depth < 1:
            raise ValueError(f"depth={self.depth} must be 1 or more.")
        if self.each.unit:
            raise ValueError("unit=True: what is left is not of unit length; set unit=False.")

    @property
    def size(self) -> int:
        return self.each.size

    @property
    def width(self) -> int:
        return self.each.width

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.depth,)


@QUANTIZERS.register("residual")
class Residual(Quantizer):
    """The vector of some codes is the sum of theirs, each from a codebook of its own."""

    def __init__(self, config: ResidualConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.each = nnx.List(make_quantizer(config.each, rngs=rngs) for _ in range(config.depth))

    def __call__(self, x: Float[Array, "*b e"]) -> Quantized:
        given = x.astype(jnp.float32)
        left, codes, loss = given, [], jnp.float32(0.0)
        for quantizer in self.each:
            found = quantizer(left)
            left = left - jax.lax.stop_gradient(found.vectors)
            codes.append(found.codes)
            loss += found.loss
        vectors, codes = straight_through(given, given - left), jnp.stack(codes, axis=-1)
        statistics = Statistics(given, codes) if self.learnt else ()
        return Quantized(vectors.astype(x.dtype), codes, loss, statistics)

    def vectors(self, codes: Int[Array, "*b d"]) -> Float[Array, "*b e"]:
        return sum(each.vectors(codes[..., number]) for number, each in enumerate(self.each))

    @property
    def learnt(self) -> tuple[str, ...]:
        return tuple(
            f"each/{number}/{path}" for number, each in enumerate(self.each) for path in each.learnt
        )

    def update(self, statistics: Statistics | tuple[()], rng: Key) -> dict[str, Array]:
        if not self.learnt:
            return {}
        left, values = statistics.given, {}
        for number, each in enumerate(self.each):
            own = Statistics(left, statistics.codes[..., number])
            new = each.update(own, jax.random.fold_in(rng, number))
            values |= {f"each/{number}/{path}": value for path, value in new.items()}
            left = left - each.vectors_after(own, new)
        return values
