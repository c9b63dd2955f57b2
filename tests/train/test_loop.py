"""One run seen from inside: how often it compiles, and what it does when the loss is not finite."""

import hashlib
import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compilations

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments"))
import digits_config

from mmjax import data as datasets
from mmjax.evaluate.classification import Classification
from mmjax.train import loop
from mmjax.train.logging import read_metrics

POISONED = 8


class Poisoned:
    """A loader whose batch number POISONED holds an infinity."""

    def __init__(self, loader):
        self._loader = loader

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def __next__(self):
        batch = next(self._loader)
        if self._loader.get_state()["position"] == POISONED * 32:
            batch.arrays["image"][3] = np.inf
        return batch


def guarded(compile_step, refused):
    """`_Clock.compiled` whose step first tries to bring a host array to the device."""

    def compiled(clock, experiment, arrays):
        step = compile_step(clock, experiment, arrays)

        def attempt_and_step(state, arrays):
            try:
                jnp.negative(np.ones(3))
            except Exception as error:
                assert "Disallowed host-to-device transfer" in str(error)
                refused["transfers refused"] += 1
            return step(state, arrays)

        return attempt_and_step

    return compiled


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(work directory, the first run's error, names compiled by it, and by the second).

    The first meets an infinity at step 8; the second goes on with the data mended.
    """
    workdir = tmp_path_factory.mktemp("loop") / "run"
    config = digits_config.get_config("steps=12,every=3")
    open_train = datasets.open_train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            datasets,
            "open_train",
            lambda *args, **options: Poisoned(open_train(*args, **options)),
        )
        with compilations() as first, pytest.raises(loop.TrainingError) as error:
            loop.train(config, workdir)
        kept = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())
        patch.undo()
        with compilations() as second:
            patch.setattr(loop._Clock, "compiled", guarded(loop._Clock.compiled, second))
            loop.train(config, workdir)
    return workdir, error.value, kept, first, second


def test_compiles_once(runs):
    """Over evaluations and checkpoints, in a fresh run and in a resumed one."""
    *_, first, second = runs
    for compiled in (first, second):
        assert compiled["jit(step)"] == 1
        assert compiled["jit(run)"] == 1  # the evaluator's


def test_infinite_loss_stops_the_run(runs):
    workdir, error, kept, *_ = runs
    assert kept == [3, 6]
    report = json.loads((workdir / f"nonfinite-step-{POISONED}-process-0.json").read_text())
    assert report["step"] == POISONED and len(report["ids"]) == 32
    assert report["loss"] in ("nan", "inf")
    for part in (f"step {POISONED}", "nonfinite-step", "another --workdir"):
        assert part in str(error)


def test_goes_on_from_the_last_good_checkpoint(runs):
    workdir = runs[0]
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 13))
    assert all(np.isfinite(row.get("train/loss", 0.0)) for row in rows)
    starts = json.loads((workdir / "manifest.json").read_text())
    assert [start["resumed_from"] for start in starts] == [0, 6]


def test_the_manifest_knows_which_records_came(runs):
    """A digest of their names, batch after batch: of the interrupted run, what its loader gives
    without a stop. When a run ended stands there too, if it did."""
    broken, resumed = json.loads((runs[0] / "manifest.json").read_text())
    assert "finished" not in broken and "order_sha256" not in broken
    assert resumed["started"] <= resumed["finished"]
    config = digits_config.get_config("steps=12,every=3")

    def digest(seed):
        loader = datasets.open_train(config.data, None, batch_size=32, seed=seed)
        order = ""
        for _ in range(12):
            order = hashlib.sha256(f"{order}{next(loader).ids}".encode()).hexdigest()
        loader.close()
        return order

    assert resumed["order_sha256"] == digest(config.seed) != digest(config.seed + 1)


def test_a_gradient_may_be_infinite_where_the_loss_is_not(tmp_path):
    class Saved:
        def wait(self):
            self.waited = True

    run = object.__new__(loop._Run)
    run.workdir, run.saved = tmp_path, Saved()
    run._check_finite(3, {"loss": jnp.float32(1), "grad_norm": jnp.float32(2)}, ["a"])
    with pytest.raises(loop.TrainingError, match="grad_norm of step 4 is nan"):
        run._check_finite(4, {"loss": jnp.float32(1), "grad_norm": jnp.float32("nan")}, ["a", "b"])
    assert run.saved.waited
    assert json.loads((tmp_path / "nonfinite-step-4-process-0.json").read_text())["ids"] == [
        "a",
        "b",
    ]


def test_the_step_moves_nothing_by_itself(runs):
    """The transfer guard is on around each step: host arrays do not slip to the device unseen."""
    assert runs[-1]["transfers refused"] == 12 - 6


def test_a_failed_evaluation_loses_nothing(tmp_path):
    """The trained state is saved though no checkpoint was due; with the evaluation mended the run
    ends without another step, and its metrics are those of a run that never failed."""
    workdir = tmp_path / "run"
    config = digits_config.get_config("steps=3,every=100")
    config.optimizer.schedule.warmup = 1
    trained = []

    def counting(compile_step):
        def compiled(clock, experiment, arrays):
            trained.append(1)
            return compile_step(clock, experiment, arrays)

        return compiled

    def broken(evaluator, params):
        raise ValueError("a picture cannot be drawn")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Clock, "compiled", counting(loop._Clock.compiled))
        with patch.context() as also:
            also.setattr(Classification, "run", broken)
            for _ in range(2):  # it fails again, and no step is taken again
                with pytest.raises(ValueError, match="cannot be drawn"):
                    loop.train(config, workdir)
                assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["3"]
        config.evals = {"mended": config.evals.test}
        config.train.log_every = 2
        scores = loop.train(config, workdir)
        rows = read_metrics(workdir / "metrics.jsonl")
        assert loop.train(config, workdir) == scores  # there is nothing left to do
    assert len(trained) == 3
    assert rows == read_metrics(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 3]
    assert rows[-1] == {"step": 3} | scores and "eval/mended/top1" in scores
    first, again, last = json.loads((workdir / "manifest.json").read_text())
    assert first["changes"] == again["changes"] == [] and "finished" not in again
    assert last["resumed_from"] == 3 and "finished" in last
    assert {line.split(":")[0].strip() for line in last["changes"]} >= {
        "evals.mended.name",
        "evals.test.name",
        "train.log_every",
    }
