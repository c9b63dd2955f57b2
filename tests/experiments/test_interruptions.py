"""Runs that are killed or asked to stop end like runs that are not."""

import json
import os
import random
import signal
import time
from pathlib import Path

import launch
import numpy as np
import pytest


def same_parameters(one, other):
    import jax

    one, other = launch.parameters(one), launch.parameters(other)
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def kill(workdir, moment, **options) -> bool:
    """Start or resume the run and SIGKILL it at a moment; whether it was still running."""
    process = launch.start("", workdir, **options)
    alive = launch.wait_for(moment, [process])
    process.kill()
    return process.wait() == -signal.SIGKILL and alive


def at_step(workdir, step, delay):
    def moment():
        if launch.last_step(workdir) < step:
            return False
        time.sleep(delay)
        return True

    return moment


def check_killed(workdir, reference, kills, seed, **options):
    draw = random.Random(seed)
    steps = sorted(draw.sample(range(2, 55), kills - 1))
    assert kill(workdir, lambda: launch.saving(workdir), **options)
    killed = 1
    for step in steps:
        killed += kill(workdir, at_step(workdir, step, draw.uniform(0, 0.05)), **options)
    # A busy machine may let a run end before its last kill.
    assert killed >= kills - 1
    launch.train("", workdir, **options)
    assert launch.rows(workdir) == launch.rows(reference)
    same_parameters(workdir, reference)
    starts = json.loads((workdir / "manifest.json").read_text())
    assert any(start["resumed_from"] > 0 for start in starts)
    assert not launch.saving(workdir)


def test_killed_twice(tmp_path, finished, cache):
    """Once while a checkpoint is half-written, once at a random moment."""
    check_killed(tmp_path / "run", finished, kills=2, seed=0, cache=cache)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_five_moments(tmp_path, finished, cache, seed):
    check_killed(tmp_path / "run", finished, kills=5, seed=seed, cache=cache)


@pytest.mark.parametrize(
    "number, code",
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_signals(tmp_path, finished, cache, number, code):
    """SIGTERM and Ctrl-C save and say how to go on; resuming is exact."""
    workdir = tmp_path / "run"
    process = launch.start("", workdir, cache=cache)
    assert launch.wait_for(lambda: launch.last_step(workdir) >= 13, [process])
    process.send_signal(number)
    assert launch.finish(process) == code
    output = (tmp_path / "run.log").read_text()
    assert "same command" in output and "Traceback" not in output
    assert f"Stopped on {number.name} after step" in output
    saved = {int(path.name) for path in (workdir / "checkpoints").iterdir()}
    assert max(saved) == launch.last_step(workdir)
    launch.train("", workdir, cache=cache)
    assert launch.rows(workdir) == launch.rows(finished)
    same_parameters(workdir, finished)


def test_killed_with_workers_leaves_none(tmp_path, cache):
    """Data workers end soon after a trainer that could not stop them."""
    workdir = tmp_path / "run"
    process = launch.start("", workdir, "--config.data.workers=2", cache=cache)
    assert launch.wait_for(lambda: launch.last_step(workdir) >= 5, [process])
    tasks = Path(f"/proc/{process.pid}/task").glob("*/children")
    children = [int(pid) for task in tasks for pid in task.read_text().split()]
    assert len(children) >= 2
    process.kill()
    process.wait()
    end = time.monotonic() + 30
    while any(os.path.exists(f"/proc/{pid}") for pid in children):
        assert time.monotonic() < end, "data workers survive"
        time.sleep(0.2)
