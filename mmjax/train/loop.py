"""The training loop: one for every task. It knows nothing of models, data or losses."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from tqdm import tqdm

from mmjax import data as datasets
from mmjax import sharding
from mmjax.config import ConfigError, to_json
from mmjax.evaluate import EvalContext, Evaluator, make_evaluator
from mmjax.evaluate.sheets import learning_curves
from mmjax.flops import PEAK_TFLOPS
from mmjax.registry import nearest
from mmjax.train import workdir as workdirs
from mmjax.train.checkpoints import Checkpoints
from mmjax.train.experiment import Experiment, load_initial, prepare
from mmjax.train.handover import model_dataclass
from mmjax.train.logging import MetricsWriter, progress, read_metrics
from mmjax.train.processes import agree, together
from mmjax.train.state import fingerprint

log = logging.getLogger(__name__)


# Of the data position: which records came, in which order.
ORDER = "order_sha256"


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to do."""


class Preempted(Exception):
    """The run was asked to stop by a signal; its checkpoint is saved."""

    def __init__(self, number: int, step: int):
        super().__init__(
            f"Stopped on {signal.Signals(number).name} after step {step}; the checkpoint is saved."
        )
        self.number = number


def train(config: ConfigDict, workdir: str | Path) -> dict[str, float]:
    """Train, or resume training, until config.train.steps.

    An evaluation that fails ends the run, but what was trained is saved, and the resumed run begins
    with that evaluation, by then perhaps with another `config.evals`. (Not so for several processes
    with `config.checkpoint.best`: there the checkpoint comes after the evaluation.)

    Args:
      config: a complete config.
      workdir: the run's own directory; one that holds this run is resumed.

    Returns:
      The metrics of the last evaluation.

    Raises:
      Preempted: after SIGTERM or Ctrl-C, when the checkpoint is saved.
      TrainingError: if the loss is no longer finite.
      and the errors of config, data, mesh, rules, work directory and checkpoints.
    """
    workdir = Path(workdir).absolute()
    experiment = prepare(config)
    with contextlib.ExitStack() as stack:
        with together("claiming the work directory"):
            stack.enter_context(workdirs.claim(workdir, config))
        return _train(experiment, workdir, stack)


def _train(experiment: Experiment, workdir: Path, stack: contextlib.ExitStack) -> dict[str, float]:
    config = experiment.config
    tokenizer = build_tokenizer(experiment, workdir)
    with together("opening the training data"):
        loader = datasets.open_train(
            config.data,
            tokenizer,
            batch_size=experiment.train.batch_size // jax.process_count(),
            seed=config.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        stack.enter_context(contextlib.closing(loader))
    with together("preparing the evaluations"):
        evaluators = make_evaluators(experiment, tokenizer, workdir)
    saved = stack.enter_context(Checkpoints(workdir / "checkpoints", experiment.checkpoint))
    restored = saved.restore(experiment.abstract_state())
    order = ""
    if restored is None:
        start, state = 0, experiment.initial_state(load_initial(experiment, tokenizer))
    else:
        start, state, position = restored
        loader.set_state(position)
        order = position.get(ORDER, "")
        log.info("Resuming from step %d.", start)
    due = _evaluation_due(experiment, evaluators, workdir, start)
    if start >= experiment.train.steps and not due:
        workdirs.end_manifest(workdir, **{ORDER: order})  # if it was killed just before that
        scores = _last_scores(workdir, start)
        lines = "".join(f"\n  {name}: {value:.4g}" for name, value in scores.items())
        log.info("The run is complete; nothing is left to do. Its last scores:%s", lines)
        return scores
    entry = workdirs.manifest(
        config,
        changes=workdirs.changes(workdir, config),
        resumed_from=start,
        parameters_sha256=fingerprint(state.params),
        data=loader.get_state(),
    )
    with together("writing to the work directory"):
        workdirs.add_manifest(workdir, entry)
        writer = MetricsWriter(
            workdir, start, wandb_project=experiment.train.wandb, config=json.loads(to_json(config))
        )
        stack.enter_context(contextlib.closing(writer))
    run = _Run(experiment, workdir, loader, writer, saved, evaluators, order)
    with _StopOnSignal() as stop:
        return run.run(state, start, stop, evaluate_first=due)


def _evaluation_due(
    experiment: Experiment, evaluators: dict[str, Scheduled], workdir: Path, step: int
) -> bool:
    """Whether the evaluation of a step that is saved is missing: it failed, or was killed."""
    last = step >= experiment.train.steps
    due = step > 0 and any(evaluator.due(step, last) for evaluator in evaluators.values())
    # The first process's answer is everyone's: only it writes these rows.
    return not agree(jax.process_index() > 0 or not due or bool(_last_scores(workdir, step)))


def _last_scores(workdir: Path, step: int) -> dict[str, float]:
    rows = [row for row in read_metrics(workdir / "metrics.jsonl") if row["step"] == step]
    return {k: v for row in rows for k, v in row.items() if k.startswith("eval/")}


class Scheduled(NamedTuple):
    """An evaluator, and after how many steps it runs; all run after the last step."""

    evaluator: Evaluator
    every: int

    def due(self, step: int, last: bool) -> bool:
        return last or step % self.every == 0


def make_evaluators(experiment: Experiment, tokenizer: Any, workdir: Path) -> dict[str, Scheduled]:
    """The evaluators of config.evals: `{name: {"name": evaluator, "every": steps, ...}}`.

    Raises:
      ConfigError, UnknownNameError: on evaluators and fields that do not exist.
    """
    context = EvalContext(
        graphdef=experiment.graphdef,
        mesh=experiment.mesh,
        task=experiment.task,
        tokenizer=tokenizer,
        workdir=workdir,
        batch_size=experiment.train.batch_size,
        open_data=datasets.open_eval,
        open_questions=datasets.open_questions,
    )
    result = {}
    for key, entry in experiment.config.evals.items():
        where = f"config.evals.{key}"
        if not isinstance(entry, ConfigDict):
            raise ConfigError(f"{where} must be a group of keys, not {entry!r}.")
        fields = entry.to_dict()
        every = fields.pop("every", None)
        if not isinstance(every, int) or every < 1:
            raise ConfigError(f"{where}.every must be a number of steps, not {every!r}.")
        result[key] = Scheduled(make_evaluator(fields, context, where), every)
    best = experiment.checkpoint.best
    prefixes = [f"eval/{key}/" for key in result]
    if best is not None and not best.startswith(tuple(prefixes)):
        raise ConfigError(
            f"config.checkpoint.best is {best!r}, which no evaluation of config.evals gives; "
            f"{nearest(best, prefixes)}"
        )
    return result


@dataclasses.dataclass
class _Run:
    experiment: Experiment
    workdir: Path
    loader: Any
    writer: MetricsWriter
    saved: Checkpoints
    evaluators: dict[str, Scheduled]
    order: str  # a digest of the records seen, in their order; of this process

    def run(
        self, state: Any, start: int, stop: _StopOnSignal, *, evaluate_first: bool
    ) -> dict[str, float]:
        training, checkpoint = self.experiment.train, self.experiment.checkpoint
        evaluated: dict[str, float] = {}
        if evaluate_first:
            evaluated = self._evaluate_safely(state, start, last=start >= training.steps)
            self.saved.score(start, evaluated)
        clock = _Clock(self.experiment)
        bar = progress(training.steps, start)
        pending = None
        for step in range(start + 1, training.steps + 1):
            with clock.waiting():
                batch = next(self.loader)
            for skipped in batch.skipped:
                log.warning("Skipped %s: %s", skipped.record, skipped.error)
            clock.skipped += len(batch.skipped)
            self.order = hashlib.sha256(f"{self.order}{batch.ids}".encode()).hexdigest()
            arrays = sharding.global_batch(batch.arrays, self.experiment.mesh)
            step_function = clock.compiled(self.experiment, arrays)
            with jax.transfer_guard("disallow"):
                state, metrics = step_function(state, arrays)
            # One step late, so that the device works while the host waits.
            if pending is not None:
                self._check_finite(*pending)
            pending = (step, metrics, batch.ids)
            bar.update()

            last = step == training.steps
            stopping = stop.requested(step)
            logs = last or step % training.log_every == 0
            saves = last or stopping or step % checkpoint.every == 0
            due = any(evaluator.due(step, last) for evaluator in self.evaluators.values())
            if not (logs or saves or due):
                continue
            self._check_finite(*pending)
            pending = None
            if logs:
                row = self._row(step, jax.device_get(metrics)) | clock.read(step)
                self.writer.write(step, row)
                bar.set_postfix_str(
                    f"loss {row['train/loss']:.4g}, data wait {row['perf/data_wait_share']:.0%}"
                )
            with clock.paused():
                # Before the evaluation, which may fail or be killed; but its score decides whether
                # the best checkpoint stays, and belongs into it.
                if saves and not (due and checkpoint.best):
                    self._save(state, step, {})
                if due:
                    evaluated = self._evaluate_safely(state, step, last=last)
                if saves and due and checkpoint.best:
                    self._save(state, step, evaluated)
            if stopping and not last:
                bar.close()
                self.saved.wait()
                raise Preempted(stop.number, step)
        bar.close()
        self.saved.wait()
        workdirs.end_manifest(self.workdir, **{ORDER: self.order})
        return evaluated

    def _row(self, step: int, metrics: dict[str, np.ndarray]) -> dict[str, float]:
        row = {f"train/{name}": float(value) for name, value in metrics.items()}
        rate = self.experiment.optimizer.learning_rate * self.experiment.schedule(step - 1)
        return row | {"train/learning_rate": float(rate)}

    def _save(self, state: Any, step: int, scores: dict[str, float]) -> None:
        self.writer.sync()
        position = self.loader.get_state() | {ORDER: self.order}
        self.saved.save(step, state, position, scores)

    def _evaluate_safely(self, state: Any, step: int, last: bool) -> dict[str, float]:
        """Scores; if there are none because of an error, the state is saved before it is raised."""
        several = jax.process_count() > 1
        if several:
            # Afterwards one that failed could not wait for the others, which may still evaluate.
            self.saved.wait()
        try:
            return self._evaluate(state, step, last)
        except Exception:
            if not several:
                self._save(state, step, {})  # unless it is there already
                self.saved.wait()
                log.error(
                    "An evaluation of step %d failed. The state is saved: the same command goes on "
                    "with this evaluation, and config.evals may be changed before.",
                    step,
                )
            raise

    def _evaluate(self, state: Any, step: int, last: bool) -> dict[str, float]:
        row: dict[str, float] = {}
        best = self.experiment.checkpoint.best
        for name, scheduled in self.evaluators.items():
            if scheduled.due(step, last):
                evaluator = scheduled.evaluator
                scores = evaluator.run(state.eval_params)
                if jax.process_index() == 0:
                    tqdm.write(f"\n{name}, step {step}\n{evaluator.describe(scores)}")
                for metric, value in scores.items():
                    row[f"eval/{name}/{metric}"] = float(value)
                if best is not None and best.startswith(f"eval/{name}/") and best not in row:
                    raise ConfigError(
                        f"config.checkpoint.best is {best!r}, which {name!r} does not give; "
                        f"{nearest(best, row)}"
                    )
        if row:
            self.writer.write(step, row)
        if last and jax.process_index() == 0:
            self.writer.sync()
            learning_curves(
                self.writer.path, self.workdir / "learning_curves.png", title=self.workdir.name
            )
        return row

    def _check_finite(self, step: int, metrics: dict[str, jax.Array], ids: list[str]) -> None:
        """A loss may be finite and its gradient not: then the parameters are already spoilt."""
        values = {name: float(metrics[name]) for name in ("loss", "grad_norm")}
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if not bad:
            return
        path = self.workdir / f"nonfinite-step-{step}-process-{jax.process_index()}.json"
        report = {"step": step, **{name: str(value) for name, value in values.items()}, "ids": ids}
        workdirs.write_atomically(path, json.dumps(report, indent=2))
        try:
            self.saved.wait()  # for an earlier step's checkpoint, should it be under way
        finally:
            raise TrainingError(
                f"The {bad[0]} of step {step} is {values[bad[0]]}. The examples of its batch are "
                f"listed in {path}; nothing of this step or later ones is saved. A resumed run "
                "meets the same batch: look at these examples, or lower "
                "config.optimizer.learning_rate or config.optimizer.clip_norm and start again with "
                "another --workdir."
            )


class _Clock:
    """Rates of the training steps proper: compiling, evaluating and saving do not count."""

    def __init__(self, experiment: Experiment):
        self.batch_size = experiment.train.batch_size
        self.compile_seconds = 0.0
        self.programs: dict[Any, tuple[Any, float]] = {}
        self.skipped = 0
        self._reset()

    def _reset(self) -> None:
        self.began, self.idle, self.wait = time.perf_counter(), 0.0, 0.0
        self.steps, self.flops = 0, 0.0

    def compiled(self, experiment: Experiment, arrays: dict[str, jax.Array]) -> Callable:
        """The step for batches of this shape: one, unless the data groups texts by length.

        Compiled ahead of time: a second compilation for a shape is not slow but impossible.
        """
        shapes = tuple((name, array.shape) for name, array in sorted(arrays.items()))
        if shapes not in self.programs:
            _check_fields(experiment, arrays)
            began = time.perf_counter()
            flops = experiment.step_flops(arrays)
            self.programs[shapes] = (experiment.lower_step(arrays).compile(), flops)
            self.compile_seconds += time.perf_counter() - began
            self.began += time.perf_counter() - began
        program, flops = self.programs[shapes]
        self.flops += flops
        return program

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.wait += time.perf_counter() - began
        self.steps += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.idle += time.perf_counter() - began

    def read(self, step: int) -> dict[str, float]:
        """Since the last reading."""
        seconds = time.perf_counter() - self.began - self.idle
        devices = jax.device_count()
        rate = self.steps / seconds
        tflops = self.flops / seconds / devices / 1e12
        row = {
            "perf/steps_per_second": rate,
            "perf/examples_per_second_per_device": rate * self.batch_size / devices,
            "perf/data_wait_share": self.wait / seconds,
            "perf/model_tflops_per_device": tflops,
            "perf/compile_seconds": self.compile_seconds,
            "perf/skipped_records": self.skipped,
        }
        device = jax.local_devices()[0]
        if device.device_kind in PEAK_TFLOPS:
            row["perf/mfu"] = tflops / PEAK_TFLOPS[device.device_kind]
        memory = device.memory_stats()
        if memory:
            row["perf/peak_memory_gib"] = memory["peak_bytes_in_use"] / 2**30
        self._reset()
        return row


def _check_fields(experiment: Experiment, arrays: dict[str, jax.Array]) -> None:
    missing = [name for name in experiment.task.fields if name not in arrays]
    if missing:
        raise ConfigError(
            f"The task {experiment.config.task.name!r} needs the arrays {missing}, but batches "
            f"have {sorted(arrays)}. Add {missing} to config.data.train."
        )


class _StopOnSignal:
    """SIGTERM or Ctrl-C ask the run to save and stop after the step at hand; a second Ctrl-C is
    obeyed at once.

    With several processes all must stop after the same step: JAX's preemption service, which
    listens to SIGTERM, agrees on one.
    """

    def __init__(self):
        self.number = signal.SIGTERM
        self._asked = False
        self._single = jax.process_count() == 1
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _StopOnSignal:
        if self._single:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _ask(self, number: int, _: object) -> None:
        self._asked, self.number = True, number
        self._restore(signal.SIGINT)
        # Not print: a handler may have interrupted one.
        os.write(2, b"\nSaving and stopping after this step; Ctrl-C stops at once.\n")

    def _restore(self, *numbers: int) -> None:
        for number in numbers or tuple(self._before):
            if number in self._before:
                signal.signal(number, self._before.pop(number))

    def requested(self, step: int) -> bool:
        if self._single:
            return self._asked
        return multihost_utils.reached_preemption_sync_point(step)


def build_tokenizer(experiment: Experiment, workdir: Path) -> Any:
    """The tokenizer of config.data, checked against the model's vocabulary; None where there is
    none.

    Raises:
      ConfigError: if the tokenizer has more tokens than the model has embeddings, or is not the one
        that the task needs.
    """
    config = experiment.config
    if config.data.tokenizer is None:
        return None
    # The first process may have to train it; the others read what it wrote.
    with together("making the tokenizer"):
        if jax.process_index() == 0:
            datasets.build_tokenizer(config.data, workdir)
    tokenizer = datasets.build_tokenizer(config.data, workdir)
    model = config.model
    tables = {f"config.model.{part}": model[part] for part in ("text", "lm") if part in model}
    if "vocab_size" in model:  # a language model alone
        tables["config.model"] = model
    for where, table in tables.items():
        if tokenizer.vocab_size > table.vocab_size:
            raise ConfigError(
                f"The tokenizer has {tokenizer.vocab_size} tokens, but the model has embeddings "
                f"for {table.vocab_size}. Set {where}.vocab_size to at least that."
            )
    experiment.task.check_tokenizer(model_dataclass(model.to_dict()), config.data, tokenizer)
    return tokenizer
