"""The report of a study: report.html, which needs no other file, report.md and table.tex; and its
figures as vector drawings."""

from __future__ import annotations

import dataclasses
import html
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mmjax.study.grid import Study
from mmjax.train.workdir import write_atomically

FIGURES = "figures"
_RESAMPLES = 10_000
_STYLE = """
body { font: 15px/1.45 sans-serif; max-width: 62em; margin: 2em auto; color: #222; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .25em .7em; text-align: right }
th { border-bottom: 1px solid #444 } td:first-child, th:first-child { text-align: left }
tr:nth-child(even) td { background: #f4f4f4 } pre { background: #f4f4f4; padding: .7em }
figure { margin: 1.5em 0 } figcaption { color: #555 } svg { max-width: 100%; height: auto }
"""


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells as text; the first column names the row."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def markdown(self) -> str:
        lines = [self.head, ["---"] + ["---:"] * (len(self.head) - 1), *self.rows]
        text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return "\n\n".join(filter(None, (f"## {self.title}", text, self.note)))

    def html(self) -> str:
        def row(cells: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

        body = "".join(row(cells, "td") for cells in self.rows)
        note = f"<p>{html.escape(self.note)}</p>" if self.note else ""
        return (
            f"<h2>{html.escape(self.title)}</h2><table>{row(self.head, 'th')}{body}</table>{note}"
        )

    def latex(self) -> str:
        """For the package booktabs."""

        def row(cells: Sequence[str]) -> str:
            return " & ".join(map(_latex, cells)) + r" \\"

        columns = "l" + "r" * (len(self.head) - 1)
        return "\n".join(
            (
                rf"% {self.title}",
                rf"\begin{{tabular}}{{{columns}}}",
                r"\toprule",
                row(self.head),
                r"\midrule",
                *map(row, self.rows),
                r"\bottomrule",
                r"\end{tabular}",
            )
        )


_LATEX = str.maketrans(
    {sign: "\\" + sign for sign in "_%&#$"} | {"\\": r"\textbackslash{}", "±": r"$\pm$"}
)


def _latex(text: str) -> str:
    return text.translate(_LATEX)


def paired_difference(
    one: pd.Series, other: pd.Series, rng: np.random.Generator
) -> tuple[float, float, float]:
    """The mean difference of two arms over seeds, and its 95% interval by a bootstrap that draws
    seeds: the same for both, as they have the same data in the same order.

    Args:
      one, other: scores by seed.

    Returns:
      (difference, lower end, upper end); NaN for the ends where there is one seed.
    """
    both = pd.concat([one, other], axis=1, join="inner").to_numpy()
    differences = both[:, 0] - both[:, 1]
    if len(differences) < 2:
        return float(differences.mean()), math.nan, math.nan
    drawn = rng.integers(len(differences), size=(_RESAMPLES, len(differences)))
    low, high = np.percentile(differences[drawn].mean(axis=1), (2.5, 97.5))
    return float(differences.mean()), float(low), float(high)


def ranks(chosen: pd.DataFrame, metric: str) -> pd.Series:
    """The mean rank of each arm over seeds, 1 the best; ties share theirs."""
    by_seed = chosen.groupby("seed")[metric].rank(ascending=False)
    return by_seed.groupby(chosen.arm).mean()


def chosen_runs(rows: pd.DataFrame, rates: Mapping[str, float]) -> pd.DataFrame:
    """The runs of each arm at its rate."""
    return rows[rows.rate == rows.arm.map(rates)]


def make_tables(
    study: Study, rows: pd.DataFrame, rates: Mapping[str, float], costs: pd.DataFrame
) -> list[Table]:
    """All but failures."""
    chosen = chosen_runs(rows, rates)
    metric = study.metric
    mean = chosen.groupby("arm")[metric].mean().sort_values(ascending=False)
    place = ranks(chosen, metric)
    rng = np.random.default_rng(0)
    best = mean.index[0]
    scores = {arm: own.set_index("seed")[metric] for arm, own in chosen.groupby("arm")}
    columns = [name for name in costs.columns if name != "arm"]
    by_arm = costs.set_index("arm")
    main = []
    for arm in mean.index:
        own = scores[arm]
        cells = [arm, f"{rates[arm]:g}", str(len(own)), _spread(own), f"{place[arm]:.2g}"]
        if arm == best:
            cells.append("")
        else:
            cells.append(_interval(*paired_difference(own, scores[best], rng)))
        main.append(cells + [f"{by_arm.loc[arm, name]:,.6g}" for name in columns])
    tables = [
        Table(
            "Arms",
            ("arm", study.rate, "seeds", metric, "mean rank", f"less than {best}", *columns),
            main,
            f"Mean ± standard deviation over seeds. Differences are paired by seed, with 95% "
            f"intervals of a bootstrap over seeds; with {study.seeds} seeds these are rough, and "
            "arms whose interval holds 0 are not told apart.",
        )
    ]
    others = [
        name
        for name in rows
        if name.startswith("eval/") and name != metric and chosen[name].notna().any()
    ]
    if others:
        tables.append(
            Table(
                "All scores",
                ("score", *mean.index),
                [
                    [name, *(_spread(chosen[chosen.arm == arm][name]) for arm in mean.index)]
                    for name in others
                ],
            )
        )
    axes = list(study.axes)
    if len(axes) > 1:
        tables.append(
            Table(
                "Main effects",
                ("axis", "level", "arms", metric),
                [
                    [axis, str(level), str(part.arm.nunique()), _spread(part[metric])]
                    for axis in axes
                    for level, part in chosen.groupby(axis, sort=False)
                ],
                "Means over all arms of a level, which only compares where the grid is full.",
            )
        )
    return tables


def _spread(values: pd.Series) -> str:
    values = values.dropna()
    if values.empty:
        return ""
    deviation = f" ± {values.std():.2g}" if len(values) > 1 else ""
    return f"{values.mean():.4g}{deviation}"


def _interval(difference: float, low: float, high: float) -> str:
    text = f"{difference:+.3g}"
    return text if math.isnan(low) else f"{text} [{low:+.3g}, {high:+.3g}]"


# --- figures


def _dots(study: Study, rows: pd.DataFrame, rates: Mapping[str, float], axes: Any) -> str:
    chosen = chosen_runs(rows, rates)
    order = chosen.groupby("arm")[study.metric].mean().sort_values().index
    for place, arm in enumerate(order):
        values = chosen[chosen.arm == arm][study.metric]
        axes.plot(values, [place] * len(values), "o", color="#888888", markersize=4)
        axes.plot(values.mean(), place, "|", color="#c0392b", markersize=16, markeredgewidth=2)
    axes.set_yticks(range(len(order)), order)
    axes.set_xlabel(study.metric)
    axes.grid(axis="x", color="#dddddd")
    return "Each seed (dots) and their mean (line)."


def _search(study: Study, rows: pd.DataFrame, rates: Mapping[str, float], axes: Any) -> str:
    first = rows[rows.seed == 0].sort_values("rate")
    for arm, own in first.groupby("arm", sort=False):
        axes.plot(own.rate, own[study.metric], "o-", markersize=4, label=arm)
    axes.set_xscale("log")
    axes.set_xlabel(study.rate)
    axes.set_ylabel(study.metric)
    axes.legend(fontsize=7, frameon=False)
    return "The search of the rate, with the first seed. A best rate at the border asks for more."


def _effect(study: Study, rows: pd.DataFrame, rates: Mapping[str, float], axes: Any) -> str:
    chosen = chosen_runs(rows, rates)
    first, second = list(study.axes)[:2]
    table = chosen.pivot_table(study.metric, first, second, sort=False)
    image = axes.imshow(table.to_numpy(), cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(table.columns)), table.columns)
    axes.set_yticks(range(len(table.index)), table.index)
    axes.set_xlabel(second)
    axes.set_ylabel(first)
    middle = np.nanmean([table.to_numpy().min(), table.to_numpy().max()])
    for (i, j), value in np.ndenumerate(table.to_numpy()):
        colour = "white" if value < middle else "black"
        if not math.isnan(value):
            axes.text(j, i, f"{value:.3g}", ha="center", va="center", color=colour, fontsize=8)
    axes.figure.colorbar(image, ax=axes, label=study.metric)
    return f"{first} x {second}: the mean over seeds, and over what else the arms differ in."


Drawing = Callable[[Study, pd.DataFrame, Mapping[str, float], Any], str]


def _pareto(cost: str, costs: pd.DataFrame) -> Drawing:
    def draw(study: Study, rows: pd.DataFrame, rates: Mapping[str, float], axes: Any) -> str:
        mean = chosen_runs(rows, rates).groupby("arm")[study.metric].mean()
        paid = costs.set_index("arm")[cost][mean.index]
        axes.plot(paid, mean, "o", color="#2c5aa0")
        front = pd.DataFrame({"paid": paid, "mean": mean}).sort_values(
            ["paid", "mean"], ascending=[True, False]
        )
        front = front[front["mean"] > front["mean"].cummax().shift(fill_value=-math.inf)]
        axes.step(front.paid, front["mean"], where="post", color="#c0392b", linewidth=1)
        for arm in mean.index:
            axes.annotate(arm, (paid[arm], mean[arm]), fontsize=7, xytext=(4, 3),
                          textcoords="offset points")  # fmt: skip
        axes.set_xlabel(cost)
        axes.set_ylabel(study.metric)
        return f"What an arm reaches for its {cost}; the line is the Pareto front."

    return draw


def draw_figures(
    study: Study,
    rows: pd.DataFrame,
    rates: Mapping[str, float],
    costs: pd.DataFrame,
    losses: Mapping[str, pd.DataFrame],
) -> dict[str, tuple[str, str]]:
    """{name: (SVG, caption)}"""
    import matplotlib
    from matplotlib.figure import Figure

    drawings: dict[str, Drawing] = {"arms": _dots}
    if len(study.rates) > 1:
        drawings["search"] = _search
    if len(study.axes) > 1:
        drawings["interaction"] = _effect
    for name in costs.columns:
        if name != "arm" and costs[name].nunique() > 1:
            drawings[f"pareto_{name.replace(' ', '_')}"] = _pareto(name, costs)
    if losses:
        drawings["losses"] = _losses(losses)
    made = {}
    for name, draw in drawings.items():
        height = 1.2 + 0.3 * rows.arm.nunique() if name == "arms" else 3.6
        figure = Figure(figsize=(7, height), layout="constrained")
        caption = draw(study, rows, rates, figure.add_subplot())
        file = io.StringIO()
        # Without a date and with fixed names within: equal tables make equal drawings.
        with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
            figure.savefig(file, format="svg", metadata={"Date": None})
        made[name] = (file.getvalue(), caption)
    return made


def _losses(losses: Mapping[str, pd.DataFrame]) -> Drawing:
    def draw(study: Study, rows: pd.DataFrame, rates: Mapping[str, float], axes: Any) -> str:
        for arm, table in losses.items():
            mean = table.mean(axis=1)
            (line,) = axes.plot(mean.index, mean, linewidth=1, label=arm)
            axes.fill_between(
                mean.index, table.min(axis=1), table.max(axis=1), alpha=0.15,
                color=line.get_color(), linewidth=0,
            )  # fmt: skip
        axes.set_xlabel("step")
        axes.set_ylabel("train/loss")
        axes.legend(fontsize=7, frameon=False)
        return "The training loss of the last stage: mean over seeds, and between which they lie."

    return draw


def write_report(
    directory: Path,
    study: Study,
    rows: pd.DataFrame,
    rates: Mapping[str, float],
    costs: pd.DataFrame,
    losses: Mapping[str, pd.DataFrame],
    failures: Mapping[str, str],
) -> None:
    """See the module's docstring.

    Args:
      directory: of the study.
      rows: all finished runs, as `read_rows` has them.
      rates: {arm: its rate}.
      costs: a row for each arm, with `arm` and numbers.
      losses: {arm: training loss, a row for each step, a column for each seed}.
      failures: {run: why}.
    """
    tables, figures = [], {}
    if rates:
        tables = make_tables(study, rows, rates, costs)
        figures = draw_figures(study, rows, rates, costs, losses)
    budget = (
        f"{len(study.rates)} rates x 1 seed, then {study.seeds - 1} further seeds at the best "
        f"rate by {study.metric}; {len(rates)} arms, {len(rows)} runs finished, "
        f"{len(failures)} failed. The seed decides initial parameters and the order of the data, "
        "alike in all arms."
    )
    (directory / FIGURES).mkdir(exist_ok=True)
    for name, (drawing, _) in figures.items():
        write_atomically(directory / FIGURES / f"{name}.svg", drawing)
    write_atomically(directory / "table.tex", "\n\n".join(t.latex() for t in tables) + "\n")
    parts = [f"# {study.config}", budget, *(table.markdown() for table in tables)]
    parts += [f"![{name}]({FIGURES}/{name}.svg)\n\n{text}" for name, (_, text) in figures.items()]
    if failures:
        parts.append("## Failed")
        parts += [
            f"`{name}`\n\n" + "\n".join(f"    {line}" for line in reason.splitlines())
            for name, reason in failures.items()
        ]
    write_atomically(directory / "report.md", "\n\n".join(parts) + "\n")
    body = "".join(_html(study, budget, tables, figures, failures))
    write_atomically(
        directory / "report.html",
        f"<!doctype html><meta charset=utf-8><title>{html.escape(study.config)}</title>"
        f"<style>{_STYLE}</style>{body}",
    )


def _html(
    study: Study,
    budget: str,
    tables: Iterable[Table],
    figures: Mapping[str, tuple[str, str]],
    failures: Mapping[str, str],
) -> Iterable[str]:
    yield f"<h1>{html.escape(study.config)}</h1><p>{html.escape(budget)}</p>"
    for table in tables:
        yield table.html()
    for drawing, caption in figures.values():
        # Without the XML prologue, which has no place within a page.
        inner = drawing[drawing.index("<svg") :]
        yield f"<figure>{inner}<figcaption>{html.escape(caption)}</figcaption></figure>"
    if failures:
        yield "<h2>Failed</h2>"
    for name, reason in failures.items():
        yield f"<p><code>{html.escape(name)}</code></p><pre>{html.escape(reason)}</pre>"
    yield f"<h2>Study</h2><pre>{html.escape(study.to_json())}</pre>"
