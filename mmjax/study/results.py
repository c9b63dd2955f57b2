"""What came out of a study: a row for each run, a row for each arm."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from flax import nnx

from mmjax import params, rules
from mmjax.connectors import cost
from mmjax.models import MODELS, VLMConfig
from mmjax.registry import nearest
from mmjax.study.grid import COSTS, Arm, Study, StudyError, config_of, first_command
from mmjax.study.runs import Run
from mmjax.train.handover import model_dataclass
from mmjax.train.logging import read_metrics
from mmjax.train.loop import ORDER
from mmjax.train.workdir import write_atomically

TOKENS = "visual tokens"
CONTROLS = ("blind", "shuffled")


# Of a run's manifest: what all runs of a study should have in common, and digests of its config, of
# its first parameters, and ("order") of the records that it saw in their order.
SAME = ("code", "devices", "packages")
DIGESTS = ("config_sha256", "parameters_sha256")


def read_rows(runs: Iterable[Run]) -> pd.DataFrame:
    """A row for each finished run: arm, its levels, rate, seed, what its manifest says (of the last
    stage), the seconds it took, and its scores at the end."""
    rows = []
    for run in runs:
        if run.finished.exists():
            scores = json.loads(run.finished.read_text("utf-8"))
            scores.pop("order", None)  # the manifest's, in files of older versions
            row = {"arm": run.arm.name, **run.arm.levels, "rate": run.rate, "seed": run.seed}
            file = run.directory / run.stages[-1][0] / "manifest.json"
            manifest = json.loads(file.read_text("utf-8"))[-1]
            row["order"] = manifest.get(ORDER, "")
            row |= {name: _text(manifest.get(name, "")) for name in (*DIGESTS, *SAME)}
            rows.append(row | {k: float(v) for k, v in scores.items()})
    return pd.DataFrame(rows)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def choose_rates(rows: pd.DataFrame, metric: str) -> dict[str, float]:
    """{arm: the rate at which the first seed scored highest}; arms without a score are left out.

    Raises:
      StudyError: no run has such a score.
    """
    if rows.empty:
        return {}
    if metric not in rows:
        raise StudyError(f"No run has the score {metric!r}; {nearest(metric, rows.columns)}")
    searched = rows[(rows.seed == 0) & rows[metric].map(math.isfinite)]
    best = searched.sort_values(metric, ascending=False, kind="stable").drop_duplicates("arm")
    found = dict(zip(best.arm, best.rate, strict=True))
    return {arm: found[arm] for arm in rows.arm.unique() if arm in found}


def summarise(rows: pd.DataFrame, rates: Mapping[str, float]) -> pd.DataFrame:
    """A row for each arm: its rate, how many seeds, and of each score mean and deviation (of a
    sample; over seeds)."""
    result = []
    for arm, rate in rates.items():
        own = rows[(rows.arm == arm) & (rows.rate == rate)]
        scores = [name for name in rows if name.startswith("eval/")]
        row: dict[str, Any] = {"arm": arm, "rate": rate, "seeds": len(own)}
        for name in scores:
            row[f"{name}/mean"], row[f"{name}/std"] = own[name].mean(), own[name].std()
        result.append(row)
    return pd.DataFrame(result)


def arm_costs(study: Study, arms: Iterable[Arm]) -> pd.DataFrame:
    """A row for each arm: parameters, those that are trained, and of vision-language models the
    visual tokens of an image, the GFLOP of making them of its features, and the parameters of all
    that joins encoder and language model: gated blocks are among them."""
    rows = []
    for arm in arms:
        config = config_of(first_command(study, arm))
        model = model_dataclass(config.model.to_dict())
        make = MODELS[config.model.name][1]
        _, shapes = params.abstract(lambda make=make, model=model: make(model, rngs=nnx.Rngs(0)))
        trained = rules.match(config.rules.trainable, shapes, name="rules.trainable")
        row: dict[str, Any] = {
            "arm": arm.name,
            "parameters": params.count(shapes),
            "trained parameters": sum(shapes[path].size for path in shapes if trained[path]),
        }
        if isinstance(model, VLMConfig):
            width, grid = model.feature_width, model.encoder.grid
            spent = cost(model.connector, width, model.visual_width, grid, extra=model.extra)
            joins = [path for path in shapes if not path.startswith(("encoder/", "lm/"))]
            row |= {
                TOKENS: spent.tokens,
                "connector parameters": sum(shapes[path].size for path in joins),
                "connector GFLOP": spent.flops / 1e9,
            }
        rows.append(row)
    return pd.DataFrame(rows)


class Measured(NamedTuple):
    """What `mmjax.study.speed` has measured.

    Attributes:
      costs: a row for each arm.
      device: on which.
      failures: {arm: why it could not be measured}.
    """

    costs: pd.DataFrame
    device: str
    failures: Mapping[str, str]


def read_costs(directory: Path) -> Measured:
    found = json.loads((directory / COSTS).read_text("utf-8"))
    costs = pd.DataFrame.from_dict(found["arms"], orient="index").rename_axis("arm").reset_index()
    # Files of older versions do not say what failed.
    return Measured(costs, found["device"], found.get("failed", {}))


@dataclasses.dataclass(frozen=True)
class Answers:
    """What each chosen run said to each question of the score that arms are compared by.

    Attributes:
      scores: {arm: a row a seed, a column a question}.
      groups, images: of each question.
      controls: {control: the same as `scores`}, of those that were asked.
    """

    scores: Mapping[str, pd.DataFrame]
    groups: pd.Series
    images: pd.Series
    controls: Mapping[str, Mapping[str, pd.DataFrame]] = dataclasses.field(default_factory=dict)


def read_answers(study: Study, runs: Iterable[Run], rates: Mapping[str, float]) -> Answers | None:
    """From the files that evaluators of questions write (`answers`); None where there are none.

    Questions that a run lacks are left out for all.
    """
    _, name, *_, score = study.compared.split("/")
    files: dict[tuple[str, int], pd.DataFrame] = {}
    for run in runs:
        if not run.finished.exists() or rates.get(run.arm.name) != run.rate:
            continue
        workdir = run.directory / run.stages[-1][0]
        config = json.loads((workdir / "config.json").read_text("utf-8"))
        file = config["evals"].get(name, {}).get("answers")
        if file is None:
            return None
        rows = [json.loads(line) for line in (workdir / file).read_text("utf-8").splitlines()]
        if not all(score in row for row in rows):
            return None
        files[run.arm.name, run.seed] = pd.DataFrame(rows).set_index("id")
    if not files:
        return None
    first = next(iter(files.values()))
    asked = first.index
    for table in files.values():
        asked = asked.intersection(table.index, sort=False)
    # An id is that of the record and the question's number in it.
    images = asked.to_series().str.rsplit("/", n=1).str[0]

    def scores(column: str) -> dict[str, pd.DataFrame]:
        found: dict[str, dict[int, pd.Series]] = {}
        for (arm, seed), table in files.items():
            found.setdefault(arm, {})[seed] = table[column].astype(float)[asked]
        return {arm: pd.DataFrame(seeds).T for arm, seeds in found.items()}

    controls = {
        control: scores(f"{control}/{score}")
        for control in CONTROLS
        if all(f"{control}/{score}" in table for table in files.values())
    }
    return Answers(scores(score), first["group"][asked], images, controls)


@dataclasses.dataclass(frozen=True)
class Results:
    """All that a report tells of.

    Attributes:
      rows: all finished runs, as `read_rows` has them.
      rates: {arm: its rate}.
      costs: a row for each arm, with `arm` and numbers.
      losses: {arm: training loss, a row for each step, a column for each seed}.
      answers: to single questions; None where runs have none.
      device: that costs were measured on.
    """

    rows: pd.DataFrame
    rates: Mapping[str, float]
    costs: pd.DataFrame
    losses: Mapping[str, pd.DataFrame]
    answers: Answers | None = None
    device: str = ""

    @property
    def chosen(self) -> pd.DataFrame:
        """The runs of each arm at its rate."""
        return self.rows[self.rows.rate == self.rows.arm.map(self.rates)]


def read_losses(runs: Iterable[Run], rates: Mapping[str, float]) -> dict[str, pd.DataFrame]:
    """{arm: training loss of the last stage at its rate, a row a step, a column a seed}"""
    found: dict[str, dict[int, pd.Series]] = {}
    for run in runs:
        if run.finished.exists() and rates.get(run.arm.name) == run.rate:
            logged = read_metrics(run.directory / run.stages[-1][0] / "metrics.jsonl")
            losses = {row["step"]: row["train/loss"] for row in logged if "train/loss" in row}
            found.setdefault(run.arm.name, {})[run.seed] = pd.Series(losses, dtype=float)
    return {arm: pd.DataFrame(seeds) for arm, seeds in found.items()}


def write_tables(directory: Path, rows: pd.DataFrame, summary: pd.DataFrame) -> None:
    """`rows.csv` and `rows.parquet` (all runs), `summary.csv`."""
    for name, frame in (("rows", rows), ("summary", summary)):
        write_atomically(directory / f"{name}.csv", frame.to_csv(index=False))
    rows.to_parquet(directory / "rows.parquet")
