"""What came out of a study: a row for each run, a row for each arm."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from flax import nnx

from mmjax import params
from mmjax.connectors import cost
from mmjax.models import MODELS, VLMConfig
from mmjax.registry import nearest
from mmjax.study.grid import Arm, Study, StudyError, command, config_of
from mmjax.train.handover import model_dataclass
from mmjax.train.logging import read_metrics
from mmjax.train.workdir import write_atomically

if TYPE_CHECKING:
    from mmjax.study.runner import Run


def read_rows(runs: Iterable[Run]) -> pd.DataFrame:
    """A row for each finished run: arm, its levels, rate, seed, and its scores at the end."""
    rows = []
    for run in runs:
        if run.finished.exists():
            scores = json.loads(run.finished.read_text("utf-8"))
            beside = {"arm": run.arm.name, **run.arm.levels, "rate": run.rate, "seed": run.seed}
            rows.append(beside | {k: float(v) for k, v in scores.items()})
    return pd.DataFrame(rows)


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
    """A row for each arm: parameters, and of vision-language models the visual tokens of an image,
    and parameters and GFLOP (forward, an image) of the connector."""
    rows = []
    for arm in arms:
        stage = study.stages[-1] if study.stages else None
        start = Path("start") if len(study.stages) > 1 else None
        config = config_of(
            command(study, arm, rate=study.rates[0], seed=0, stage=stage, start=start)
        )
        model = model_dataclass(config.model.to_dict())
        make = MODELS[config.model.name][1]
        _, shapes = params.abstract(lambda make=make, model=model: make(model, rngs=nnx.Rngs(0)))
        row: dict[str, Any] = {"arm": arm.name, "parameters": params.count(shapes)}
        if isinstance(model, VLMConfig):
            width, grid = model.feature_width, model.encoder.grid
            spent = cost(model.connector, width, model.visual_width, grid, extra=model.extra)
            row |= {
                "visual tokens": spent.tokens,
                "connector parameters": spent.parameters,
                "connector GFLOP": spent.flops / 1e9,
            }
        rows.append(row)
    return pd.DataFrame(rows)


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
