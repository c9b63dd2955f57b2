"""The work directory: one run, its config, its manifest, its metrics."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from mmjax import config as configs
from mmjax import registry

# These say how a run is executed and what is told of it, not what it learns: they may change
# between resumptions.
EXECUTION_KEYS = (
    "mesh",
    "data.workers",
    "data.threads",
    "data.prefetch",
    "data.max_bad_share",
    "checkpoint",
    "evals",
    "train.log_every",
    "train.wandb",
)


class WorkdirError(RuntimeError):
    """A work directory that this run must not touch; the message says why."""


def write_atomically(path: Path, text: str) -> None:
    """A reader sees the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@contextlib.contextmanager
def claim(workdir: Path, config: ConfigDict) -> Iterator[None]:
    """Make the directory this run's own, or recognise it; no second run may use it meanwhile.

    Only the first process does something.

    Args:
      workdir: created if missing.
      config: the whole config.

    Raises:
      WorkdirError: if the directory belongs to another config (the difference is shown), is in use,
        or holds something else than a run.
    """
    if jax.process_index() != 0:
        yield
        return
    stored = workdir / "config.json"
    if workdir.exists() and not workdir.is_dir():
        raise WorkdirError(f"{workdir} is a file. Use a new or empty --workdir.")
    others = [path for path in workdir.glob("*") if path.name != ".lock"]
    if others and not stored.exists():
        raise WorkdirError(
            f"{workdir} is not empty and holds no run. Use a new or empty --workdir."
        )
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise WorkdirError(
                f"Another process is running in {workdir}. Wait for it, or use another --workdir."
            ) from None
        text = configs.to_json(config)
        lines = changes(workdir, config, EXECUTION_KEYS)
        if lines and _has_begun(workdir):
            raise WorkdirError(
                f"{workdir} holds a run with another config:\n"
                + "\n".join(lines)
                + "\nUse another --workdir, or the old config to resume that run."
            )
        if lines or not stored.exists():
            # A run that never took a step, say because its data was misspelt, holds nothing.
            shutil.rmtree(workdir / "tokenizer", ignore_errors=True)
            write_atomically(stored, text)
        yield


def changes(workdir: Path, config: ConfigDict, ignore: Sequence[str] = ()) -> list[str]:
    """Lines that say how a config differs from the one the directory was made with."""
    stored = workdir / "config.json"
    if not stored.exists():
        return []
    return configs.difference(stored.read_text("utf-8"), configs.to_json(config), ignore)


def _has_begun(workdir: Path) -> bool:
    metrics = workdir / "metrics.jsonl"
    saved = any((workdir / "checkpoints").glob("[0-9]*"))
    return saved or (metrics.exists() and metrics.stat().st_size > 0)


def manifest(config: ConfigDict, **facts: Any) -> dict[str, Any]:
    """What one must know to repeat a run: config, seed, code, versions, hardware, data."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pillow")
    text = configs.to_json(config)
    return {
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "seed": config.seed,
        "code": _revision(),
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "devices": [f"{jax.device_count()} x {jax.devices()[0].device_kind}"],
        "processes": jax.process_count(),
        "plugins": registry.plugins(),
        "started": _now(),
        **facts,
    }


def add_manifest(workdir: Path, entry: dict[str, Any]) -> None:
    """Append to manifest.json: one entry for each time the run was started."""
    if jax.process_index() != 0:
        return
    path = workdir / "manifest.json"
    entries = json.loads(path.read_text("utf-8")) if path.exists() else []
    write_atomically(path, json.dumps([*entries, entry], indent=2))


def end_manifest(workdir: Path, **facts: Any) -> None:
    """Add to the last entry of manifest.json that the run is finished, and what is known now; one
    that says so already stays."""
    if jax.process_index() != 0:
        return
    path = workdir / "manifest.json"
    entries = json.loads(path.read_text("utf-8"))
    if "finished" not in entries[-1]:
        entries[-1] |= {"finished": _now(), **facts}
        write_atomically(path, json.dumps(entries, indent=2))


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _revision() -> str:
    """The commit of this code, with "+changes" if files were edited; "unknown" outside of git."""
    root = Path(__file__).resolve().parents[2]
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        edits = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+changes" if edits.stdout.strip() else "")
