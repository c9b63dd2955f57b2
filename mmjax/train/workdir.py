"""The work directory: one run, its config, its manifest, its metrics."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from mmjax import config as configs

# These say how a run is executed, not what it computes: they may change between resumptions.
EXECUTION_KEYS = ("mesh", "data.workers", "data.threads", "data.prefetch")


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


def claim(workdir: Path, config: ConfigDict) -> contextlib.AbstractContextManager:
    """Make the directory this run's own, or recognise it.

    Args:
      workdir: created if missing.
      config: the whole config.

    Returns:
      A context to hold while running: no second run may use the directory meanwhile.

    Raises:
      WorkdirError: if the directory belongs to another config (the difference is shown), is in use,
        or holds something else than a run.
    """
    stored = workdir / "config.json"
    text = configs.to_json(config)
    if jax.process_index() != 0:
        return contextlib.nullcontext()
    if stored.exists():
        lines = configs.difference(stored.read_text("utf-8"), text, EXECUTION_KEYS)
        if lines:
            raise WorkdirError(
                f"{workdir} holds a run with another config:\n"
                + "\n".join(lines)
                + "\nUse another --workdir, or the old config to resume that run."
            )
    elif workdir.exists() and any(p.name != ".lock" for p in workdir.iterdir()):
        raise WorkdirError(
            f"{workdir} is not empty and holds no run. Use a new or empty --workdir."
        )
    workdir.mkdir(parents=True, exist_ok=True)
    lock = open(workdir / ".lock", "w")  # noqa: SIM115 -- held open as long as the run lasts
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise WorkdirError(
            f"Another process is running in {workdir}. Wait for it, or use another --workdir."
        ) from None
    if not stored.exists():
        write_atomically(stored, text)
    return lock


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
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **facts,
    }


def add_manifest(workdir: Path, entry: dict[str, Any]) -> None:
    """Append to manifest.json: one entry for each time the run was started."""
    if jax.process_index() != 0:
        return
    path = workdir / "manifest.json"
    entries = json.loads(path.read_text("utf-8")) if path.exists() else []
    write_atomically(path, json.dumps([*entries, entry], indent=2))


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
