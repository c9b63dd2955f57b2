"""A codebook of moving averages: a code is the mean of the vectors that lately had it.

van den Oord et al., "Neural Discrete Representation Learning" (2017), appendix A.1. Its parameters
are learnt from statistics of the whole batch, never by gradients: rules freeze them, and the
training step writes what `update` gives.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from mmjax.quantizers.base import QUANTIZERS, Quantized, Statistics
from mmjax.quantizers.codebook import Codebook, CodebookConfig, drawn, nearest, unit
from mmjax.typing import Array, Bool, Float, Int, Key


@dataclasses.dataclass(frozen=True)
class EMACodebookConfig(CodebookConfig):
    """The fields of a codebook, and these.

    Attributes:
      decay: of the moving averages, per step.
      eps: is added to each count (Laplace), so that unused codes are not divided by nothing.
      revive: codes that on average fewer vectors of a batch have are replaced by vectors of the
        batch (Dhariwal et al., "Jukebox", 2020); 0: none are.
      kmeans: iterations of k-means that make the first codes from the first batch (Zeghidour et
        al., "SoundStream", 2021); 0: they are random.
    """

    decay: float = 0.99
    eps: float = 1e-5
    revive: float = 0.0
    kmeans: int = 0
    name: str = dataclasses.field(default="ema", init=False)

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay={self.decay} must be at least 0 and below 1.")
        if self.eps <= 0:
            raise ValueError(f"eps={self.eps} must be above 0.")
        if self.revive < 0 or self.kmeans < 0:
            raise ValueError(f"revive={self.revive}, kmeans={self.kmeans}: neither is below 0.")


@QUANTIZERS.register("ema")
class EMACodebook(Codebook):
    """Beside `embedding` there are the averages it is made of: `count` [K] of the vectors that each
    code had in a batch, and `total` [K, E] of their sums."""

    def __init__(self, config: EMACodebookConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        if config.unit:
            self.embedding[...] = unit(self.embedding[...])
        # Nothing is counted before k-means.
        self.count = nnx.Param(jnp.full(config.size, 0.0 if config.kmeans else 1.0))
        self.total = nnx.Param(jnp.copy(self.embedding[...]))

    def __call__(self, x: Float[Array, "*b e"]) -> Quantized:
        found = super().__call__(x)
        return found._replace(statistics=Statistics(x.astype(jnp.float32), found.codes))

    def loss(self, given: Float[Array, "*b e"], found: Float[Array, "*b e"]) -> Array:
        return self.config.commitment * drawn(given, found)

    @property
    def learnt(self) -> tuple[str, ...]:
        return ("embedding", "count", "total")

    def update(self, statistics: Statistics, rng: Key) -> dict[str, Array]:
        """See `Quantizer.update`.

        Raises:
          ValueError: a batch has fewer vectors than k-means must make codes.
        """
        config = self.config
        given = statistics.given.reshape(-1, config.width)
        given = unit(given) if config.unit else given
        count, total = sums(given, statistics.codes.reshape(-1), config.size)
        count = config.decay * self.count[...] + (1 - config.decay) * count
        total = config.decay * self.total[...] + (1 - config.decay) * total
        some = given[jax.random.choice(rng, len(given), (min(len(given), config.size),), False)]
        if config.kmeans:
            count, total = self._first(given, some, count, total)
        share = (count + config.eps) / (jnp.sum(count) + config.size * config.eps)
        embedding = total / (share * jnp.sum(count))[:, None]
        embedding = unit(embedding) if config.unit else embedding
        # The first dead code is replaced by the first of `some`, and so on while there are any.
        number = jnp.cumsum(count < config.revive) - 1
        dead = (count < config.revive) & (number < len(some))
        fresh = some[jnp.clip(number, 0, len(some) - 1)]
        return {
            "embedding": jnp.where(dead[:, None], fresh, embedding),
            "count": jnp.where(dead, config.revive, count),
            "total": jnp.where(dead[:, None], config.revive * fresh, total),
        }

    def _first(self, given: Array, start: Array, count: Array, total: Array) -> tuple[Array, Array]:
        """Count and total: of k-means with the first batch, and those given with later ones."""
        config, begun = self.config, self.begun()
        if len(start) < config.size:
            raise ValueError(
                f"k-means cannot make {config.size} codes of the {len(given)} vectors of a batch. "
                "Raise the batch size, or set kmeans=0 and revive unused codes instead."
            )
        means, found = k_means(
            given,
            start,
            jnp.where(begun, 0, config.kmeans),
            compare=config.compare,
            scaled=config.unit,
        )
        # A code without vectors keeps its place for a while.
        found = jnp.maximum(found, 1.0)
        count = jnp.where(begun, count, found)
        return count, jnp.where(begun, total, found[:, None] * means)

    def begun(self) -> Bool[Array, ""]:
        """Whether it has seen a batch, where k-means makes the first codes; else it always has."""
        return jnp.sum(self.count[...]) > 0

    def vectors_after(self, statistics: Statistics, new: dict[str, Array]) -> Float[Array, "*b e"]:
        """What the next quantiser of several subtracts: the vectors of the codes; where k-means has
        just made new ones, of the nearest of these."""
        given, codes = statistics
        if not self.config.kmeans:
            return self.vectors(codes)
        table, compare = new["embedding"], self.config.compare
        return jax.lax.cond(
            self.begun(),
            lambda: self.vectors(codes),
            lambda: table[nearest(given, table, compare)],
        )


def sums(
    x: Float[Array, "n e"], codes: Int[Array, " n"], size: int
) -> tuple[Float[Array, " k"], Float[Array, "k e"]]:
    """Number and sum of the vectors that each code has.

    A product, since sums by index come in no certain order on GPUs, where copies of a codebook
    would then part.
    """
    chosen = jax.nn.one_hot(codes, size)
    return jnp.sum(chosen, axis=0), jnp.matmul(chosen.T, x, precision="highest")


def k_means(
    x: Float[Array, "n e"],
    means: Float[Array, "k e"],
    iterations: int | Int[Array, ""],
    *,
    compare: str,
    scaled: bool,
) -> tuple[Float[Array, "k e"], Float[Array, " k"]]:
    """Means after some iterations, and how many vectors each had in the last one.

    Args:
      x: the vectors.
      means: the first ones; those without vectors stay what they are.
      iterations: 0 or more.
      compare: see `CodebookConfig`.
      scaled: whether means are scaled to unit length.
    """

    def improve(_, found):
        means, _ = found
        count, total = sums(x, nearest(x, means, compare), len(means))
        new = total / jnp.maximum(count, 1)[:, None]
        return jnp.where(count[:, None] > 0, unit(new) if scaled else new, means), count

    return jax.lax.fori_loop(0, iterations, improve, (means, jnp.zeros(len(means))))
