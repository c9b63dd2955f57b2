"""What a quantiser is. Each is one file: a frozen config that says its name, and a module."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
from flax import nnx

from mmjax.registry import Registry
from mmjax.typing import Array, Float, Int, Key


@dataclasses.dataclass(frozen=True)
class QuantizerConfig:
    """The fields of a quantiser; each has a subclass with a constant `name` of its own.

    Subclasses have, as fields or properties, `size`, the number of different codes, and `width`, of
    the vectors.
    """

    name: str = dataclasses.field(default="", init=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the codes of one vector: (), or (D,) where it has several."""
        return ()


class Statistics(NamedTuple):
    """What a quantiser learns from without gradients.

    Attributes:
      given: [..., E] float32, the vectors.
      codes: [..., *shape] int32, theirs.
    """

    given: Array
    codes: Array


class Quantized(NamedTuple):
    """
    Attributes:
      vectors: [..., E], those of the codes. Their gradient goes to the vectors that were given.
      codes: [..., *shape] int32.
      loss: scalar float32, to be added to what the vectors are used for; 0 for those without.
      statistics: for `Quantizer.update`; () for those that learn nothing from them.
    """

    vectors: Array
    codes: Array
    loss: Array
    statistics: Statistics | tuple[()] = ()


class Quantizer(nnx.Module):
    """vectors [..., E] -> `Quantized`, computed in float32.

    Args:
      config: of the quantiser's own class.
      rngs: random streams for the initial parameters.
    """

    def __init__(self, config: QuantizerConfig, *, rngs: nnx.Rngs):
        raise NotImplementedError

    def __call__(self, x: Float[Array, "*b e"]) -> Quantized:
        raise NotImplementedError

    def codes(self, x: Float[Array, "*b e"]) -> Int[Array, "*c"]:
        """[..., *shape] int32; nothing else of `Quantized`."""
        return self(x).codes

    def vectors(self, codes: Int[Array, "*c"]) -> Float[Array, "*b e"]:
        """float32, of codes [..., *shape]."""
        raise NotImplementedError

    @property
    def learnt(self) -> tuple[str, ...]:
        """Paths within it of the parameters that `update` changes, which gradients must not."""
        return ()

    def update(self, statistics: Statistics | tuple[()], rng: Key) -> dict[str, Array]:
        """New values of the parameters `learnt`, by path.

        Args:
          statistics: of a whole batch, as this quantiser gave them.
          rng: of random choices.
        """
        return {}


QUANTIZERS: Registry[type[Quantizer]] = Registry("quantizer")


def make_quantizer(config: QuantizerConfig, *, rngs: nnx.Rngs) -> Quantizer:
    """The module of a config."""
    return QUANTIZERS[config.name](config, rngs=rngs)


def straight_through(given: Float[Array, "*b e"], found: Float[Array, "*b e"]) -> Array:
    """`found`, with the gradient of `given` (Bengio et al., 2013)."""
    return given + jax.lax.stop_gradient(found - given)
