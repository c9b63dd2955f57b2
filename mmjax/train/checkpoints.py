"""Checkpoints by Orbax: written in the background, whole or not at all, restorable on any mesh."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from mmjax.nn.lora import adapted, is_adapter
from mmjax.params import Params
from mmjax.train import processes
from mmjax.train.state import TrainState
from mmjax.train.workdir import write_atomically

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep.

    Attributes:
      every: steps between checkpoints; the last step is always saved.
      keep: so many latest checkpoints stay; 2, so that one is left should the last be damaged.
      keep_every: checkpoints of these steps stay for good; None: none do.
      best: an evaluation's metric, e.g. "eval/heldout/text_to_image/R@1"; the checkpoint with its
        largest value stays too.
    """

    every: int
    keep: int = 2
    keep_every: int | None = None
    best: str | None = None

    def __post_init__(self):
        for name in ("every", "keep", "keep_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"config.checkpoint.{name} must be at least 1, not {value}.")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message says what to do."""


class Checkpoints:
    """The checkpoints of one work directory.

    Each holds the training state and the position of the data iterator. Orbax writes into a
    temporary directory and renames it when everything is there; leftovers of a killed run are
    removed.

    Args:
      directory: where they stand.
      config: see there.
    """

    def __init__(self, directory: Path, config: CheckpointConfig):
        self.directory = Path(directory).absolute()
        self.config = config
        keep: list[Any] = [policies.LatestN(config.keep)]
        if config.keep_every is not None:
            keep.append(policies.EveryNSteps(config.keep_every))
        if config.best is not None:
            keep.append(policies.BestN(get_metric_fn=self._score, n=1))
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_handlers={"state": _array_handler(), "data": ocp.JsonCheckpointHandler()},
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(keep),
                # Without it metrics are not written, and a resumed run would forget its best.
                best_fn=None if config.best is None else self._score,
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
            ),
        )

    def save(
        self, step: int, state: TrainState, data: dict[str, Any], metrics: dict[str, float]
    ) -> None:
        """Start to save; returns as soon as the arrays are copied.

        Args:
          step: updates done.
          state: the training state.
          data: the data iterator's state after the last batch that was trained on (JSON).
          metrics: of the evaluations at this step, for `CheckpointConfig.best`.

        Raises:
          CheckpointError: if this or the previous save failed, e.g. on a full disk.
        """
        if step in self._manager.all_steps():
            return
        with self._explained():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(_as_dict(state)),
                    data=ocp.args.JsonSave(data),
                ),
                metrics=None if self.config.best is None else metrics,
            )

    def score(self, step: int, metrics: dict[str, float]) -> None:
        """Gives the checkpoint of a step, which is on disk, the metrics that `save` could not."""
        if self.config.best is None:
            return
        with processes.together("adding the scores to a checkpoint"):
            if jax.process_index() == 0:
                file = self.directory / str(step) / "metrics" / "metrics"  # where Orbax has them
                file.parent.mkdir(exist_ok=True)
                write_atomically(file, json.dumps(metrics))
        self._manager.reload()

    def _score(self, metrics: dict[str, float]) -> float:
        """For `CheckpointConfig.best`; steps without an evaluation come last, and so does NaN."""
        value = metrics.get(self.config.best, -math.inf)
        return -math.inf if math.isnan(value) else value

    def restore(self, target: TrainState) -> tuple[int, TrainState, dict[str, Any]] | None:
        """The latest checkpoint that is whole.

        One that cannot be read is moved aside (to `corrupt-STEP`), never deleted.

        Args:
          target: shapes with shardings; the mesh may differ from the one that saved.

        Returns:
          (step, state, data iterator state), or None if there is no checkpoint.

        Raises:
          CheckpointError: if there are checkpoints but none can be read.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        errors: list[str] = []
        for step in steps:
            restored, problem = self._try(step, target)
            # All processes must go on from the same step.
            if processes.agree(restored is not None):
                for bad in steps[: len(errors)]:
                    self._set_aside(bad)
                return step, TrainState(**restored.state), restored.data
            log.warning("Checkpoint %d cannot be read (%s).", step, problem)
            errors.append(f"  step {step}: {problem}")
        if errors:
            raise CheckpointError(
                f"None of the checkpoints in {self.directory} can be read:\n"
                + "\n".join(errors)
                + "\nThey are left as they are. Mend them, or start again with another --workdir."
            )
        return None

    def _try(self, step: int, target: TrainState) -> tuple[Any, str]:
        """What the checkpoint of a step holds, or None and why it cannot be read."""
        items = ocp.args.Composite(
            state=_array_restore(_as_dict(target)), data=ocp.args.JsonRestore()
        )
        try:
            return self._manager.restore(step, args=items), "another process cannot read it"
        except Exception as error:
            return None, _first_line(error)

    def _set_aside(self, step: int) -> None:
        with processes.together("moving a damaged checkpoint aside"):
            if jax.process_index() == 0:
                aside = self.directory / f"corrupt-{step}"
                while aside.exists():
                    aside = aside.with_name(aside.name + "-again")
                os.rename(self.directory / str(step), aside)
                log.warning("The unreadable checkpoint of step %d was moved to %s.", step, aside)
        self._manager.reload()

    def wait(self) -> None:
        """Block until everything is on disk.

        Raises:
          CheckpointError: if it could not be written.
        """
        with self._explained():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is None:
            self.wait()
        elif jax.process_count() > 1:
            # Writing needs all processes, and some may be gone.
            return
        else:
            try:
                self.wait()
            except CheckpointError as second:
                if not isinstance(error, CheckpointError):
                    log.error("%s", second)
        self._manager.close()

    def _explained(self):
        return _Explained(self.directory)


class _Explained:
    """Turns a failed write into an error that says what to do."""

    def __init__(self, directory: Path):
        self.directory = directory

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, Exception) and not isinstance(error, CheckpointError):
            raise CheckpointError(
                f"A checkpoint could not be written to {self.directory}: {_first_line(error)}\n"
                "Earlier checkpoints are unharmed. Free space or mend the file system, then run "
                "the same command again: it resumes from the last whole checkpoint."
            ) from error


def _as_dict(state: TrainState) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def _array_handler() -> ocp.PyTreeCheckpointHandler:
    """As Orbax's default, but small arrays are not cut into slices, one for each device that holds
    a copy: each cut is a compilation, hundreds of them at the first checkpoint."""
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def _array_restore(tree: Any, **options: Any) -> ocp.args.PyTreeRestore:
    """Arrays with the shapes, types and shardings of `tree`, whatever mesh saved them."""
    how = ocp.checkpoint_utils.construct_restore_args(tree)
    return ocp.args.PyTreeRestore(item=tree, restore_args=how, **options)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def restore_params(
    directory: Path, targets: Params, optional: Callable[[str], bool] = lambda path: False
) -> tuple[int, Params]:
    """Some parameters from the latest checkpoint of a run, straight into sharded arrays.

    Args:
      directory: the run's checkpoint directory.
      targets: {path in that run: shape with sharding}.
      optional: paths that are left out where the run does not have them.

    Returns:
      The checkpoint's step, and {path in that run: array}; moving averages where the run kept them.

    Raises:
      CheckpointError: if there is no checkpoint, parameters are missing or of another shape (all
        are listed), or kernels have adapters there that are not asked for.
    """
    directory = Path(directory).absolute()
    steps = ocp.utils.checkpoint_steps(directory) if directory.is_dir() else []
    if not steps:
        raise CheckpointError(
            f"There is no checkpoint in {directory}. Train that run first, or give the work "
            "directory of one that is trained."
        )
    step = max(steps)
    item = directory / str(step) / "state"
    with ocp.PyTreeCheckpointer() as checkpointer:
        saved = checkpointer.metadata(item).item_metadata.tree
        where, problems = {}, []
        for path, target in targets.items():
            group = next(
                (g for g in ("ema", "trainable", "frozen") if path in (saved.get(g) or {})), None
            )
            if group is None:
                if not optional(path):
                    problems.append(f"  {path!r} is not there")
            elif tuple(saved[group][path].shape) != tuple(target.shape):
                problems.append(
                    f"  {path!r} has shape {tuple(saved[group][path].shape)} there, "
                    f"{tuple(target.shape)} here"
                )
            else:
                where[path] = group
        if problems:
            raise CheckpointError(
                f"{item} does not hold the parameters asked for:\n" + "\n".join(problems)
            )
        left = [
            path
            for group in ("trainable", "frozen")
            for path in saved.get(group) or {}
            if is_adapter(path) and adapted(path) in targets and path not in targets
        ]
        if left:
            raise CheckpointError(
                f"{item} holds adapters (LoRA) of kernels asked for, which are not what was "
                "trained without them:\n"
                + "\n".join(f"  {path!r}" for path in left)
                + "\nMerge them (python -m experiments.convert --source RUN --target NEW_DIR --to "
                "orbax) and take the result, or give config.lora the values it had there."
            )
        if not where:
            return step, {}
        tree: dict[str, Params] = {}
        for path, group in where.items():
            tree.setdefault(group, {})[path] = targets[path]
        restored = checkpointer.restore(
            item,
            args=_array_restore(tree, partial_restore=True),
        )
    return step, {path: restored[group][path] for path, group in where.items()}
