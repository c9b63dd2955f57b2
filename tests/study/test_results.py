"""What is read of finished runs, and what is measured of arms."""

import json

from mmjax.study import Study, plan
from mmjax.study.results import TOKENS, arm_costs, read_answers
from mmjax.study.runs import make_run
from mmjax.study.speed import measure
from tests.study.test_grid import VLM

STUDY = Study(
    config="tests/experiments/digits_config.py",
    axes={"batch": (16, 32)},
    metric="eval/validation/accuracy",
    score="eval/test/accuracy",
    rates=(1e-3,),
    seeds=2,
)


def finish(run, right, answers="test.jsonl"):
    workdir = run.directory / "train"
    workdir.mkdir(parents=True)
    run.finished.write_text("{}")
    (workdir / "config.json").write_text(json.dumps({"evals": {"test": {"answers": answers}}}))
    rows = [
        {"id": f"scenes/test#{i // 2}/{i % 2}", "group": "ab"[i % 2], "accuracy": value}
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
    # Of the arms' rates only, and where evaluators write them.
    assert read_answers(STUDY, runs, {}) is None
    finish(runs[3], [1, 1, 1, 1], answers=None)
    assert read_answers(STUDY, runs, {arm.name: 1e-3 for arm in arms}) is None


def test_costs_are_measured_side_by_side(tmp_path):
    file = tmp_path / "base.py"
    file.write_text(VLM)
    study = Study(config=str(file), axes={"side": (1, 4)}, metric="eval/x", rates=(1e-3,))
    arms = plan(study)
    few, many = (measure(study, arms, tmp_path)[arm.name] for arm in arms)
    assert few["prefill GFLOP"] < many["prefill GFLOP"]
    assert few["prefill MiB"] < many["prefill MiB"] and few["prefill ms"] > 0
    costs = arm_costs(study, arms)
    assert costs[TOKENS].tolist() == [1, 16]
    assert (costs["connector parameters"] == 16 * 16 + 16).all()
    # The encoder's: patches and positions, a block (norms, attention, MLP), the last norm.
    width = 16
    frozen = (4 * 4 * 3 * width + width) + 16 * width
    frozen += 2 * 2 * width + 4 * (width**2 + width) + 2 * (width**2 + width) + 2 * width
    assert (costs["parameters"] - costs["trained parameters"] == frozen).all()
