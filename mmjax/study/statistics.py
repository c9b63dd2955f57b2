"""What may be said of differences between arms: errors of means, intervals, and ranks.

A study crosses arms with seeds and images: all arms are trained with the same seeds and asked about
the same images. What a difference of two arms would do with other seeds and other images follows
from how much it varies over both, as in studies where several readers judge the same cases: an
analysis of variance whose random factors are seeds and images.

Sources: Clark, "The language-as-fixed-effect fallacy" (1973); Satterthwaite, "An approximate
distribution of estimates of variance components" (1946); Demšar, "Statistical comparisons of
classifiers over multiple data sets" (2006).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

_RESAMPLES, _BLOCK = 4_000, 250
_LEVEL = 0.95
_ROWS = 5  # of the training log, whose mean counts as the loss


class Interval(NamedTuple):
    """A difference and its 95% interval; NaN for the ends where nothing is known of them."""

    mean: float
    low: float
    high: float

    @property
    def tells(self) -> bool:
        """Whether it leaves out 0."""
        return self.low > 0 or self.high < 0


class Errors(NamedTuple):
    """How exactly the means of arms are known, where all have the same seeds and images.

    Attributes:
      variance: of the mean of one arm, but for what arms share; so that of the difference of two is
        twice as large. It is one for all arms; NaN where there is one seed and one image.
      freedom: its degrees of freedom.
      arms: how many are compared.
    """

    variance: float
    freedom: float
    arms: int

    def interval(self, difference: float, squares: float = 2.0) -> Interval:
        """Of one difference that was chosen before anything was seen.

        Args:
          squares: the sum of the squared weights of the arms in it.
        """
        half = stats.t.ppf((1 + _LEVEL) / 2, self.freedom) * math.sqrt(squares * self.variance)
        return Interval(difference, difference - half, difference + half)

    def p(self, difference: float, squares: float = 2.0) -> float:
        """How probable a difference as large is where there is none; see `interval`."""
        error = math.sqrt(squares * self.variance)
        return float(2 * stats.t.sf(abs(difference) / error, self.freedom)) if error else math.nan

    def p_of_all(self, difference: float) -> float:
        """How probable it is that any two arms are as far apart where all are alike (Tukey)."""
        error = math.sqrt(self.variance)
        if not error > 0:
            return math.nan
        return float(stats.studentized_range.sf(abs(difference) / error, self.arms, self.freedom))

    def p_alike(self, differences: Sequence[float], squares: float = 2.0) -> float:
        """How probable it is that differences of arms of their own vary as much where all are the
        same: an F test.

        Args:
          squares: as `interval`, of each of them.
        """
        ratio = float(np.var(differences, ddof=1)) / (squares * self.variance or math.nan)
        return float(stats.f.sf(ratio, len(differences) - 1, self.freedom))

    @property
    def distance(self) -> float:
        """Arms at least so far apart are told apart, all pairs considered at once (Tukey)."""
        if math.isnan(self.variance):
            return math.nan
        return float(_range_quantile(self.arms, self.freedom) * math.sqrt(self.variance))


@functools.cache
def _range_quantile(arms: int, freedom: float) -> float:
    return stats.studentized_range.ppf(_LEVEL, arms, freedom)


def mean_errors(scores: np.ndarray, clusters: np.ndarray, weights: np.ndarray) -> Errors:
    """The errors of weighted means over questions, from how arms interact with seeds and images.

    Args:
      scores: [arms, seeds, questions].
      clusters: [questions], the image of each question, from 0 on.
      weights: [questions], which add up to 1.
    """
    arms, seeds, _ = scores.shape
    images = int(clusters.max()) + 1
    if arms < 2:
        return Errors(math.nan, math.nan, arms)
    # By image, so that their mean is that of the questions; images with more of them weigh more.
    means = scores.mean(axis=1) @ weights
    parts = images * _by_cluster((scores - means[:, None, None]) * weights, clusters)
    total = parts.mean()
    by_arm = parts.mean(axis=(1, 2), keepdims=True)
    by_seed = parts.mean(axis=(0, 2), keepdims=True)
    by_image = parts.mean(axis=(0, 1), keepdims=True)
    arm_seed = parts.mean(axis=2, keepdims=True)
    arm_image = parts.mean(axis=1, keepdims=True)
    seed_image = parts.mean(axis=0, keepdims=True)
    of_seeds = arm_seed - by_arm - by_seed + total
    of_images = arm_image - by_arm - by_image + total
    rest = parts - arm_seed - arm_image - seed_image + by_arm + by_seed + by_image - total
    freedom_seeds, freedom_images = (arms - 1) * (seeds - 1), (arms - 1) * (images - 1)
    if not (freedom_seeds or freedom_images):
        return Errors(math.nan, math.nan, arms)
    if not freedom_images:
        return Errors(float((of_seeds**2).sum() / freedom_seeds / seeds), freedom_seeds, arms)
    squares_images = seeds * (of_images**2).sum() / freedom_images
    if not freedom_seeds:
        return Errors(float(squares_images / images), freedom_images, arms)
    squares_seeds = images * (of_seeds**2).sum() / freedom_seeds
    freedom_rest = freedom_seeds * (images - 1)
    squares_rest = (rest**2).sum() / freedom_rest
    # Neither factor can make differences more exact than chance alone does.
    squares = max(squares_seeds, squares_rest) + max(squares_images, squares_rest) - squares_rest
    spread = (
        squares_seeds**2 / freedom_seeds
        + squares_images**2 / freedom_images
        + squares_rest**2 / freedom_rest
    )
    freedom = squares**2 / spread if spread else math.nan
    return Errors(float(squares / (seeds * images)), float(freedom), arms)


def bootstrap_means(scores: np.ndarray, clusters: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[resamples, arms]: means over images drawn with replacement, each with all of its questions,
    the same for all arms.

    Args:
      scores: [arms, questions].
      clusters, weights: as `mean_errors`.
    """
    sums = _by_cluster(scores * weights, clusters)
    sizes = np.bincount(clusters, weights)
    images, rng = len(sizes), np.random.default_rng(0)
    drawn = []
    for start in range(0, _RESAMPLES, _BLOCK):
        block = min(_BLOCK, _RESAMPLES - start)
        counts = rng.multinomial(images, np.full(images, 1 / images), block).astype(np.float64)
        drawn.append(counts @ sums.T / (counts @ sizes)[:, None])
    return np.concatenate(drawn)


def percentile_interval(mean: float, drawn: np.ndarray) -> Interval:
    """Of a statistic and what a bootstrap drew of it."""
    ends = np.percentile(drawn, (100 * (1 - _LEVEL) / 2, 100 * (1 + _LEVEL) / 2))
    return Interval(mean, *map(float, ends))


def _by_cluster(values: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Sums over the last axis, by cluster."""
    order = np.argsort(clusters, kind="stable")
    starts = np.flatnonzero(np.diff(clusters[order], prepend=-1))
    return np.add.reduceat(values[..., order], starts, axis=-1)


def holm(values: Sequence[float]) -> list[float]:
    """p of several tests, each made so large that together they err as rarely as one (Holm)."""
    order = np.argsort(values)
    result, largest = [math.nan] * len(values), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - place) * values[index]))
        result[index] = largest
    return result


class Ranks(NamedTuple):
    """Mean ranks of arms, 1 the best.

    Attributes:
      mean: by arm, best first.
      blocks: over how many seeds and groups of questions.
      p: of the test that all arms are alike; NaN with one seed or one arm.
      distance: ranks further apart than this differ at the level of 5%, all pairs considered.
    """

    mean: pd.Series
    blocks: int
    p: float
    distance: float


def rank_arms(scores: pd.DataFrame) -> Ranks:
    """Mean ranks, and how far apart they would be if all arms were alike, by permutation.

    Friedman's and Nemenyi's tests ask for independent blocks. Groups of questions that one trained
    model answers are not: what a seed does to an arm it does to all groups. So arms are permuted
    within each seed, all groups together.

    Args:
      scores: a row for each seed and group of questions (the first level of the index is the seed),
        a column for each arm. Arms that lack a score are left out.
    """
    scores = scores.dropna(axis=1)
    rows, arms = scores.shape
    ranks = scores.rank(axis=1, ascending=False)
    mean = ranks.mean().sort_values(kind="stable")
    by_seed = ranks.groupby(level=0).sum().to_numpy() / rows
    if arms < 2 or len(by_seed) < 2:
        return Ranks(mean, rows, math.nan, math.nan)
    rng = np.random.default_rng(0)
    drawn = sum(
        own[rng.permuted(np.tile(np.arange(arms), (_RESAMPLES, 1)), axis=1)] for own in by_seed
    )
    # Ranks have few values: the smallest distance that chance reaches in no more than 5%.
    ranges = np.sort(np.ptp(drawn, axis=1))
    spread = float(mean.var(ddof=0))
    p = (1 + np.sum(drawn.var(axis=1) >= spread * (1 - 1e-9))) / (1 + _RESAMPLES)
    return Ranks(mean, rows, float(p), float(ranges[math.ceil(_LEVEL * _RESAMPLES) - 1]))


def smoothed(losses: pd.DataFrame) -> pd.Series:
    """The mean over seeds, and over the last rows: a row is the loss of one batch."""
    return losses.mean(axis=1).rolling(_ROWS, min_periods=1).mean()


def steps_to(losses: pd.DataFrame, threshold: float) -> float:
    """The first logged step whose smoothed loss is `threshold` or less; NaN if none is."""
    mean = smoothed(losses)
    reached = mean.index[mean <= threshold]
    return float(reached[0]) if len(reached) else math.nan
