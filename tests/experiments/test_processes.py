"""Two processes of four devices train as one of eight does, stop together and fail together."""

import json
import signal

import launch
import numpy as np
import pytest

SHORT = "steps=10,every=5,crop=False"


def losses(workdir):
    return np.array([row["train/loss"] for row in launch.rows(workdir) if "train/loss" in row])


@pytest.fixture(scope="module", params=["siglip", pytest.param("clip", marks=pytest.mark.slow)])
def pair(request, tmp_path_factory, cache):
    """(config argument, work directory of one process, of two), both trained to the end."""
    # One of the two with evaluations; each costs a compilation on every mesh.
    arg = f"task={request.param},{SHORT},evals={request.param == 'siglip'}"
    folder = tmp_path_factory.mktemp(request.param)
    launch.train(arg, folder / "one", devices=8, cache=cache)
    processes = launch.train_processes(
        arg, folder / "two", "--config.mesh.data=2", "--config.mesh.fsdp=4", devices=4, cache=cache
    )
    codes = [launch.finish(process) for process in processes]
    assert codes == [0, 0], (folder / "two.log").read_text()[-5000:]
    return arg, folder / "one", folder / "two"


def test_losses_are_those_of_one_process(pair):
    _, one, two = pair
    assert len(losses(two)) == 10
    np.testing.assert_allclose(losses(two)[0], losses(one)[0], rtol=1e-6)
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-4)


def test_metrics_are_written_once(pair):
    _, one, two = pair
    assert [row.keys() for row in launch.rows(two)] == [row.keys() for row in launch.rows(one)]
    assert len(list((two / "tensorboard").iterdir())) == 1
    (start,) = json.loads((two / "manifest.json").read_text())
    assert start["processes"] == 2 and start["devices"] == ["8 x cpu"]


@pytest.mark.parametrize("signalled", [pytest.param((0, 1), marks=pytest.mark.slow), (1,)])
def test_sigterm_to_two_processes(tmp_path, cache, signalled):
    """Whichever process hears of it, all save the same step and leave; one process goes on."""
    workdir = tmp_path / "run"
    options = dict(devices=1, cache=cache)
    processes = launch.train_processes("", workdir, **options)
    assert launch.wait_for(lambda: launch.last_step(workdir) >= 7, processes)
    for index in signalled:
        processes[index].send_signal(signal.SIGTERM)
    codes = [launch.finish(process) for process in processes]
    output = (tmp_path / "run.log").read_text()
    assert codes == [143, 143], output[-5000:]
    assert "Stopped on SIGTERM after step" in output
    saved = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert saved == launch.last_step(workdir) < 60
    if len(signalled) == 2:
        return
    launch.train("", workdir, devices=2, cache=cache)
    steps = [row["step"] for row in launch.rows(workdir) if "train/loss" in row]
    assert steps == list(range(1, 61))


def test_a_refused_process_does_not_leave_the_other_waiting(tmp_path, cache):
    """The first process finds a directory that is no run; the second must not wait for it."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "letters").touch()
    processes = launch.train_processes("", workdir, devices=1, cache=cache)
    codes = [launch.finish(process, timeout=60) for process in processes]
    output = (tmp_path / "run.log").read_text()
    assert codes == [1, 1]
    assert "holds no run" in output and "Another process failed" in output


def test_a_killed_process_ends_the_other(tmp_path, cache):
    workdir = tmp_path / "run"
    processes = launch.train_processes("", workdir, devices=1, cache=cache)
    assert launch.wait_for(lambda: launch.last_step(workdir) >= 7, processes)
    processes[1].kill()
    assert launch.finish(processes[0], timeout=120) != 0
