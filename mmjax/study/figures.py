"""The figures of a study's report, as vector drawings."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from mmjax.study.comparison import Comparison
from mmjax.study.results import TOKENS
from mmjax.study.statistics import smoothed

# Draws on axes of matplotlib; returns the caption.
Drawing = Callable[[Comparison, Any], str]
_MARK, _DOT, _LINE = "#c0392b", "#888888", "#2c5aa0"


def draw_figures(found: Comparison) -> dict[str, tuple[str, str]]:
    """{name: (SVG, caption)}"""
    import matplotlib
    from matplotlib.figure import Figure

    study, costs = found.study, found.costs
    drawings: dict[str, Drawing] = {"arms": _dots}
    if len(found.mean) > 2 and not math.isnan(found.ranks().distance):
        drawings["ranks"] = _ranks
    if found.groups:
        drawings["groups"] = _groups
    if len(study.rates) > 1:
        drawings["search"] = _search
    for first, second in itertools.combinations(study.axes, 2):
        drawings[f"interaction_{first}_{second}"] = _interaction(first, second)
    if TOKENS in costs and costs[TOKENS].nunique() > 1:
        drawings["tokens"] = _tokens
    for name in costs.columns:
        if costs[name].nunique() > 1:
            drawings[f"pareto_{name.replace(' ', '_')}"] = _pareto(name)
    if found.results.losses:
        drawings["losses"] = _losses
    made = {}
    for name, draw in drawings.items():
        tall = name in ("arms", "ranks", "groups")
        height = 1.4 + 0.26 * len(found.mean) if tall else 3.8
        figure = Figure(figsize=(7, height), layout="constrained")
        caption = draw(found, figure.add_subplot())
        file = io.StringIO()
        # Without a date and with fixed names within: equal tables make equal drawings.
        with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
            figure.savefig(file, format="svg", metadata={"Date": None})
        made[name] = (file.getvalue(), caption)
    return made


def _colours(count: int) -> list[Any]:
    """So many that can be told apart."""
    import matplotlib

    return [matplotlib.colormaps["tab20"](i % 20) for i in range(count)]


def _dots(found: Comparison, axes: Any) -> str:
    order = found.mean.index[::-1]
    for place, arm in enumerate(order):
        values = found.scores(arm)
        axes.plot(values, [place] * len(values), "o", color=_DOT, markersize=4)
        axes.plot(values.mean(), place, "|", color=_MARK, markersize=12, markeredgewidth=2)
    axes.set_yticks(range(len(order)), order, fontsize=8)
    axes.set_xlabel(found.study.compared)
    axes.grid(axis="x", color="#dddddd")
    distance = found.errors.distance
    text = "Each seed (dots) and their mean (line)."
    if not math.isnan(distance):
        axes.errorbar(
            found.mean.max() - distance / 2, len(order) - 0.4, xerr=distance / 2, color=_LINE,
            capsize=3, linewidth=1,
        )  # fmt: skip
        text += (
            " The bar above ends at the best and is as long as arms must be apart to be told apart "
            "at the level of 5%, all pairs considered (Tukey)."
        )
    return text


def _ranks(found: Comparison, axes: Any) -> str:
    ranks = found.ranks()
    order = ranks.mean.index[::-1]
    for place, arm in enumerate(order):
        axes.errorbar(
            ranks.mean[arm], place, xerr=ranks.distance / 2, fmt="o", color=_LINE, capsize=3,
            markersize=4, linewidth=1,
        )  # fmt: skip
    axes.set_yticks(range(len(order)), order, fontsize=8)
    axes.set_xlabel("mean rank (1: best)")
    axes.grid(axis="x", color="#dddddd")
    return (
        "Mean ranks over seeds and groups of questions. Arms whose bars overlap do not differ at "
        "the level of 5%: bars are half the critical distance to each side."
    )


def _groups(found: Comparison, axes: Any) -> str:
    table = np.array(
        [[found.of_group(arm, group).mean() for group in found.groups] for arm in found.mean.index]
    )
    _heat(axes, table, list(found.mean.index), found.groups, found.study.compared)
    return "Groups of questions: the mean over seeds."


def _heat(axes: Any, table: np.ndarray, rows: list[str], columns: list[str], label: str) -> None:
    image = axes.imshow(table, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(columns)), columns, fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    middle = np.nanmean([np.nanmin(table), np.nanmax(table)])
    for (i, j), value in np.ndenumerate(table):
        colour = "white" if value < middle else "black"
        if not math.isnan(value):
            axes.text(j, i, f"{value:.3g}", ha="center", va="center", color=colour, fontsize=8)
    axes.figure.colorbar(image, ax=axes, label=label)


def _search(found: Comparison, axes: Any) -> str:
    rows = found.results.rows
    first = rows[rows.seed == 0].sort_values("rate")
    arms = list(found.mean.index)
    for arm, colour in zip(arms, _colours(len(arms)), strict=True):
        own = first[first.arm == arm]
        axes.plot(own.rate, own[found.study.metric], "o-", markersize=4, label=arm, color=colour)
    axes.set_xscale("log")
    axes.set_xlabel(found.study.rate)
    axes.set_ylabel(found.study.metric)
    _legend(axes)
    return "The search of the rate, with the first seed. A best rate at the border asks for more."


def _legend(axes: Any) -> None:
    axes.legend(fontsize=6, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def _interaction(first: str, second: str) -> Drawing:
    def draw(found: Comparison, axes: Any) -> str:
        table = found.chosen.pivot_table(found.study.compared, first, second, sort=False)
        # As the study names them.
        rows, columns = (
            [level for level in map(str, found.study.axes[axis]) if level in there]
            for axis, there in ((first, table.index), (second, table.columns))
        )
        table = table.loc[rows, columns]
        _heat(axes, table.to_numpy(), rows, columns, found.study.compared)
        axes.set_xlabel(second)
        axes.set_ylabel(first)
        return f"{first} x {second}: the mean over seeds, and over what else the arms differ in."

    return draw


def _tokens(found: Comparison, axes: Any) -> str:
    axis, *others = found.study.axes
    levels = found.chosen.drop_duplicates("arm").set_index("arm")
    table = pd.DataFrame(
        {
            "tokens": found.costs[TOKENS],
            "mean": found.mean,
            "deviation": found.chosen.groupby("arm")[found.study.compared].std(),
            "level": levels[axis],
        }
    )
    table = table.dropna(subset="level").sort_values("tokens")
    names = list(table.level.unique())
    for name, colour in zip(names, _colours(len(names)), strict=True):
        # Of arms of a level with as many tokens, the best.
        own = table[table.level == name].sort_values("mean").drop_duplicates("tokens", keep="last")
        own = own.sort_values("tokens")
        axes.errorbar(
            own.tokens, own["mean"], yerr=own.deviation, fmt="o-", markersize=4, capsize=2,
            linewidth=1, label=name, color=colour,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks(sorted(table.tokens.unique()), [str(n) for n in sorted(table.tokens.unique())])
    axes.minorticks_off()
    axes.set_xlabel(TOKENS)
    axes.set_ylabel(found.study.compared)
    _legend(axes)
    rest = f" (of several arms, which differ in {', '.join(others)}, the best)" if others else ""
    return f"For each {axis}{rest}: mean and deviation over seeds."


def _pareto(cost: str) -> Drawing:
    def draw(found: Comparison, axes: Any) -> str:
        paid, mean = found.costs[cost], found.mean
        front = pd.DataFrame({"paid": paid, "mean": mean}).sort_values(
            ["paid", "mean"], ascending=[True, False]
        )
        front = front[front["mean"] > front["mean"].cummax().shift(fill_value=-math.inf)]
        axes.step(front.paid, front["mean"], where="post", color=_MARK, linewidth=1)
        spread = found.chosen.groupby("arm")[found.study.compared].std()
        for arm, colour in zip(mean.index, _colours(len(mean)), strict=True):
            axes.errorbar(
                paid[arm], mean[arm], yerr=spread[arm], fmt="o", markersize=5, capsize=2,
                linewidth=1, color=colour, label=arm,
            )  # fmt: skip
        axes.set_xlabel(cost)
        axes.set_ylabel(found.study.compared)
        _legend(axes)
        return (
            f"What an arm reaches for its {cost}, with the deviation over seeds; the line is the "
            "Pareto front of the means, which noise may shift."
        )

    return draw


def _losses(found: Comparison, axes: Any) -> str:
    losses = found.results.losses
    arms = [arm for arm in found.mean.index if arm in losses]
    for arm, colour in zip(arms, _colours(len(arms)), strict=True):
        table = losses[arm]
        mean = smoothed(table)
        axes.plot(mean.index, mean, linewidth=1, label=arm, color=colour)
        axes.fill_between(
            mean.index, table.min(axis=1), table.max(axis=1), alpha=0.15, color=colour, linewidth=0
        )
    axes.set_xlabel("step")
    axes.set_ylabel("train/loss")
    _legend(axes)
    return (
        "The training loss of the last stage: its smoothed mean over seeds, and between which the "
        "batches of the seeds lie."
    )
