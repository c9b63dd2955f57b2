"""Running a study: here, a process a device, or on a cluster; to go on after any interruption."""

from __future__ import annotations

import collections
import dataclasses
import fcntl
import glob
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from mmjax.study.grid import Arm, Study, StudyError, command, plan
from mmjax.study.report import write_report
from mmjax.study.results import (
    arm_costs,
    choose_rates,
    read_losses,
    read_rows,
    summarise,
    write_tables,
)
from mmjax.train.logging import read_metrics
from mmjax.train.workdir import write_atomically

FINISHED, FAILED, STUDY = "finished.json", "failed.json", "study.json"
_ROOT = Path(__file__).resolve().parents[2]
_LINES = 12  # of the log of a run that failed


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
    directory = directory / "runs" / arm.name / f"{study.rate}={rate:g}" / f"seed={seed}"
    stages, start = [], None
    for stage in study.stages or (None,):
        arguments = command(study, arm, rate=rate, seed=seed, stage=stage, start=start)
        name = stage or "train"
        stages.append((name, tuple(arguments)))
        start = directory / name
    return Run(arm, rate, seed, directory, tuple(stages))


class Executor(Protocol):
    """What `concurrent.futures` and submitit have in common."""

    def submit(self, function: Callable[..., Any], *args: Any) -> Any: ...


class Local(ThreadPoolExecutor):
    """Processes on this machine, one at a time for each device; one where there are none.

    Args:
      devices: numbers of CUDA devices; None: all that the driver shows, or CUDA_VISIBLE_DEVICES.
    """

    def __init__(self, devices: Sequence[int] | None = None):
        if devices is None:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            nodes = sorted(glob.glob("/dev/nvidia[0-9]*"))
            devices = (
                [int(n) for n in visible.split(",") if n.strip().isdigit()]
                if visible is not None
                else [int(node.removeprefix("/dev/nvidia")) for node in nodes]
            )
        self._free: queue.Queue[int | None] = queue.Queue()
        for device in devices or [None]:
            self._free.put(device)
        super().__init__(max_workers=max(1, len(devices)))

    def submit(self, function: Callable[..., Any], *args: Any) -> Future:
        def call() -> Any:
            device = self._free.get()
            try:
                return function(*args, device=device)
            finally:
                self._free.put(device)

        return super().submit(call)


def slurm(study: Study, directory: Path, cluster: str | None = None) -> Executor:
    """Jobs on a cluster, through submitit.

    Args:
      directory: of the study; the jobs' logs go there.
      cluster: as submitit has it; None: SLURM where it is, else an error.

    Raises:
      StudyError: submitit is not installed, or there is no SLURM.
    """
    try:
        import submitit
    except ImportError:
        raise StudyError(
            "Studies on a cluster need submitit: pip install -e .[slurm]; or leave out "
            "--launcher slurm."
        ) from None
    try:
        executor = submitit.AutoExecutor(folder=directory / "slurm", cluster=cluster or "slurm")
    except RuntimeError as error:
        raise StudyError(f"There is no SLURM here: {error}. Leave out --launcher slurm.") from error
    executor.update_parameters(name="mmjax", **study.slurm)
    return executor


class _Children:
    """The processes that run, so that all can be asked to stop: they save, then end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen] = set()
        self.stopping = False

    def call(self, arguments: Sequence[str], log: Path, env: dict[str, str]) -> int | None:
        """The exit code; None if all are to stop."""
        with open(log, "a", encoding="utf-8") as file, self._lock:
            if self.stopping:
                return None
            process = subprocess.Popen(
                arguments, cwd=_ROOT, env=env, stdout=file, stderr=subprocess.STDOUT
            )
            self._running.add(process)
        code = process.wait()
        with self._lock:
            self._running.discard(process)
            return None if self.stopping else code

    def start(self) -> None:
        """Takes calls, perhaps again."""
        with self._lock:
            self.stopping = False

    def stop(self) -> None:
        """Asks all to stop, and takes no more calls."""
        with self._lock:
            self.stopping = True
            for process in self._running:
                process.terminate()


_CHILDREN = _Children()


def execute(run: Run, cache: Path, device: int | None = None) -> str | None:
    """Does what is left of a run, each stage a process of its own.

    Returns:
      None if it is finished, or why it failed.
    """
    if run.finished.exists():
        return None
    run.directory.mkdir(parents=True, exist_ok=True)
    run.failed.unlink(missing_ok=True)
    # Runs of an arm are one program: it is compiled once.
    env = dict(os.environ, JAX_COMPILATION_CACHE_DIR=str(cache))
    if device is not None:
        env["CUDA_VISIBLE_DEVICES"] = str(device)
    for name, arguments in run.stages:
        workdir, log = run.directory / name, run.directory / f"{name}.log"
        _wait_for(workdir)
        train = [sys.executable, "-m", "experiments.train", *arguments, "--workdir", str(workdir)]
        code = _CHILDREN.call(train, log, env)
        if code is None:
            return "stopped"
        if code:
            lines = log.read_text("utf-8", "replace").replace("\r", "\n").splitlines()
            kept = [line for line in lines if line.strip()][-_LINES:]
            at = next((i for i, line in enumerate(kept) if line.startswith("error:")), 0)
            reason = f"{name} ended with exit code {code}:\n" + "\n".join(kept[at:])
            write_atomically(run.failed, json.dumps({"reason": reason}, indent=2))
            return reason
    scores: dict[str, Any] = {}
    for row in read_metrics(workdir / "metrics.jsonl"):
        scores |= {k: v for k, v in row.items() if k.startswith(("eval/", "perf/", "train/"))}
    write_atomically(run.finished, json.dumps(scores, indent=2))
    return None


def _wait_for(workdir: Path) -> None:
    """Until nobody uses it: the process of a study that was killed may still be at work."""
    lock = workdir / ".lock"
    if lock.exists():
        with open(lock, "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)


def run_study(
    study: Study,
    directory: Path,
    executor: Executor,
    say: Callable[[str], None] = print,
) -> dict[str, str]:
    """Runs a study, or what is left of it, and writes its tables.

    Runs that are finished are not touched; those that were interrupted go on; those that failed
    are tried again.

    Args:
      directory: the study's own.
      executor: who runs.
      say: is told how far it is.

    Returns:
      {run that failed: why}; the others are finished.

    Raises:
      StudyError: a grid that cannot be run, or a directory of another study or in use.
    """
    directory = directory.absolute()
    arms = plan(study)
    with _Claim(directory, study):
        _CHILDREN.start()
        failures: dict[str, str] = {}
        search = [make_run(study, arm, rate, 0, directory) for arm in arms for rate in study.rates]
        failures |= _run_all(search, directory, executor, say, "search of rates")
        rates = choose_rates(read_rows(search), study.metric)
        seeds = [
            make_run(study, arm, rates[arm.name], seed, directory)
            for arm in arms
            if arm.name in rates
            for seed in range(1, study.seeds)
        ]
        failures |= _run_all(seeds, directory, executor, say, "seeds")
        rows = read_rows([*search, *seeds])
        write_tables(directory, rows, summarise(rows, rates))
        losses = read_losses([*search, *seeds], rates)
        costs = arm_costs(study, arms)
        write_report(directory, study, rows, rates, costs, losses, failures)
    return failures


def _run_all(
    runs: Sequence[Run],
    directory: Path,
    executor: Executor,
    say: Callable[[str], None],
    what: str,
) -> dict[str, str]:
    """Runs all of them; why those that failed did."""
    left = [run for run in runs if not run.finished.exists()]
    say(f"{what}: {len(left)} of {len(runs)} runs are left.")
    cache = directory / "compiled"
    jobs = collections.deque((run, executor.submit(execute, run, cache)) for run in left)
    failures = {}
    try:
        while jobs:
            run, job = jobs.popleft()
            name = str(run.directory.relative_to(directory / "runs"))
            try:
                reason = job.result()
            except Exception as error:  # the job, not the run: a node that was lost, say
                reason = f"{type(error).__name__}: {error}"
            if reason is not None:
                failures[name] = reason
            say(f"{what}: {len(left) - len(jobs)}/{len(left)} {name}"
                + ("" if reason is None else f" FAILED\n{reason}"))  # fmt: skip
    except BaseException:
        _CHILDREN.stop()
        for _, job in jobs:
            job.cancel()
        raise
    return failures


class _Claim:
    """A directory that is this study's, and that nobody else runs now."""

    def __init__(self, directory: Path, study: Study):
        self.directory, self.text = directory, study.to_json()

    def __enter__(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        stored = self.directory / STUDY
        if stored.exists():
            theirs, ours = json.loads(stored.read_text("utf-8")), json.loads(self.text)
            changed = [
                f"  {key}: {theirs.get(key)!r} there, {ours[key]!r} here"
                for key in ours
                if theirs.get(key) != ours[key] and key != "slurm"
            ]
            if changed:
                raise StudyError(
                    f"{self.directory} holds another study:\n"
                    + "\n".join(changed)
                    + "\nGive this one a directory of its own."
                )
        elif any(path.name != ".lock" for path in self.directory.iterdir()):
            raise StudyError(f"{self.directory} is not empty and holds no study: use another.")
        self._lock = open(self.directory / ".lock", "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise StudyError(f"{self.directory} is being run by another process.") from None
        write_atomically(stored, self.text)

    def __exit__(self, *error: Any) -> None:
        self._lock.close()
