"""The tables of a study's report."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from mmjax.study.comparison import MACRO, Comparison, best_of, spread
from mmjax.study.results import CONTROLS, TOKENS
from mmjax.study.statistics import Interval, smoothed, steps_to

_ALIKE = 1.1  # costs whose ratio is at most this count as equal
_LATEX = str.maketrans(
    {sign: "\\" + sign for sign in "_%&#$"} | {"\\": r"\textbackslash{}", "±": r"$\pm$"}
)


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
            return " & ".join(cell.translate(_LATEX) for cell in cells) + r" \\"

        return "\n".join(
            (
                rf"% {self.title}",
                rf"\begin{{tabular}}{{l{'r' * (len(self.head) - 1)}}}",
                r"\toprule",
                row(self.head),
                r"\midrule",
                *map(row, self.rows),
                r"\bottomrule",
                r"\end{tabular}",
            )
        )


def make_tables(found: Comparison) -> list[Table]:
    """All but failures."""
    tables = [_arms(found)]
    contrasts = _contrasts(found)
    if contrasts.rows:
        tables.append(contrasts)
    if found.groups:
        tables.append(_groups(found))
    if any(found.control(name) in found.chosen for name in CONTROLS):
        tables.append(_controls(found))
    tables += _above_controls(found)
    tables.append(_costs(found))
    tables += _at_equal_cost(found)
    effects = _effects(found)
    if effects.rows:
        tables.append(effects)
    return tables


def _arms(found: Comparison) -> Table:
    study, rates, best = found.study, found.results.rates, found.mean.index[0]
    ranks = found.ranks()
    rows = []
    for arm in found.mean.index:
        own = found.scores(arm)
        less, p = ("", "") if arm == best else _difference(found, arm, best)
        rank = f"{ranks.mean[arm]:.2f}" if arm in ranks.mean else ""
        rows.append([arm, _rate(found, arm, rates[arm]), str(len(own)), spread(own), rank, less, p])
    seeds = len(found.scores(found.whole[0]))
    sampled = " and ".join(["seeds"] * (seeds > 1) + ["images"] * (found.asked is not None))
    note = f"Mean ± standard deviation over seeds. {_intervals(found)} "
    if not math.isnan(found.errors.distance):
        note += (
            f"p says whether two arms differ, with other {sampled} too, all pairs of arms at once "
            f"(Tukey's test, {found.errors.freedom:.0f} degrees of freedom, one error for all "
            f"arms): they are told apart at the level of 5% from {found.errors.distance:.3g} on. "
        )
    if not math.isnan(ranks.distance):
        of = "pairs of a seed and a group of questions" if found.groups else "seeds"
        note += (
            f"Ranks are means over {ranks.blocks} {of}; those up to {ranks.distance:.2f} apart do "
            f"not differ at the level of 5%, and that all arms are alike has p = {ranks.p:.2g} "
            "(permutations of arms within seeds). "
        )
    note += (
        f"A rate at the {'border of' if len(study.rates) > 2 else 'end of'} the search is marked."
    )
    head = ("arm", study.rate, "seeds", study.compared, "mean rank", f"less than {best}", "p")
    return Table("Arms", head, rows, note)


def _rate(found: Comparison, arm: str, rate: float) -> str:
    """With what its search lacks."""
    rows = found.results.rows
    tried = rows[(rows.arm == arm) & (rows.seed == 0)].rate
    text = f"{rate:g}"
    rates = found.study.rates
    if len(rates) > 1 and rate in (min(rates), max(rates)):
        text += " (lowest)" if rate == min(rates) else " (highest)"
    if len(tried) < len(rates):
        text += f", of {len(tried)} of {len(rates)}"
    return text


def _difference(found: Comparison, one: str, other: str) -> tuple[str, str]:
    return _interval(found.over_images(one, other)), _p(found.p(one, other))


def _intervals(found: Comparison) -> str:
    if found.asked is None:
        return "Differences are paired by seed."
    return (
        "Differences are paired, with 95% intervals of a bootstrap over images: of these runs, "
        "whatever other seeds would do."
    )


def _contrasts(found: Comparison) -> Table:
    rows = [
        [contrast.name, _interval(contrast.interval), _p(contrast.p)]
        for contrast in found.contrasts()
    ]
    note = (
        "Asked for before anything had run: the mean of some arms less that of others, with 95% "
        "intervals of each by itself, over seeds and images, by the error of its own arms; p of "
        "all of them together (Holm)."
    )
    return Table("Contrasts", ("asked", "difference", "p"), rows, note)


def _groups(found: Comparison) -> Table:
    rows = []
    names = ["/".join(_inserted(found.study.compared, g, "blind")) for g in found.groups]
    # One baseline for all arms: with its own, an arm that guesses worse would look better.
    normalised = all(name in found.chosen for name in names)
    blind = found.chosen[names].mean().to_numpy() if normalised else np.zeros(0)
    normalised = normalised and bool((blind < 1).all())
    for arm in found.mean.index:
        own = [found.of_group(arm, group) for group in found.groups]
        cells = [arm, *map(spread, own), spread(found.of_group(arm, MACRO))]
        if normalised:
            parts = [(o - b) / (1 - b) for o, b in zip(own, blind, strict=True)]
            cells.append(spread(sum(parts) / len(parts)))
        rows.append(cells)
    head = ["arm", *found.groups, "mean"] + ["normalised"] * normalised
    note = (
        "Normalised: the mean over groups of (score - blind) / (1 - blind), blind being the mean "
        "of all arms without the image."
    ) * normalised
    return Table(f"Groups of questions: {found.study.compared}", head, rows, note)


def _inserted(score: str, *names: str) -> tuple[str, ...]:
    """The parts of a score's name with others before the last, as evaluators name them."""
    kind, evaluator, *_, last = score.split("/")
    return kind, evaluator, *names, last


def _controls(found: Comparison) -> Table:
    there = [name for name in CONTROLS if found.control(name) in found.chosen]
    rows = [
        [arm, spread(found.scores(arm))]
        + [spread(found.scores(arm, found.control(name))) for name in there]
        for arm in found.mean.index
    ]
    note = (
        "Blind: without the image. Shuffled: with that of another question. What is not above them "
        "has not been seen."
    )
    return Table("Controls", ("arm", found.study.compared, *there), rows, note)


def _above_controls(found: Comparison) -> Iterable[Table]:
    if found.results.answers is None:
        return
    for control in found.results.answers.controls:
        columns = {"all": "", **{group: group for group in found.groups}}
        above = [found.above(control, group) for group in columns.values()]
        rows = [[arm, *(_interval(gain[arm]) for gain in above)] for arm in found.mean.index]
        note = "With 95% intervals of the paired bootstrap over images."
        yield Table(f"Above {control}", ("arm", *columns), rows, note)


def _costs(found: Comparison) -> Table:
    table = found.costs.copy()
    rows = found.results.rows
    table["seconds a run"] = found.chosen.groupby("arm")["seconds"].mean()
    table["hours in all"] = rows.groupby("arm")["seconds"].sum() / 3600
    note = (
        "Seconds a run: of the whole process, with its start, compiling and evaluation, beside "
        "whatever else ran; hours in all: of all runs of an arm, its search among them. Connector "
        "parameters: of all that joins encoder and language model; its GFLOP: of making an image's "
        "visual tokens. "
    )
    losses = found.results.losses
    if losses:
        # What the middle arm ends with.
        threshold = float(np.median([smoothed(own).iloc[-1] for own in losses.values()]))
        name = f"steps to loss {threshold:.3g}"
        table[name] = pd.Series({arm: steps_to(own, threshold) for arm, own in losses.items()})
        note += "The loss, smoothed, is that with which the middle arm ends; empty: not reached. "
    if "prefill ms" in table:
        note += (
            f"Prefill: of one image and a question of 32 tokens, on {found.results.device}, all "
            "arms in one process, turn by turn; its MiB are parameters, inputs and what is "
            "computed, as the compiler plans it."
        )
    cells = [
        [arm, *map(_number, row)] for arm, row in zip(table.index, table.to_numpy(), strict=True)
    ]
    return Table("Costs", ("arm", *table.columns), cells, note)


def _at_equal_cost(found: Comparison) -> Iterable[Table]:
    """Arms that cost about the same, compared with the best of them."""
    for name, exact in (
        (TOKENS, True),
        ("connector parameters", False),
        ("prefill GFLOP", False),
        ("prefill ms", False),
    ):
        if name not in found.costs or found.costs[name].nunique() < 2:
            continue
        rows = []
        for arms in _alike(found.costs[name], 1.0 if exact else _ALIKE):
            best = best_of(found, arms)
            paid = found.costs[name][arms]
            label = _number(paid.min())
            label += "" if paid.nunique() == 1 else f" to {_number(paid.max())}"
            for arm in (arm for arm in found.mean.index if arm in arms):
                less, p = ("", "") if arm == best else _difference(found, arm, best)
                rows.append([arm, label, spread(found.scores(arm)), less, p])
        if rows:
            head = ("arm", name, found.study.compared, "less than the best of these", "p")
            note = "Intervals and p as in the table of arms. "
            note += "" if exact else f"Equal: within a factor of {_ALIKE:g} of the least."
            yield Table(f"At equal {name}", head, rows, note)


def _alike(costs: pd.Series, factor: float) -> list[list[str]]:
    """Arms in groups whose costs are within a factor of the least, cheapest group first."""
    groups: list[list[str]] = []
    for arm, value in costs.sort_values(kind="stable").items():
        if groups and value <= factor * costs[groups[-1][0]]:
            groups[-1].append(arm)
        else:
            groups.append([arm])
    return [group for group in groups if len(group) > 1]


def _effects(found: Comparison) -> Table:
    rows = []
    for effect in found.effects():
        least, most = (pick(effect.by, key=effect.by.get) for pick in (min, max))
        varies = ""
        if len(effect.by) > 1:
            varies = f"{effect.by[least]:+.3g} ({least}) to {effect.by[most]:+.3g} ({most})"
        cells = [effect.axis, f"{effect.one} to {effect.other}", str(len(effect.by))]
        cells += [_interval(effect.interval), _p(effect.p), varies, _p(effect.p_alike)]
        rows.append(cells)
    head = ("axis", "levels", "pairs", "difference", "p", "it varies from", "p of no interaction")
    note = (
        "Of arms that differ in nothing else: the mean of their differences, with 95% intervals "
        "over seeds and images, each by itself; how it varies with what else arms differ in, and "
        "whether it does."
    )
    return Table("Effects and interactions", head, rows, note)


def _interval(difference: Interval) -> str:
    # Without what rounding leaves of sums that are 0.
    mean, low, high = (round(value, 9) + 0.0 for value in difference)
    if math.isnan(low):
        return f"{mean:+.3g}"
    return f"{mean:+.3g} [{low:+.3g}, {high:+.3g}]"


def _p(value: float) -> str:
    if math.isnan(value):
        return ""
    return "< 0.001" if value < 1e-3 else f"{value:.2g}"


def _number(value: float) -> str:
    if math.isnan(value):
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
