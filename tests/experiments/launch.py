"""Running the commands as a user does: as processes of their own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "tests/experiments/digits_config.py"


def environment(devices: int, cache: Path | None) -> dict[str, str]:
    """Compiled programs are kept in `cache`: the same program, byte for byte, for each restart."""
    variables = dict(
        os.environ, JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES=str(devices), PYTHONPATH=str(ROOT)
    )
    variables.pop("XLA_FLAGS", None)
    if cache is not None:
        variables |= dict(
            JAX_COMPILATION_CACHE_DIR=str(cache),
            JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
            JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1",
        )
    return variables


def start(
    arg: str,
    workdir: Path,
    *extra: str,
    devices: int = 1,
    cache: Path | None = None,
    command: str = "experiments.train",
    **options,
) -> subprocess.Popen:
    """A command on the tiny config, under way; its output is in `workdir`.log, if not in a pipe."""
    log = open(f"{workdir}.log", "a")  # noqa: SIM115 -- the process holds it
    where = ("--config", f"{CONFIG}:{arg}", "--workdir", str(workdir))
    return subprocess.Popen(
        [sys.executable, "-m", command, *where, *extra],
        cwd=ROOT,
        env=environment(devices, cache),
        **(dict(stdout=log, stderr=subprocess.STDOUT) | options),
    )


def finish(process: subprocess.Popen, timeout: float = 120) -> int:
    """Its exit code."""
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise


def train(arg: str, workdir: Path, *extra: str, expect: int = 0, **options) -> str:
    """Run it to its end; returns what it printed."""
    code = finish(start(arg, workdir, *extra, **options))
    output = Path(f"{workdir}.log").read_text()
    assert code == expect, output[-5000:]
    return output


def train_processes(
    arg: str, workdir: Path, *extra: str, count: int = 2, **options
) -> list[subprocess.Popen]:
    """The same as several processes under jax.distributed, on this machine."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    cluster = ("--coordinator", f"localhost:{port}", "--processes", str(count))
    return [
        start(arg, workdir, *extra, *cluster, "--process", str(index), **options)
        for index in range(count)
    ]


def rows(workdir: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    file = Path(workdir) / "metrics.jsonl"
    # A line under way has no end yet.
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [
        {key: value for key, value in json.loads(line).items() if not key.startswith("perf/")}
        for line in lines
    ]


def last_step(workdir: Path) -> int:
    return max((row["step"] for row in rows(workdir)), default=0)


def wait_for(condition: Callable[[], bool], processes: Sequence[subprocess.Popen]) -> bool:
    """Whether it came true while the processes ran."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if condition():
            return True
        if any(process.poll() is not None for process in processes):
            return False
        time.sleep(0.001)
    raise TimeoutError("Nothing happened for two minutes")


def saving(workdir: Path) -> bool:
    """Whether a checkpoint is half-written at this moment."""
    folder = Path(workdir) / "checkpoints"
    return folder.exists() and any("tmp" in name for name in os.listdir(folder))


def parameters(workdir: Path) -> dict:
    """Every array of the last checkpoint, read by Orbax alone."""
    import orbax.checkpoint as ocp

    steps = [
        int(path.name) for path in (Path(workdir) / "checkpoints").iterdir() if path.name.isdigit()
    ]
    item = Path(workdir).absolute() / "checkpoints" / str(max(steps)) / "state"
    with ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(item)
