"""The runs of a study, and where they lie."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from mmjax.study.grid import Arm, Study, command, stages_of, workdir_before

FINISHED, FAILED = "finished.json", "failed.json"


@dataclasses.dataclass(frozen=True)
class Run:
    """One arm at one rate with one seed: its stages, in a directory of its own.

    Attributes:
      arm, rate, seed: which.
      directory: of its stages' work directories and logs.
      stages: (name, arguments of experiments.train but for the work directory).
    """

    arm: Arm
    rate: float
    seed: int
    directory: Path
    stages: tuple[tuple[str, tuple[str, ...]], ...]

    @property
    def finished(self) -> Path:
        """The last stage's scores; there when all is done."""
        return self.directory / FINISHED

    @property
    def failed(self) -> Path:
        return self.directory / FAILED


def make_run(study: Study, arm: Arm, rate: float, seed: int, directory: Path) -> Run:
    """See `Run`."""
    root = directory
    directory = root / "runs" / arm.name / f"{study.rate}={rate:g}" / f"seed={seed}"
    stages, start = [], None
    for stage in stages_of(study, arm):
        arguments = command(
            study, arm, rate=rate, seed=seed, stage=stage, start=start, directory=root
        )
        name = stage or "train"
        stages.append((name, tuple(arguments)))
        start = directory / name
    return Run(arm, rate, seed, directory, tuple(stages))


def run_before(study: Study, name: str, directory: Path) -> Run:
    """One of `study.before`."""
    workdir = workdir_before(directory, name)
    arguments = ("--config", study.before[name])
    return Run(Arm(name, {}, {}), math.nan, 0, workdir.parent, ((workdir.name, arguments),))
