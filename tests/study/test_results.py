"""What is read of finished runs, and what is measured of arms."""

import json

import pytest

from mmjax.study import Study, plan
from mmjax.study.grid import first_command
from mmjax.study.results import TOKENS, arm_costs, read_answers
from mmjax.study.runs import make_run
from mmjax.study.speed import measure
from tests.study.test_grid import ROOT, VLM

STUDY = Study(
    config="tests/experiments/digits_config.py",
    axes={"batch": (16, 32)},
    metric="eval/test/accuracy",
    rates=(1e-3,),
    seeds=2,
)


def finish(run, right, answers="test.jsonl"):
    workdir = run.directory / "train"
    workdir.mkdir(parents=True, exist_ok=True)
    run.finished.write_text("{}")
    (workdir / "config.json").write_text(json.dumps({"evals": {"test": {"answers": answers}}}))
    rows = [
        {
            "id": f"scenes/test#{i // 2}/{i % 2}",
            "group": "ab"[i % 2],
            "accuracy": value,
            "blind/accuracy": 0.5,
            "blind": "yes",
        }
        for i, value in enumerate(right)
    ]
    (workdir / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_answers_to_single_questions(tmp_path):
    arms = plan(STUDY)
    runs = [make_run(STUDY, arm, 1e-3, seed, tmp_path) for arm in arms for seed in (0, 1)]
    for run, right in zip(runs[:3], ([1, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 0.3]), strict=True):
        finish(run, right)
    found = read_answers(STUDY, runs, {arm.name: 1e-3 for arm in arms})
    assert found.scores["batch=16"].to_numpy().tolist() == [[1, 0, 1, 1], [0, 0, 1, 1]]
    assert found.scores["batch=32"].index.tolist() == [0]
    assert found.groups.tolist() == ["a", "b", "a", "b"]
    assert found.images.tolist() == ["scenes/test#0"] * 2 + ["scenes/test#1"] * 2
    assert found.controls["blind"]["batch=16"].to_numpy().tolist() == [[0.5] * 4] * 2
    assert "shuffled" not in found.controls
    # A question that one run lacks is left out for all.
    finish(runs[2], [1, 1, 1])
    shorter = read_answers(STUDY, runs, {arm.name: 1e-3 for arm in arms})
    assert shorter.scores["batch=16"].to_numpy().tolist() == [[1, 0, 1], [0, 0, 1]]
    assert shorter.images.index.tolist() == found.images.index[:3].tolist()
    # Of the arms' rates only, and where evaluators write them.
    assert read_answers(STUDY, runs, {}) is None
    finish(runs[3], [1, 1, 1, 1], answers=None)
    assert read_answers(STUDY, runs, {arm.name: 1e-3 for arm in arms}) is None


def test_costs_are_measured_side_by_side(tmp_path):
    file = tmp_path / "base.py"
    file.write_text(VLM)
    # Names that depend on the order of axes, and levels that JSON has no type for.
    axes = {"side": (1, 4), "model.features": ((-1,),)}
    study = Study(config=str(file), axes=axes, metric="eval/x/loss", rates=(1e-3,))
    arms = plan(study)
    measured, failures = measure({arm.name: first_command(study, arm) for arm in arms})
    few, many = (measured[arm.name] for arm in arms)
    assert few["prefill GFLOP"] < many["prefill GFLOP"] and not failures
    assert few["prefill MiB"] < many["prefill MiB"] and few["prefill ms"] > 0
    costs = arm_costs(study, arms)
    assert costs[TOKENS].tolist() == [1, 16]
    assert (costs["connector parameters"] == 16 * 16 + 16).all()
    # The encoder's: patches and positions, a block (norms, attention, MLP), the last norm.
    width = 16
    frozen = (4 * 4 * 3 * width + width) + 16 * width
    frozen += 2 * 2 * width + 4 * (width**2 + width) + 2 * (width**2 + width) + 2 * width
    assert (costs["parameters"] - costs["trained parameters"] == frozen).all()


def test_gated_blocks_are_parameters_of_the_connector(monkeypatch):
    monkeypatch.chdir(ROOT)
    study = Study(
        config="configs/connectors/scenes.py",
        axes={"connector": ("perceiver", "cross_attention"), "freeze": ("yes",)},
        metric="eval/test/accuracy",
        rates=(1e-3,),
        arguments={"tokens": 36},
    )
    costs = arm_costs(study, plan(study))
    assert (costs["connector parameters"] == costs["trained parameters"]).all()
    resampler, crossed = costs["connector parameters"]
    assert crossed == pytest.approx(resampler, rel=0.02)
