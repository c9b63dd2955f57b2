"""The arms of a study, compared: what its tables and figures are made of."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from mmjax.study.grid import Study, sides_of
from mmjax.study.results import Results
from mmjax.study.statistics import (
    Errors,
    Interval,
    Ranks,
    bootstrap_means,
    holm,
    mean_errors,
    percentile_interval,
    rank_arms,
)

# The group of questions whose score is the mean of all groups'.
MACRO = "macro"


class Contrast(NamedTuple):
    """The difference of the means of some arms and of others.

    Attributes:
      interval: over seeds and images, for it alone.
      p: that there is none; of several contrasts, of all of them together (Holm).
    """

    name: str
    interval: Interval
    p: float


class Effect(NamedTuple):
    """What it does to go from one level of an axis to another, all else being equal.

    Attributes:
      axis, one, other: from which level to which.
      by: the difference, by what else the arms differ in.
      interval: of their mean.
      p: that it is none.
      p_alike: that it is the same whatever else the arms differ in (no interaction); NaN where they
        differ in nothing else.
    """

    axis: str
    one: str
    other: str
    by: Mapping[str, float]
    interval: Interval
    p: float
    p_alike: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """See the module.

    Attributes:
      study, results: what was compared, and what came out.
    """

    study: Study
    results: Results

    @functools.cached_property
    def chosen(self) -> pd.DataFrame:
        """The runs of each arm at its rate."""
        return self.results.chosen

    @functools.cached_property
    def mean(self) -> pd.Series:
        """The score of each arm, best first."""
        mean = self.chosen.groupby("arm")[self.study.compared].mean()
        return mean.sort_values(ascending=False, kind="stable")

    @functools.cached_property
    def costs(self) -> pd.DataFrame:
        """By arm."""
        return self.results.costs.set_index("arm").loc[self.mean.index]

    @functools.cached_property
    def groups(self) -> list[str]:
        """Of questions, where there are several."""
        answers = self.results.answers
        names = [] if answers is None else sorted(name for name in answers.groups.unique() if name)
        return names if len(names) > 1 else []

    def scores(self, arm: str, name: str | None = None) -> pd.Series:
        """Of a score, by seed; None: the one that arms are compared by."""
        own = self.chosen[self.chosen.arm == arm].set_index("seed")
        name = name or self.study.compared
        return own[name] if name in own else pd.Series(math.nan, own.index)

    def of_group(self, arm: str, group: str) -> pd.Series:
        """The score in a group of questions, by seed."""
        return self.results.answers.scores[arm] @ self.weights(group)

    def control(self, control: str) -> str:
        """The name of the compared score under a control."""
        front, _, score = self.study.compared.rpartition("/")
        return f"{front}/{control}/{score}"

    # --- how exactly differences are known

    def weights(self, group: str) -> np.ndarray:
        """Of each question in the score of a group; `MACRO`: of the mean of groups; "": of all."""
        groups = self.results.answers.groups
        if group == MACRO:
            sizes = groups.map(groups.value_counts())
            return (1 / (sizes * groups.nunique())).to_numpy(np.float64)
        here = (groups == group).to_numpy() if group else np.ones(len(groups), bool)
        return here / here.sum()

    @functools.cached_property
    def asked(self) -> np.ndarray | None:
        """The weight of each question in the score that arms are compared by; None where it is no
        mean of answers."""
        answers = self.results.answers
        if answers is None:
            return None
        _, _, *between, _ = self.study.compared.split("/")
        group = between[0] if between else ""
        if len(between) > 1 or group not in ("", MACRO, *answers.groups.unique()):
            return None
        weights = self.weights(group)
        for arm in self.mean.index:
            said = answers.scores[arm] @ weights
            if not np.allclose(said, self.scores(arm)[said.index], atol=1e-4):
                return None
        return weights

    @functools.cached_property
    def clusters(self) -> np.ndarray:
        """The image of each question, from 0 on."""
        return pd.factorize(self.results.answers.images)[0]

    @functools.cached_property
    def whole(self) -> list[str]:
        """Arms that have all seeds."""
        seeds = self.chosen.groupby("arm").seed.nunique()
        return [arm for arm in self.mean.index if seeds[arm] == seeds.max()]

    @functools.cached_property
    def errors(self) -> Errors:
        """Of the means of arms, over seeds and images: one for all that have all seeds."""
        return self._errors(self.whole)

    def _errors(self, arms: Sequence[str]) -> Errors:
        if self.asked is None:
            table = np.stack([self.scores(arm).sort_index() for arm in arms])
            return mean_errors(table[..., None], np.zeros(1, int), np.ones(1))
        answers = self.results.answers
        table = np.stack([answers.scores[arm].sort_index() for arm in arms])
        return mean_errors(table, self.clusters, self.asked)

    def _squares(self, weights: Mapping[str, float]) -> float:
        """See `Errors.interval`; the mean of an arm that lacks seeds is known less exactly."""
        seeds = self.chosen.groupby("arm").seed.nunique()
        return sum(w**2 * seeds.max() / seeds[arm] for arm, w in weights.items())

    def difference(self, one: str, other: str) -> Interval:
        """Of two arms that were chosen before anything was seen, over seeds and images."""
        squares = self._squares({one: 1, other: -1})
        return self.errors.interval(self.mean[one] - self.mean[other], squares)

    def p(self, one: str, other: str) -> float:
        """Of two arms among all: below 0.05 they are told apart. Over seeds and images."""
        scale = math.sqrt(2 / self._squares({one: 1, other: -1}))
        return self.errors.p_of_all(scale * (self.mean[one] - self.mean[other]))

    def over_images(self, one: str, other: str) -> Interval:
        """Of two arms as they were trained: the paired bootstrap over images."""
        mean = self.mean[one] - self.mean[other]
        if self.asked is None:
            return Interval(mean, math.nan, math.nan)
        return percentile_interval(mean, self._drawn[one] - self._drawn[other])

    @functools.cached_property
    def _drawn(self) -> pd.DataFrame:
        answers = self.results.answers
        means = np.stack([answers.scores[arm].mean() for arm in self.mean.index])
        drawn = bootstrap_means(means, self.clusters, self.asked)
        return pd.DataFrame(drawn, columns=self.mean.index)

    def above(self, control: str, group: str) -> dict[str, Interval]:
        """{arm: how much its score is above that of a control, by the paired bootstrap over images}

        Args:
          group: of questions; "": all.
        """
        answers, weights = self.results.answers, self.weights(group)
        gains = {
            arm: (answers.scores[arm] - answers.controls[control][arm]).mean()
            for arm in self.mean.index
        }
        # A question whose control could not be asked counts for none.
        there = np.logical_and.reduce([~gain.isna() for gain in gains.values()]) * (weights > 0)
        weights = np.where(there, weights, 0) / weights[there].sum()
        table = np.stack([gain.fillna(0) for gain in gains.values()])
        here = np.flatnonzero(there)
        clusters = pd.factorize(self.clusters[here])[0]
        drawn = bootstrap_means(table[:, here], clusters, weights[here])
        means = table @ weights
        return {
            arm: percentile_interval(float(mean), own)
            for arm, mean, own in zip(gains, means, drawn.T, strict=True)
        }

    def ranks(self) -> Ranks:
        """Over seeds and groups of questions; over seeds where there are no groups."""
        parts = {}
        for arm in self.whole:
            own = {group: self.of_group(arm, group) for group in self.groups}
            parts[arm] = pd.DataFrame(own or {"": self.scores(arm)}).stack()
        return rank_arms(pd.DataFrame(parts))

    # --- what was asked

    def pairs(self) -> pd.DataFrame:
        """A row for each two arms: all that is said of their difference."""
        rows = []
        for one, other in itertools.combinations(self.mean.index, 2):
            interval, images = self.difference(one, other), self.over_images(one, other)
            rows.append(
                {
                    "one": one,
                    "other": other,
                    "difference": interval.mean,
                    "low": interval.low,
                    "high": interval.high,
                    "low over images": images.low,
                    "high over images": images.high,
                    "p among all": self.p(one, other),
                }
            )
        return pd.DataFrame(rows)

    def contrasts(self) -> list[Contrast]:
        """Those that the study names, as far as their arms have finished; each with the error of
        its own arms, since some arms vary more than others."""
        found = []
        for name, contrast in self.study.contrasts.items():
            one, other = sides_of(contrast)
            if set(one + other) <= set(self.mean.index):
                weights = self._contrast(one, other)
                value = float(sum(w * self.mean[arm] for arm, w in weights.items()))
                squares = self._squares(weights)
                own = [arm for arm in self.whole if arm in weights]
                errors = self._errors(own) if len(own) == len(weights) else self.errors
                interval = errors.interval(value, squares)
                found.append(Contrast(name, interval, errors.p(value, squares)))
        together = holm([contrast.p for contrast in found])
        return [contrast._replace(p=p) for contrast, p in zip(found, together, strict=True)]

    @staticmethod
    def _contrast(one: Sequence[str], other: Sequence[str]) -> dict[str, float]:
        weights: dict[str, float] = {}
        for side, sign in ((one, 1.0), (other, -1.0)):
            for arm in side:
                weights[arm] = weights.get(arm, 0.0) + sign / len(side)
        return weights

    def effects(self) -> list[Effect]:
        """Of each axis, for each two levels that arms share which differ in nothing else."""
        axes = list(self.study.axes)
        table = self.chosen.drop_duplicates("arm").set_index("arm")[axes].dropna()
        found = []
        for axis in axes:
            rest = [other for other in axes if other != axis]
            names = table[rest].agg(",".join, axis=1) if rest else pd.Series("", table.index)
            placed = {(names[arm], table[axis][arm]): arm for arm in table.index}
            levels = [str(level) for level in self.study.axes[axis]]
            for one, other in itertools.combinations(levels, 2):
                both = [
                    name
                    for name in dict.fromkeys(names)
                    if (name, one) in placed and (name, other) in placed
                ]
                if both:
                    pairs = {name: (placed[name, one], placed[name, other]) for name in both}
                    found.append(self._effect(axis, one, other, pairs))
        return found

    def _effect(
        self, axis: str, one: str, other: str, pairs: Mapping[str, tuple[str, str]]
    ) -> Effect:
        by = {name: float(self.mean[b] - self.mean[a]) for name, (a, b) in pairs.items()}
        count, value = len(by), float(np.mean(list(by.values())))
        squares = self._squares(
            self._contrast([b for _, b in pairs.values()], [a for a, _ in pairs.values()])
        )
        alike = math.nan
        if count > 1:
            each = np.mean([self._squares({a: 1, b: -1}) for a, b in pairs.values()])
            alike = self.errors.p_alike(list(by.values()), float(each))
        interval = self.errors.interval(value, squares)
        return Effect(axis, one, other, by, interval, self.errors.p(value, squares), alike)


def spread(values: pd.Series) -> str:
    """Mean and deviation."""
    values = values.dropna()
    if values.empty:
        return ""
    deviation = f" ± {values.std():.2g}" if len(values) > 1 else ""
    return f"{values.mean():.4g}{deviation}"


def best_of(found: Comparison, arms: Iterable[str]) -> str:
    """The best of some arms."""
    among = set(arms)
    return next(arm for arm in found.mean.index if arm in among)
