"""Running a study: here, a process a device, or on a cluster; to go on after any interruption."""

from __future__ import annotations

import fcntl
import glob
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from mmjax.models import VLMConfig
from mmjax.study.grid import (
    ARMS,
    COSTS,
    STUDY,
    Arm,
    Study,
    StudyError,
    config_of,
    first_command,
    plan,
)
from mmjax.study.report import write_report
from mmjax.study.results import (
    Results,
    arm_costs,
    choose_rates,
    read_answers,
    read_costs,
    read_losses,
    read_rows,
    summarise,
    write_tables,
)
from mmjax.study.runs import Run, make_run, run_before
from mmjax.train.handover import model_dataclass
from mmjax.train.logging import read_metrics
from mmjax.train.workdir import changes, write_atomically

_ROOT = Path(__file__).resolve().parents[2]
_LINES = 12  # of the log of a run that failed


class Slot(NamedTuple):
    """What a process has for itself: a CUDA device and a share of its memory; or CPU cores.

    None: whatever there is.
    """

    device: str | None = None
    memory: float | None = None
    cores: frozenset[int] | None = None


ALL = Slot()


class Executor(Protocol):
    """What `concurrent.futures` and submitit have in common."""

    def submit(self, function: Callable[..., Any], *args: Any) -> Any: ...


class Local(ThreadPoolExecutor):
    """Processes on this machine, one at a time for each device; one where there are none.

    Args:
      devices: CUDA devices, as CUDA_VISIBLE_DEVICES has them (numbers, or UUIDs); None: those that
        it says, or all that the driver shows.
      processes: that share each device, which suits small models; without devices, that share the
        cores. Each has as much as the others.

    Raises:
      StudyError: more processes than cores.
    """

    def __init__(self, devices: Sequence[str] | None = None, processes: int = 1):
        if devices is None:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            nodes = sorted(glob.glob("/dev/nvidia[0-9]*"))
            devices = [node.removeprefix("/dev/nvidia") for node in nodes]
            if visible is not None:  # -1 is how it says "none"
                devices = [
                    name for name in map(str.strip, visible.split(",")) if name not in ("", "-1")
                ]
        slots = _slots(devices, processes)
        self._free: queue.Queue[Slot] = queue.Queue()
        for slot in slots:
            self._free.put(slot)
        super().__init__(max_workers=len(slots))

    def submit(self, function: Callable[..., Any], *args: Any) -> Future:
        def call() -> Any:
            slot = self._free.get()
            try:
                return function(*args, slot=slot)
            finally:
                self._free.put(slot)

        return super().submit(call)


def _slots(devices: Sequence[str], processes: int) -> list[Slot]:
    if processes < 1:
        raise StudyError(f"processes={processes} runs nothing: give 1 or more.")
    if devices:
        # A process alone takes what JAX takes: three quarters.
        memory = None if processes == 1 else 0.9 / processes
        return [Slot(device, memory) for _ in range(processes) for device in devices]
    cores = sorted(os.sched_getaffinity(0))
    if processes > len(cores):
        raise StudyError(
            f"{processes} processes at a time need as many cores, and there are {len(cores)}."
        )
    if processes == 1:
        return [ALL]
    return [Slot(cores=frozenset(cores[part::processes])) for part in range(processes)]


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

    def call(self, arguments: Sequence[str], log: Path, cache: Path, slot: Slot) -> int | None:
        """The exit code; None if all are to stop.

        Args:
          arguments: of python.
          cache: of compiled programs: runs of an arm are one program.
        """
        env = dict(os.environ, JAX_COMPILATION_CACHE_DIR=str(cache))
        if slot.device is not None:
            env["CUDA_VISIBLE_DEVICES"] = slot.device
        if slot.memory is not None:
            env["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{slot.memory:.3f}"
        with open(log, "a", encoding="utf-8") as file, self._lock:
            if self.stopping:
                return None
            process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=_ROOT,
                env=env,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            if slot.cores is not None:
                os.sched_setaffinity(process.pid, slot.cores)
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


def execute(run: Run, cache: Path, slot: Slot = ALL) -> str | None:
    """Does what is left of a run, each stage a process of its own.

    Returns:
      None if it is finished, or why it failed.
    """
    if run.finished.exists():
        return None
    run.directory.mkdir(parents=True, exist_ok=True)
    run.failed.unlink(missing_ok=True)
    for name, arguments in run.stages:
        workdir, log = run.directory / name, run.directory / f"{name}.log"
        _wait_for(workdir)
        train = ["-m", "experiments.train", *arguments, "--workdir", str(workdir)]
        began = time.monotonic()
        code = _CHILDREN.call(train, log, cache, slot)
        seconds = _spent(run, time.monotonic() - began)
        if code is None:
            return "stopped"
        if code:
            reason = f"{name} ended with exit code {code}:\n{_end_of(log)}"
            write_atomically(run.failed, json.dumps({"reason": reason}, indent=2))
            return reason
    scores: dict[str, Any] = {"seconds": seconds}
    for row in read_metrics(workdir / "metrics.jsonl"):
        scores |= {k: v for k, v in row.items() if k.startswith(("eval/", "perf/", "train/"))}
    write_atomically(run.finished, json.dumps(scores, indent=2))
    return None


def _spent(run: Run, seconds: float) -> float:
    """Adds to the time that a run has taken, interruptions left out; all of it."""
    clock = run.directory / "seconds.json"
    if clock.exists():
        seconds += json.loads(clock.read_text("utf-8"))
    write_atomically(clock, json.dumps(seconds))
    return seconds


def _end_of(log: Path) -> str:
    """The last lines, from the error on if there is one."""
    lines = log.read_text("utf-8", "replace").replace("\r", "\n").splitlines()
    kept = [line for line in lines if line.strip()][-_LINES:]
    at = next((i for i, line in enumerate(kept) if line.startswith("error:")), 0)
    return "\n".join(kept[at:])


def measure(directory: Path, cache: Path, slot: Slot = ALL) -> str | None:
    """What the arms of a study cost when they run: `mmjax.study.speed`, as a process of its own,
    which has a device, or all cores, for itself.

    Returns:
      None, or why it failed.
    """
    arms, costs = ((directory / name) for name in (ARMS, COSTS))
    if costs.exists():
        measured = json.loads(costs.read_text("utf-8"))
        if measured.get("commands") == json.loads(arms.read_text("utf-8")):
            return None
    log = directory / "costs.log"
    alone = slot._replace(memory=None, cores=None)
    code = _CHILDREN.call(["-m", "mmjax.study.speed", str(directory)], log, cache, alone)
    if code is None:
        return "stopped"
    return f"exit code {code}:\n{_end_of(log)}" if code else None


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
        before = [run_before(study, name, directory) for name in study.before]
        failures = _run_all(before, directory, executor, say, "before")
        if failures:
            text = "\n".join(f"{name}: {reason}" for name, reason in failures.items())
            raise StudyError(f"All arms need runs that failed:\n{text}")
        search = [make_run(study, arm, rate, 0, directory) for arm in arms for rate in study.rates]
        failures = _run_all(search, directory, executor, say, "search of rates")
        rates = choose_rates(read_rows(search), study.metric)
        seeds = [
            make_run(study, arm, rates[arm.name], seed, directory)
            for arm in arms
            if arm.name in rates
            for seed in range(1, study.seeds)
        ]
        if not all(run.finished.exists() for run in seeds):  # what is known so far
            _report(study, arms, [*search, *seeds], rates, directory, failures)
        failures |= _run_all(seeds, directory, executor, say, "seeds")
        if rates and all(_sees(study, arm) for arm in arms):
            commands = {arm.name: first_command(study, arm, directory) for arm in arms}
            write_atomically(directory / ARMS, json.dumps(commands, indent=2))
            say("costs: measuring latency and memory.")
            job = executor.submit(measure, directory, directory / "compiled")
            try:
                reason = job.result()
            except BaseException:
                _stop([job])
                raise
            if reason is not None:
                failures["costs"] = reason
        _report(study, arms, [*search, *seeds], rates, directory, failures)
    return failures


def _sees(study: Study, arm: Arm) -> bool:
    """Whether there is a prefill of an image to measure."""
    model = model_dataclass(config_of(first_command(study, arm)).model.to_dict())
    return isinstance(model, VLMConfig)


def _report(
    study: Study,
    arms: Sequence[Arm],
    runs: Sequence[Run],
    rates: Mapping[str, float],
    directory: Path,
    failures: Mapping[str, str],
) -> None:
    """Tables and report of the runs that are finished."""
    rows = read_rows(runs)
    write_tables(directory, rows, summarise(rows, rates))
    costs, device = arm_costs(study, arms), ""
    if (directory / COSTS).exists():
        measured = read_costs(directory)
        costs, device = costs.merge(measured.costs, on="arm", how="left"), measured.device
        failures = {**failures, **{f"costs of {k}": why for k, why in measured.failures.items()}}
    losses, answers = read_losses(runs, rates), read_answers(study, runs, rates)
    results = Results(rows, rates, costs, losses, answers, device)
    write_report(directory, study, results, failures)


def _run_all(
    runs: Sequence[Run],
    directory: Path,
    executor: Executor,
    say: Callable[[str], None],
    what: str,
) -> dict[str, str]:
    """Runs all of them; why those that failed did."""
    _check_finished(runs)
    left = [run for run in runs if not run.finished.exists()]
    say(f"{what}: {len(left)} of {len(runs)} runs are left.")
    cache = directory / "compiled"
    jobs: list[Any] = []
    failures = {}
    try:
        jobs += (executor.submit(execute, run, cache) for run in left)
        for done, (run, job) in enumerate(zip(left, jobs, strict=True), start=1):
            name = str(run.directory.relative_to(directory)).removeprefix("runs/")
            try:
                reason = job.result()
            except Exception as error:  # the job, not the run: a node that was lost, say
                reason = f"{type(error).__name__}: {error}"
            if reason is not None:
                failures[name] = reason
            say(f"{what}: {done}/{len(left)} {name}"
                + ("" if reason is None else f" FAILED\n{reason}"))  # fmt: skip
    except BaseException:
        _stop(jobs)
        raise
    return failures


def _stop(jobs: Sequence[Any]) -> None:
    """What runs here saves and ends; what is a cluster's is cancelled."""
    _CHILDREN.stop()
    for job in jobs:
        job.cancel()


def _check_finished(runs: Sequence[Run]) -> None:
    """
    Raises:
      StudyError: runs that are finished had another config than they would have now.
    """
    odd = {}
    for run in runs:
        if run.finished.exists():
            for name, arguments in run.stages:
                lines = changes(run.directory / name, config_of(arguments))
                if lines:
                    odd[run.directory] = lines
    if odd:
        directory, lines = next(iter(odd.items()))
        raise StudyError(
            f"{len(odd)} finished runs had another config than the study gives them now; the first "
            f"is {directory}:\n"
            + "\n".join(lines)
            + "\nUndo that change, or give the study a new --workdir. Nothing has been run."
        )


# What says nothing of any run.
_FREE = ("slurm", "contrasts")


def _goes_on(key: str, theirs: Any, ours: Any) -> bool:
    """Whether a study that was begun with one value of a field goes on with another: there may be
    more seeds and more rates."""
    if key == "seeds":
        return theirs <= ours
    if key == "rates":
        return set(theirs) <= set(ours)
    return theirs == ours


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
                if key not in _FREE and not _goes_on(key, theirs.get(key), ours[key])
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
