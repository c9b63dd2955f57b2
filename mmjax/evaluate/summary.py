"""From counts of each question to scores: of all, of each group, of each condition, with intervals.

A condition is the model itself (`MODEL`), a control, or the majority baseline.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from mmjax.evaluate.intervals import percentiles, resampled, wilson

MODEL, BLIND, MAJORITY, MACRO, CHANCE = "model", "blind", "majority", "macro", "chance"

# Sums [..., S] of counts, and of how many questions [...]: scores by name, [...] each.
Scores = Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Scoring:
    """What is made of counts.

    Attributes:
      scores: from sums over questions to scores by name; of no questions they are NaN.
      main: the score that `gain` is about.
      shares: scores between 0 and 1, shown in per cent; the main one, if it is among them, must be
        a mean over questions.
      better: whether the main score is better the "higher" or the "lower".
    """

    scores: Scores
    main: str
    shares: tuple[str, ...] = ()
    better: str = "higher"

    def of(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """Scores of sums [..., 1 + S], of which the first is how many questions there are."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.scores(sums[..., 1:], sums[..., 0])


def means(*names: str) -> Scores:
    """The scores are means of what is counted."""
    return lambda sums, questions: {name: sums[..., i] / questions for i, name in enumerate(names)}


def summarise(
    scoring: Scoring,
    counts: Mapping[str, np.ndarray],
    groups: Sequence[str],
    clusters: Sequence[int],
) -> dict[str, float]:
    """Scores by name: `accuracy`, `counting/accuracy`, `blind/accuracy`, `macro/gain_low`, ...

    Args:
      counts: by condition, [N, 1 + S]: 1 and what is counted of each question, or zeros where it
        was not asked.
      groups: of each question; "" is in none.
      clusters: the number of each question's image, from 0.

    Returns:
      Scores of whatever was asked, with `_low` and `_high` for each condition but the baseline; `n`
      questions of each group, and about how many `images`.
    """
    names = sorted(set(groups) - {""})
    places = ["", *(f"{name}/" for name in names)]
    member = np.array([[True, *(group == name for name in names)] for group in groups])
    stacked = np.stack(list(counts.values()), axis=1)
    totals = np.zeros((max(clusters) + 1, len(counts), len(places), stacked.shape[2]))
    for place, here in enumerate(member.T):
        np.add.at(totals[:, :, place], np.asarray(clusters)[here], stacked[here])
    sums = totals.sum(axis=0)
    values, draws = _with_macro(scoring.of(sums)), _with_macro(scoring.of(resampled(totals)))
    # A mean over groups varies as a share of so many trials does.
    with np.errstate(divide="ignore", invalid="ignore"):
        alike = len(names) ** 2 / np.sum(1 / sums[:, 1:, 0], axis=1, keepdims=True)
    trials = np.concatenate([sums[:, :, 0], alike], axis=1)
    asked = trials > 0
    number = member.sum(axis=0)
    found = {f"{place}n": float(n) for place, n in zip(places, number, strict=True)}
    found["images"] = float(len(totals))
    if len(names) > 1:
        places.append(f"{MACRO}/")

    def put(name: str, condition: int, value: np.ndarray, ends: Sequence[np.ndarray]) -> None:
        for place, prefix in enumerate(places):
            if asked[condition, place]:
                found[f"{prefix}{name}"] = float(value[place])
                for suffix, end in zip(("low", "high"), ends, strict=False):
                    found[f"{prefix}{name}_{suffix}"] = float(end[place])

    for condition, title in enumerate(counts):
        for metric, value in values.items():
            name = metric if title == MODEL else f"{title}/{metric}"
            ends = () if title == MAJORITY else percentiles(draws[metric][:, condition])
            if ends and metric == scoring.main and metric in scoring.shares:
                low, high = wilson(value[condition], trials[condition])
                ends = np.fmin(ends[0], low), np.fmax(ends[1], high)
            put(name, condition, value[condition], ends)
    if BLIND in counts:
        model, blind = (list(counts).index(title) for title in (MODEL, BLIND))
        sign = 1 if scoring.better == "higher" else -1
        value, drawn = sign * values[scoring.main], sign * draws[scoring.main]
        ends = percentiles(drawn[:, model] - drawn[:, blind])
        put("gain", model, value[model] - value[blind], ends)
    return found


def _with_macro(scores: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Scores [..., 1 + groups], followed by the mean over those groups where they are defined."""

    def add(values: np.ndarray) -> np.ndarray:
        inside = values[..., 1:]
        defined = ~np.isnan(inside)
        with np.errstate(invalid="ignore"):
            macro = np.where(defined, inside, 0.0).sum(axis=-1) / defined.sum(axis=-1)
        return np.concatenate([values, macro[..., None]], axis=-1)

    return {name: add(values) for name, values in scores.items()}


def table(scoring: Scoring, scores: Mapping[str, float], conditions: Iterable[str]) -> str:
    """Lines of groups, of all questions and of the mean over groups.

    Args:
      scores: of `summarise`.
      conditions: those there may be besides the model, in the order of the columns.
    """
    main, columns = scoring.main, {scoring.main: scoring.main}
    columns |= {name: f"{name}/{main}" for name in conditions}
    columns["gain"] = "gain"
    measured = (name.rpartition("_low")[0] for name in scores if "/" not in name)
    columns |= {name: name for name in measured if name and name != "gain"}

    places = {name[:-1]: name[:-2] for name in scores if name.endswith("/n")}
    places |= {"": "all", f"{MACRO}/": "mean of groups"}
    rows = [["", "questions", *columns]]
    for place, shown in places.items():
        cells = [_cell(scoring, scores, column, place + name) for column, name in columns.items()]
        if any(cells):
            rows.append(
                [shown, f"{scores[f'{place}n']:.0f}" if f"{place}n" in scores else "", *cells]
            )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    kept = [i for i in range(len(widths)) if any(row[i] for row in rows[1:])]
    return "\n".join(
        "  ".join(row[i].ljust(widths[i]) if i == 0 else row[i].rjust(widths[i]) for i in kept)
        for row in rows
    )


def _cell(scoring: Scoring, scores: Mapping[str, float], column: str, name: str) -> str:
    if name not in scores:
        return ""
    score = name.rpartition("/")[2]
    share = score in scoring.shares or (score == "gain" and scoring.main in scoring.shares)
    sign = "+" if score == "gain" else ""

    def number(name: str) -> str:
        value = scores[name]
        return f"{100 * value:{sign}.1f}" if share else f"{value:{sign}.3f}"

    text = number(name) + "%" * share
    if f"{name}_low" in scores and column in (scoring.main, BLIND, "gain"):
        text += f" [{number(f'{name}_low')}, {number(f'{name}_high')}]"
    return text
