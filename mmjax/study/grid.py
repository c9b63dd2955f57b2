"""What a study compares: arms, made of a config file and the levels of some axes."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mmjax import config as configs
from mmjax.registry import nearest
from mmjax.train.handover import model_dataclass

# In the directory of a study: what it is the study of; what its arms are as commands, and what they
# cost when they run.
STUDY, ARMS, COSTS = "study.json", "arms.json", "costs.json"
_STAGES = "stages"


class StudyError(ValueError):
    """A study that cannot be run; the message lists what to change."""


@dataclasses.dataclass(frozen=True)
class Study:
    """A grid of arms, each trained at every rate of a search and then with several seeds.

    Every arm has the same budget: as many runs, of as many steps as the config says. The rate is
    chosen with the first seed, by a score of validation data; the seeds decide the order of the
    data, which is the same for all arms.

    Attributes:
      config: a config file; `axes` and `arguments` are its arguments, or, where a name has a dot,
        keys of the config.
      axes: {axis: levels}. Levels are values of the argument or key that the axis is called; or a
        mapping {level: {argument or key: value}}. A level may set `stages`, as an argument, where
        arms differ in them: one or two.
      metric: the score by which rates are chosen, as metrics.jsonl has it ("eval/validation/
        accuracy"); higher is better.
      score: the one that arms are compared by; "": `metric`, which makes the best rate look too
        good.
      rates: values of the argument `rate`.
      seeds: runs of each arm at its rate.
      stages: values of the argument `stage`, one after the other; the argument `start` of each is
        the work directory of the one before. Empty: a run has no stages.
      arguments: the same for all arms.
      before: {argument: a config file with its arguments}. These runs come first, once; each is
        given its work directory as that argument of all arms.
      skip: combinations of levels, perhaps of some axes only, that are left out.
      beside: {name: {argument or key: value}}, arms outside of the grid.
      contrasts: {what is asked: (arms, arms)}, differences that are asked for before anything has
        run: of the mean of one arm, or of several, and of others.
      slurm: parameters of the jobs on a cluster, as submitit has them: `timeout_min`,
        `gpus_per_node`, `slurm_partition` and others. A job is a run with all of its stages.
    """

    config: str
    axes: Mapping[str, Sequence[Any] | Mapping[str, Mapping[str, Any]]]
    metric: str
    rates: Sequence[float]
    score: str = ""
    seeds: int = 3
    stages: Sequence[str] = ()
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    before: Mapping[str, str] = dataclasses.field(default_factory=dict)
    rate: str = "lr"
    skip: Sequence[Mapping[str, Any]] = ()
    beside: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    contrasts: Mapping[str, tuple[str | Sequence[str], str | Sequence[str]]] = dataclasses.field(
        default_factory=dict
    )
    slurm: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if not self.axes or not all(len(levels) for levels in self.axes.values()):
            raise StudyError("A study needs axes, and each axis a level: set `axes`.")
        if not self.rates or len(set(self.rates)) < len(self.rates):
            raise StudyError(f"rates={tuple(self.rates)}: give one or more, each once.")
        if self.seeds < 1:
            raise StudyError(f"seeds={self.seeds} runs nothing: give 1 or more.")
        for combination in self.skip:
            for axis in combination:
                if axis not in self.axes:
                    raise StudyError(f"skip names no axis: {axis!r}; {nearest(axis, self.axes)}")

    @property
    def compared(self) -> str:
        """The score that arms are compared by."""
        return self.score or self.metric

    def to_json(self) -> str:
        """All of it, to be compared with the one of a directory."""
        return json.dumps(dataclasses.asdict(self), indent=2, default=list)


@dataclasses.dataclass(frozen=True)
class Arm:
    """One combination of levels, or an arm beside the grid.

    Attributes:
      name: of the levels, or its own.
      levels: {axis: the name of its level}; empty beside the grid.
      settings: {argument, or key with a dot: value}.
    """

    name: str
    levels: Mapping[str, str]
    settings: Mapping[str, Any]


def load_study(spec: str) -> Study:
    """`get_study(arg)` of a file: "configs/ablate/connectors.py", or with ":argument".

    Raises:
      ConfigError, StudyError: if the file or what it returns cannot be used.
    """
    study = configs.call(spec, "get_study")
    if not isinstance(study, Study):
        raise StudyError(f"get_study of {spec!r} returns no mmjax.study.Study.")
    return study


def arms_of(study: Study) -> list[Arm]:
    """The grid, without what is skipped; then what is beside it."""
    axes = {
        axis: {str(k): v for k, v in levels.items()}
        if isinstance(levels, Mapping)
        else {str(level): {axis: level} for level in levels}
        for axis, levels in study.axes.items()
    }
    arms = []
    for names in itertools.product(*axes.values()):
        levels = dict(zip(axes, names, strict=True))
        if any(all(levels[k] == str(v) for k, v in some.items()) for some in study.skip):
            continue
        settings: dict[str, Any] = {}
        for axis, name in levels.items():
            settings |= axes[axis][name]
        name = ",".join(f"{axis}={level}" for axis, level in levels.items())
        arms.append(Arm(name, levels, settings))
    return arms + [Arm(name, {}, dict(settings)) for name, settings in study.beside.items()]


def workdir_before(directory: Path, name: str) -> Path:
    """Of a run of `Study.before`."""
    return directory / "before" / name / "train"


def command(
    study: Study,
    arm: Arm,
    *,
    rate: float,
    seed: int,
    stage: str | None,
    start: Path | None,
    directory: Path = Path("study"),
) -> list[str]:
    """The arguments of `experiments.train` for a run, but for its work directory.

    Args:
      directory: of the study.
    """
    before = {name: workdir_before(directory, name) for name in study.before}
    settings = {**study.arguments, **before, **arm.settings}
    settings.pop(_STAGES, None)
    arguments = {k: v for k, v in settings.items() if "." not in k} | {study.rate: rate}
    keys = {k: v for k, v in settings.items() if "." in k} | {"seed": seed}
    if stage is not None:
        arguments["stage"] = stage
    if start is not None:
        arguments["start"] = start
    for key, value in arguments.items():
        if "," in str(value):
            raise StudyError(
                f"The argument {key}={value} of arm {arm.name!r} has a comma, which separates "
                "arguments: set a key of the config instead, by a name with a dot."
            )
    text = ",".join(f"{key}={value}" for key, value in arguments.items())
    return [
        "--config",
        f"{study.config}:{text}",
        *(f"--config.{key}={value}" for key, value in keys.items()),
    ]


def sides_of(contrast: Sequence[str | Sequence[str]]) -> tuple[list[str], list[str]]:
    """The arms on both sides of a contrast."""
    one, other = ([side] if isinstance(side, str) else list(side) for side in contrast)
    return one, other


def stages_of(study: Study, arm: Arm) -> tuple[str | None, ...]:
    """The stages of a run; one without a name if it has none."""
    return tuple(arm.settings.get(_STAGES, study.stages)) or (None,)


def first_command(study: Study, arm: Arm, directory: Path = Path("study")) -> list[str]:
    """The last stage at the first rate with the first seed: what all runs of an arm agree in."""
    stages = stages_of(study, arm)
    return command(
        study,
        arm,
        rate=study.rates[0],
        seed=0,
        stage=stages[-1],
        start=Path("start") if len(stages) > 1 else None,
        directory=directory,
    )


def config_of(arguments: Sequence[str]) -> ConfigDict:
    """What `experiments.train` makes of them."""
    return configs.load(arguments[1], [item.removeprefix("--config.") for item in arguments[2:]])


def plan(study: Study) -> list[Arm]:
    """The arms, each of whose configs can be made: what a connector cannot meet is said now.

    Raises:
      StudyError: listing every arm whose config is refused or has no such scores, and arms that are
        equal; a contrast of arms that are not there.
    """
    arms = arms_of(study)
    twice = [name for name, n in collections.Counter(arm.name for arm in arms).items() if n > 1]
    if twice:
        raise StudyError(f"Arms beside the grid are called like arms of it: {', '.join(twice)}.")
    names = [arm.name for arm in arms]
    for asked, contrast in study.contrasts.items():
        for name in itertools.chain(*sides_of(contrast)):
            if name not in names:
                raise StudyError(f"contrast {asked!r}: no arm is {name!r}; {nearest(name, names)}")
    problems: list[str] = []
    seen: dict[str, str] = {}
    for name, spec in study.before.items():
        try:
            configs.load(spec, [])
        except (ValueError, OSError) as error:
            raise StudyError(f"before {name!r}: {error}. Nothing has been run.") from error
    for arm in arms:
        texts = []
        try:
            stages = stages_of(study, arm)
            for stage, before in zip(stages, (None, *stages), strict=False):
                start = None if before is None else Path(before)
                config = config_of(
                    command(study, arm, rate=study.rates[0], seed=0, stage=stage, start=start)
                )
                model_dataclass(config.model.to_dict())
                texts.append(configs.to_json(config))
            _check_scores(study, config)
        except (ValueError, OSError) as error:
            problems.append(f"  {arm.name}: {error}")
            continue
        other = seen.setdefault("\n".join(texts), arm.name)
        if other != arm.name:
            problems.append(f"  {arm.name}: its config is that of {other}")
    if problems:
        raise StudyError(
            f"{len(problems)} of {len(arms)} arms cannot be studied:\n"
            + "\n".join(problems)
            + "\nChange the axes, or leave combinations out with `skip`. Nothing has been run."
        )
    return arms


def _check_scores(study: Study, config: ConfigDict) -> None:
    """Raises StudyError where a score is of no evaluator of a config."""
    for score in (study.metric, study.compared):
        front, _, rest = score.partition("/")
        name, _, _ = rest.partition("/")
        if front != "eval" or name not in config.evals:
            known = [f"eval/{name}/" for name in config.evals]
            raise StudyError(f"no evaluator gives {score!r}; {nearest(score, known)}")
