"""What a run leaves behind, and what can be done with it afterwards."""

import json
import shutil
import struct

import jax
import launch
import numpy as np
import pytest

from experiments import common, evaluate, train


def test_metrics(finished):
    """One row per logged step, one per evaluation, in order, nothing twice."""
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    training = [row for row in rows if "train/loss" in row]
    evaluations = [row for row in rows if any(key.startswith("eval/") for key in row)]
    assert [row["step"] for row in training] == list(range(1, 61))
    assert [row["step"] for row in evaluations] == [20, 40, 60]
    assert len(rows) == 63 and [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    needed = {"train/loss", "train/accuracy", "train/grad_norm", "train/learning_rate"}
    needed |= {"perf/steps_per_second", "perf/data_wait_share", "perf/model_tflops_per_device"}
    assert all(needed <= row.keys() for row in training)
    assert training[-1]["train/loss"] < training[0]["train/loss"]
    # The schedule: linear over 5 steps, and the cosine's end.
    assert training[0]["train/learning_rate"] == 0.0
    assert training[5]["train/learning_rate"] == pytest.approx(2e-3)


def test_manifest(finished):
    (start,) = json.loads((finished / "manifest.json").read_text())
    assert start["resumed_from"] == 0 and start["seed"] == 0 and start["changes"] == []
    assert start["packages"]["jax"] == jax.__version__
    assert start["data"]["lengths"] == [1438]
    for name in ("config_sha256", "parameters_sha256"):
        assert len(start[name]) == 64


def test_tensorboard(finished):
    """The event file holds the same values, step for step."""
    from tensorboardX.proto import event_pb2

    (file,) = (finished / "tensorboard").iterdir()
    data, place, losses = file.read_bytes(), 0, {}
    while place < len(data):
        (length,) = struct.unpack_from("<Q", data, place)
        event = event_pb2.Event.FromString(data[place + 12 : place + 12 + length])
        place += length + 16
        for value in event.summary.value:
            if value.tag == "train/loss":
                losses[event.step] = value.simple_value
    logged = [row for row in launch.rows(finished) if "train/loss" in row]
    wanted = {row["step"]: row["train/loss"] for row in logged}
    assert losses == pytest.approx(wanted)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def here(main, *argv: str) -> int:
    """A command within this process, on its 8 devices; its exit code."""
    with pytest.raises(SystemExit) as left:
        common.run(lambda _: main([*argv, "--config.mesh.data=8"]))
    return left.value.code


def test_a_finished_run_has_nothing_to_do(finished, caplog):
    caplog.set_level("INFO")
    before = contents(finished)
    config = ("--config", str(launch.ROOT / launch.CONFIG), "--workdir", str(finished))
    assert here(train.main, *config) == 0
    assert contents(finished) == before
    assert "nothing is left to do" in caplog.text and "eval/test/top1" in caplog.text


def test_a_run_killed_before_its_manifest_says_so_is_finished(finished, tmp_path):
    """Its last checkpoint is there, and nothing is left to do but that line."""
    workdir = shutil.copytree(finished, tmp_path / "run")
    whole = json.loads((workdir / "manifest.json").read_text())
    cut = [{k: v for k, v in one.items() if k not in ("finished", "order_sha256")} for one in whole]
    (workdir / "manifest.json").write_text(json.dumps(cut))
    config = ("--config", str(launch.ROOT / launch.CONFIG), "--workdir", str(workdir))
    assert here(train.main, *config) == 0
    again = json.loads((workdir / "manifest.json").read_text())
    assert again[-1]["order_sha256"] == whole[-1]["order_sha256"] and "finished" in again[-1]


def test_evaluate_gives_the_last_scores(finished, tmp_path, capfd):
    before = contents(finished)
    config = ("--config", str(launch.ROOT / launch.CONFIG), "--workdir", str(finished))
    assert here(evaluate.main, *config, "--output", str(tmp_path)) == 0
    scores = json.loads((tmp_path / "evaluation-60.json").read_text())
    last = launch.rows(finished)[-1]
    assert scores == pytest.approx(last, rel=1e-5)
    assert "top1" in capfd.readouterr().out
    assert contents(finished) == before


def test_a_locked_tower_from_another_run(finished, tmp_path, cache):
    """LiT: the image tower of the classifier, its averages, stays as it is bit for bit."""
    workdir = tmp_path / "run"
    launch.train(
        "task=siglip,steps=12,every=12",
        workdir,
        f"--config.init=(('image/(.*)', {str(finished)!r}, r'\\1'),)",
        "--config.rules.trainable=(('image/.*', False), ('.*', True))",
        cache=cache,
    )
    tuned, source = launch.parameters(workdir), launch.parameters(finished)
    assert tuned["frozen"] and not any(path.startswith("image/") for path in tuned["trainable"])
    for path, value in tuned["frozen"].items():
        np.testing.assert_array_equal(value, source["ema"][path.removeprefix("image/")])
    losses = [row["train/loss"] for row in launch.rows(workdir) if "train/loss" in row]
    assert losses[-1] < losses[0]


def test_a_tower_of_another_size(finished, tmp_path, capfd):
    config = f"{launch.ROOT / launch.CONFIG}:task=siglip"
    code = here(
        train.main,
        *("--config", config, "--workdir", str(tmp_path / "run")),
        f"--config.init=(('image/(.*)', {str(finished)!r}, r'\\1'),)",
        "--config.model.image.mlp_width=128",
    )
    output = capfd.readouterr().err
    assert code == 1 and "image.mlp_width: 128 here, 64 there" in output
