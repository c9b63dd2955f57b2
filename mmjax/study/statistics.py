"""What may be said of differences between arms: intervals, and ranks."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

_RESAMPLES = 4_000


class Interval(NamedTuple):
    """A mean and its 95% interval; NaN for the ends where there is nothing to draw."""

    mean: float
    low: float
    high: float

    @property
    def tells(self) -> bool:
        """Whether it leaves out 0."""
        return self.low > 0 or self.high < 0


def paired_difference(
    one: pd.DataFrame, other: pd.DataFrame, images: pd.Series | None = None, seed: int = 0
) -> Interval:
    """The mean difference of two arms, by a bootstrap over seeds and images.

    Seeds are drawn with replacement, and images, each with all of its questions: the same for both
    arms, as they have the same data in the same order and answer the same questions.

    Args:
      one, other: scores, a row for each seed, a column for each question; a single column where
        single questions are not known. Seeds and questions that only one of them has are left out.
      images: of each question; None: each has its own.
      seed: of the draws.
    """
    one, other = one.align(other, join="inner")
    differences = one.to_numpy() - other.to_numpy()
    seeds = len(differences)
    if images is None:
        clusters = np.arange(differences.shape[1])
    else:
        clusters = pd.factorize(images[one.columns])[0]
    count = clusters.max() + 1
    mean = float(differences.mean())
    if seeds < 2 and count < 2:
        return Interval(mean, math.nan, math.nan)
    sums = np.stack([np.bincount(clusters, row, count) for row in differences])
    sizes = np.bincount(clusters, minlength=count)
    rng = np.random.default_rng(seed)
    of_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), _RESAMPLES)
    of_images = rng.multinomial(count, np.full(count, 1 / count), _RESAMPLES)
    drawn = np.einsum("rs,sc,rc->r", of_seeds, sums, of_images, optimize=True)
    drawn = drawn / (seeds * (of_images @ sizes))
    return Interval(mean, *map(float, np.percentile(drawn, (2.5, 97.5))))


class Ranks(NamedTuple):
    """Mean ranks of arms, 1 the best, over blocks.

    Attributes:
      mean: by arm, best first.
      blocks: how many.
      p: of Friedman's test that all arms are alike; NaN with fewer than three arms.
      distance: ranks further apart than this differ at the level of 5% (Nemenyi's test).
    """

    mean: pd.Series
    blocks: int
    p: float
    distance: float


def rank_arms(blocks: pd.DataFrame) -> Ranks:
    """Demšar, "Statistical Comparisons of Classifiers over Multiple Data Sets" (2006).

    Args:
      blocks: scores, a row for each block (a seed, a group of questions), a column for each arm.
        Blocks that lack an arm are left out.
    """
    blocks = blocks.dropna()
    rows, arms = blocks.shape
    mean = blocks.rank(axis=1, ascending=False).mean().sort_values(kind="stable")
    if arms < 2 or rows == 0:
        return Ranks(mean, rows, math.nan, math.nan)
    p = math.nan
    if arms > 2 and rows > 1:
        p = float(stats.friedmanchisquare(*blocks.to_numpy().T).pvalue)
    quantile = stats.studentized_range.ppf(0.95, arms, math.inf) / math.sqrt(2)
    return Ranks(mean, rows, p, float(quantile * math.sqrt(arms * (arms + 1) / (6 * rows))))


def steps_to(losses: pd.DataFrame, threshold: float) -> float:
    """The first step that is logged with a mean loss over seeds of `threshold` or less; NaN if
    none is."""
    mean = losses.mean(axis=1)
    reached = mean.index[mean <= threshold]
    return float(reached[0]) if len(reached) else math.nan
