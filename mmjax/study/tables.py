"""The tables of a study's report."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from mmjax.study.grid import Study
from mmjax.study.results import TOKENS, Results
from mmjax.study.statistics import Interval, Ranks, paired_difference, rank_arms, steps_to

CONTROLS = ("blind", "shuffled")
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


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The arms of a study as its tables and figures need them.

    Attributes:
      study, results: what was compared, and what came out.
      chosen: the runs of each arm at its rate.
      mean: the score of each arm, best first.
    """

    study: Study
    results: Results
    chosen: pd.DataFrame = dataclasses.field(init=False)
    mean: pd.Series = dataclasses.field(init=False)

    def __post_init__(self):
        chosen = self.results.chosen
        mean = chosen.groupby("arm")[self.study.compared].mean()
        object.__setattr__(self, "chosen", chosen)
        object.__setattr__(self, "mean", mean.sort_values(ascending=False, kind="stable"))

    @property
    def costs(self) -> pd.DataFrame:
        """By arm."""
        return self.results.costs.set_index("arm").loc[self.mean.index]

    @property
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
        answers = self.results.answers
        return answers.scores[arm][answers.groups.index[answers.groups == group]].mean(axis=1)

    def control(self, control: str, group: str | None = None) -> str:
        """The name of the compared score under a control, perhaps in a group."""
        front, _, score = self.study.compared.rpartition("/")
        return "/".join(filter(None, (front, group, control, score)))

    def difference(self, one: str, other: str) -> Interval:
        answers = self.results.answers
        if answers is None:
            return paired_difference(self.scores(one).to_frame(), self.scores(other).to_frame())
        return paired_difference(answers.scores[one], answers.scores[other], answers.images)

    def ranks(self) -> Ranks:
        """Over seeds and groups of questions; over seeds where there are no groups."""
        blocks = {}
        for arm in self.mean.index:
            parts = {group: self.of_group(arm, group) for group in self.groups}
            blocks[arm] = pd.concat(parts or {"": self.scores(arm)})
        return rank_arms(pd.DataFrame(blocks))


def make_tables(found: Comparison) -> list[Table]:
    """All but failures."""
    tables = [_arms(found)]
    if found.groups:
        tables.append(_groups(found))
    if any(found.control(name) in found.chosen for name in CONTROLS):
        tables.append(_controls(found))
    tables.append(_costs(found))
    tables += _at_equal_cost(found)
    if len(found.study.axes) > 1:
        tables.append(_main_effects(found))
    return tables


def _arms(found: Comparison) -> Table:
    study, rates, best = found.study, found.results.rates, found.mean.index[0]
    ranks = found.ranks()
    rows = []
    for arm in found.mean.index:
        own = found.scores(arm)
        less = "" if arm == best else _interval(found.difference(arm, best))
        rank = f"{ranks.mean[arm]:.2f}" if arm in ranks.mean else ""
        rows.append([arm, f"{rates[arm]:g}", str(len(own)), _spread(own), rank, less])
    answers = found.results.answers
    drawn = "seeds" if answers is None else "seeds and images"
    note = (
        f"Mean ± standard deviation over seeds. Differences are paired, with 95% intervals of a "
        f"bootstrap over {drawn}; arms whose interval holds 0 are not told apart, and with "
        f"{study.seeds} seeds intervals are rough. "
    )
    if not math.isnan(ranks.distance):
        of = "seeds and groups of questions" if found.groups else "seeds"
        note += (
            f"Ranks are means over {ranks.blocks} blocks ({of}); those less than "
            f"{ranks.distance:.2f} apart do not differ at the level of 5% (Nemenyi). "
        )
    if not math.isnan(ranks.p):
        note += (
            f"That all arms are alike has p = {ranks.p:.2g} (Friedman). Blocks of one seed are not "
            "independent."
        )
    head = ("arm", study.rate, "seeds", study.compared, "mean rank", f"less than {best}")
    return Table("Arms", head, rows, note)


def _groups(found: Comparison) -> Table:
    rows = []
    blinds = [found.control("blind", group) for group in found.groups]
    normalised = all(name in found.chosen for name in blinds)
    for arm in found.mean.index:
        own = [found.of_group(arm, group) for group in found.groups]
        cells = [arm, *map(_spread, own), _spread(sum(own) / len(own))]
        if normalised:
            blind = [found.scores(arm, name) for name in blinds]
            parts = [(o - b) / (1 - b) for o, b in zip(own, blind, strict=True)]
            cells.append(_spread(sum(parts) / len(parts)))
        rows.append(cells)
    head = ["arm", *found.groups, "mean"] + ["normalised"] * normalised
    note = "Normalised: the mean over groups of (score - blind) / (1 - blind)." * normalised
    return Table(f"Groups of questions: {found.study.compared}", head, rows, note)


def _controls(found: Comparison) -> Table:
    there = [name for name in CONTROLS if found.control(name) in found.chosen]
    rows = [
        [arm, _spread(found.scores(arm))]
        + [_spread(found.scores(arm, found.control(name))) for name in there]
        for arm in found.mean.index
    ]
    note = (
        "Blind: without the image. Shuffled: with that of another question. What is not above them "
        "has not been seen."
    )
    return Table("Controls", ("arm", found.study.compared, *there), rows, note)


def _costs(found: Comparison) -> Table:
    table = found.costs.copy()
    seconds = found.chosen.groupby("arm")["seconds"].mean()
    table["seconds a run"] = seconds
    note = (
        "Seconds a run: of the whole process, with its start, compiling and evaluation, beside "
        "whatever else ran. "
    )
    losses = found.results.losses
    if losses:
        # What the middle arm ends with.
        threshold = float(np.median([own.mean(axis=1).iloc[-1] for own in losses.values()]))
        name = f"steps to loss {threshold:.3g}"
        table[name] = pd.Series({arm: steps_to(own, threshold) for arm, own in losses.items()})
        note += "The loss is that with which the middle arm ends; empty: not reached. "
    if "prefill ms" in table:
        note += (
            "Prefill: of one image and a question of 32 tokens, all arms in one process, turn by "
            "turn; its MiB are parameters, inputs and what is computed."
        )
    rows = [
        [arm, *map(_number, row)] for arm, row in zip(table.index, table.to_numpy(), strict=True)
    ]
    return Table("Costs", ("arm", *table.columns), rows, note)


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
            best = next(arm for arm in found.mean.index if arm in arms)
            paid = found.costs[name][arms]
            label = _number(paid.min())
            label += "" if paid.nunique() == 1 else f" to {_number(paid.max())}"
            for arm in (arm for arm in found.mean.index if arm in arms):
                less = "" if arm == best else _interval(found.difference(arm, best))
                rows.append([arm, label, _spread(found.scores(arm)), less])
        if rows:
            head = ("arm", name, found.study.compared, "less than the best of these")
            note = "" if exact else f"Equal: within a factor of {_ALIKE:g} of the least."
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


def _main_effects(found: Comparison) -> Table:
    rows = [
        [axis, str(level), str(part.arm.nunique()), _spread(part[found.study.compared])]
        for axis in found.study.axes
        for level, part in found.chosen.groupby(axis, sort=False)
    ]
    note = "Means over all arms of a level, which only compares where the grid is full."
    return Table("Main effects", ("axis", "level", "arms", found.study.compared), rows, note)


def _spread(values: pd.Series) -> str:
    values = values.dropna()
    if values.empty:
        return ""
    deviation = f" ± {values.std():.2g}" if len(values) > 1 else ""
    return f"{values.mean():.4g}{deviation}"


def _interval(difference: Interval) -> str:
    text = f"{difference.mean:+.3g}"
    if math.isnan(difference.low):
        return text
    return f"{text} [{difference.low:+.3g}, {difference.high:+.3g}]"


def _number(value: float) -> str:
    if math.isnan(value):
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
