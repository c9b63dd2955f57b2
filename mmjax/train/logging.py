"""Metrics of a run: metrics.jsonl, TensorBoard, Weights & Biases, a progress bar."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2, summary_pb2
from tqdm import tqdm

from mmjax.train.workdir import write_atomically


class MetricsWriter:
    """Writes rows of metrics; each step stands in metrics.jsonl once, also after resuming.

    Only the first process writes. `path` is that of metrics.jsonl.

    Args:
      workdir: where metrics.jsonl and TensorBoard's files go.
      start: updates done so far; rows of later steps are dropped: they will be written again.
      wandb_project: also log to this Weights & Biases project; None does not.
      config: the config as JSON-able dict, for Weights & Biases.
    """

    def __init__(
        self, workdir: Path, start: int, *, wandb_project: str | None, config: dict[str, Any]
    ):
        self.path = workdir / "metrics.jsonl"
        self._main = jax.process_index() == 0
        self._wandb = None
        if not self._main:
            return
        if wandb_project is not None:
            try:
                import wandb
            except ImportError:
                raise ValueError(
                    "config.train.wandb is set, but wandb is not installed: "
                    "pip install -e .[wandb], or set it to None."
                ) from None
            # The directory's name identifies the run, so that resuming continues it.
            self._wandb = wandb.init(
                project=wandb_project, dir=workdir, id=workdir.name, resume="allow", config=config
            )
        rows = [row for row in read_metrics(self.path) if row["step"] <= start]
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        self._board = _Board(workdir / "tensorboard", start)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """One row. Values that JSON cannot hold (NaN, infinities) are written as strings."""
        if not self._main:
            return
        row = {"step": step} | {
            name: value if math.isfinite(value) else str(value) for name, value in metrics.items()
        }
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self._board.write(step, metrics)
        if self._wandb is not None:
            self._wandb.log(metrics, step=step)

    def sync(self) -> None:
        """Rows are on disk when this returns: called before a checkpoint that comes after them."""
        if self._main:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._main:
            self._file.close()
            self._board.close()
            if self._wandb is not None:
                self._wandb.finish()


class _Board:
    """TensorBoard's event files, written at once.

    tensorboardX's own SummaryWriter hands events to a thread, and may wait for it for ever when the
    run is interrupted or the disk is full.

    Args:
      directory: of the event files; each start of a run adds one.
      start: rows after this step in earlier files are void.
    """

    def __init__(self, directory: Path, start: int):
        directory.mkdir(exist_ok=True)
        self._writer = EventsWriter(str(directory / "events"))
        void_from = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(start + 1, session_log=void_from)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        values = [
            summary_pb2.Summary.Value(tag=name, simple_value=value)
            for name, value in metrics.items()
        ]
        self._add(step, summary=summary_pb2.Summary(value=values))

    def _add(self, step: int, **fields: Any) -> None:
        self._writer.write_event(event_pb2.Event(wall_time=time.time(), step=step, **fields))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line cut short by a kill is left out."""
    if not Path(path).exists():
        return []
    rows = []
    for line in Path(path).read_text("utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def progress(total: int, initial: int) -> tqdm:
    """A progress bar with the rate, the time left and what `set_postfix` gives it."""
    return tqdm(
        total=total,
        initial=initial,
        desc="train",
        unit="step",
        dynamic_ncols=True,
        # In a log file a line now and then is enough.
        mininterval=1.0 if sys.stderr.isatty() else 20.0,
        disable=jax.process_index() != 0,
    )
