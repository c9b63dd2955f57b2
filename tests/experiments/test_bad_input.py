"""Whatever is wrong, the commands say so and what to do, and harm nothing."""

import json
import os
import resource
import shutil
import subprocess
import sys

import launch
import numpy as np
import pytest
from PIL import Image

from experiments import common, evaluate, train


@pytest.fixture
def attempt(tmp_path, capfd):
    """Run a command within this process; returns what it says. It must fail with exit code 1."""

    def run(arg: str, *extra: str, main=train.main, workdir=tmp_path / "run", code: int = 1) -> str:
        config = str(launch.ROOT / launch.CONFIG)
        argv = ["--config", f"{config}:{arg}", "--workdir", str(workdir)]
        # The tests have 8 devices; one does for these.
        argv += [] if any("mesh" in item for item in extra) else ["--config.mesh.data=8"]
        with pytest.raises(SystemExit) as left:
            common.run(lambda _: main([*argv, *extra]))
        output = capfd.readouterr()
        assert left.value.code == code, output.err
        assert "Traceback" not in output.err
        return output.err

    return run


@pytest.mark.parametrize(
    "arg, extra, expected",
    [
        ("", ["--config.train.stpes=3"], ["train.stpes", "did you mean 'train.steps'"]),
        ("", ["--config.optimiser.name=sgd"], ["did you mean 'optimizer.name'"]),
        ("", ["--config.train.steps=many"], ["must be of type int"]),
        ("", ["--worksdir=x"], ["Unknown argument", "--workdir"]),
        ("stesp=3", [], ["no argument 'stesp'", "did you mean 'steps'"]),
        ("", ["--config.optimizer.name=adamv"], ["did you mean 'adamw'"]),
        ("", ["--config.optimizer.schedule.name=cosin"], ["did you mean 'cosine'"]),
        ("", ["--config.model.pooling=mapp"], ["mapp", "map"]),
        ("", ["--config.task.name=clasification"], ["did you mean 'classification'"]),
        ("", ["--config.evals.test.name=clasification"], ["did you mean 'classification'"]),
        ("", ["--config.evals.test.every=0"], ["config.evals.test.every"]),
        ("", ["--config.checkpoint.every=0"], ["checkpoint.every must be at least 1"]),
        ("", ["--config.checkpoint.best=eval/tets/top1"], ["checkpoint.best", "eval/test/"]),
        ("", ["--config.mesh.data=3"], ["data=3", "8 device(s)", "config.mesh"]),
        ("batch=30", [], ["batch of 30", "Nearest train.batch_size: 24 or 32"]),
        ("", ["--config.rules.trainable=(('image/.*', True),)"],
         ["no row covers parameter 'head/kernel'", "matches no parameter"]),
        ("", ["--config.rules.weight_decay=(('.*', 0.0), ('head/kernel', 1.0))"],
         ["decides nothing"]),
        ("", ["--config.rules.trainable=(('.*', False),)"], ["nothing is left to train"]),
        ("batch=1600", [], ["1438 records", "lower train.batch_size"]),
        ("source=folder,path=/nowhere", [], ["/nowhere"]),
        ("source=table,path=/nowhere.csv", [], ["/nowhere.csv"]),
        ("task=siglip", ["--config.model.text.vocab_size=4"],
         ["The tokenizer has", "Set config.model.text.vocab_size"]),
        ("", ["--config.init=(('head/.*', '/nowhere', 'head/.*'),)"],
         ["no checkpoint in /nowhere", "Train that run first"]),
        ("", ["--config.init=(('laiers/.*', '/nowhere', ''),)"],
         ["matches no parameter", "mlp/up/kernel"]),
        ("", ["--config.init=('head/.*', '/nowhere', 'head/.*')"],
         ["'head/.*' of config.init is not (pattern", "three strings"]),
        ("", ["--config.rules.trainable=(('head/.*', True), ('.*', 'no'))"], ["True or False"]),
        ("", ["--config.lora=dict(rank=x)"], ["config.lora must be a group of keys"]),
        ("", ["--config.model.widht=8"], ["config.model.widht is unknown; did you mean 'width'"]),
        ("", ["--processes=2"], ["--coordinator HOST:PORT", "would train alone"]),
    ],
)  # fmt: skip
def test_config(attempt, arg, extra, expected):
    output = attempt(arg, *extra)
    for part in expected:
        assert part in output


def write_digits(folder, count, broken=()):
    """A CSV of PNG files; some of them cut short."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    lines = ["image,label,text"]
    for index in range(count):
        path = folder / f"{index}.png"
        pixels = (digits.images[index] * 15).astype(np.uint8)
        Image.fromarray(pixels).convert("RGB").save(path)
        if index in broken:
            path.write_bytes(path.read_bytes()[:60])
        lines.append(f"{path.name},{digits.target[index]},digit {digits.target[index]}")
    (folder / "digits.csv").write_text("\n".join(lines) + "\n")
    return folder / "digits.csv"


def test_data(attempt, tmp_path):
    table = write_digits(tmp_path, 40)
    output = attempt(f"source=table,path={table}", "--config.data.train.image.field=picture")
    assert "picture" in output and "image" in output
    output = attempt(f"source=table,path={table}", "--config.evals.test.data.label.field=lable")
    assert "did you mean 'label'" in output
    # Nothing was trained there: another config may have the directory.
    empty = tmp_path / "empty.csv"
    empty.write_text("image,label\n")
    output = attempt(f"source=table,path={empty}")
    assert "empty.csv" in output


def test_a_broken_image_among_good_ones(tmp_path, cache):
    """Skipped, counted and named; the run goes on."""
    table = write_digits(tmp_path, 300, broken=[7])
    workdir = tmp_path / "run"
    arg = f"source=table,path={table},steps=10,every=5"
    output = launch.train(arg, workdir, cache=cache)
    assert "Skipped" in output and "7.png" in output
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert rows[-2]["step"] == 10 and sum(row.get("perf/skipped_records", 0) for row in rows) > 0


def test_too_many_broken_images(tmp_path, cache):
    table = write_digits(tmp_path, 100, broken=range(10, 30))
    workdir = tmp_path / "run"
    arg = f"source=table,path={table},steps=10,every=5"
    output = launch.train(arg, workdir, cache=cache, expect=1)
    assert "max_bad_share" in output and ".png" in output and "Traceback" not in output


def snapshot(workdir):
    """What is saved. A refused command may touch the lock file, and nothing else."""
    return {
        str(path): path.read_bytes()
        for path in sorted(workdir.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def test_another_config_is_refused(attempt, finished):
    before = snapshot(finished)
    output = attempt("lr=0.5", workdir=finished)
    assert "optimizer.learning_rate: 0.002 -> 0.5" in output and "another --workdir" in output
    assert snapshot(finished) == before


def test_a_directory_that_is_no_run(attempt, tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a").write_text("dear")
    assert "holds no run" in attempt("", workdir=tmp_path / "letters")
    assert "is a file" in attempt("", workdir=tmp_path / "letters" / "a")
    assert [path.name for path in (tmp_path / "letters").iterdir()] == ["a"]
    output = attempt("", main=evaluate.main, workdir=tmp_path / "letters")
    assert "holds no run" in output and "experiments.train" in output


def test_a_second_process(attempt, tmp_path, cache):
    workdir = tmp_path / "run"
    process = launch.start("steps=5000,every=5000", workdir, cache=cache)
    assert launch.wait_for(lambda: launch.last_step(workdir) >= 2, [process])
    output = attempt("steps=5000,every=5000", workdir=workdir)
    assert "Another process is running" in output
    assert process.poll() is None
    process.kill()
    process.wait()


def test_damaged_last_checkpoint(tmp_path, finished, cache):
    """The one before is used, the run ends as it had, and the damaged one is still there."""
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    for file in (workdir / "checkpoints" / "60" / "state").glob("**/d/*"):
        file.write_bytes(file.read_bytes()[:-100])
    output = launch.train("", workdir, cache=cache)
    assert "step 60 was moved" in output and "Resuming from step 50" in output
    assert launch.rows(workdir) == launch.rows(finished)
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"50", "60", "corrupt-60"}


def test_full_disk(tmp_path, finished, cache):
    workdir = tmp_path / "run"
    process = launch.start("", workdir, cache=cache)
    assert launch.wait_for(lambda: launch.last_step(workdir) >= 12, [process])
    process.terminate()
    launch.finish(process)
    saved = snapshot(workdir / "checkpoints")
    # What it prints goes into a pipe: a file would be cut off at the limit, too.
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = launch.start("", workdir, cache=cache, **pipes)
    # Less than a checkpoint, more than everything else; the error is that of an exceeded quota.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (60_000, 60_000))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "could not be written" in output and "Free space" in output
    kept = snapshot(workdir / "checkpoints")
    assert all(kept[name] == content for name, content in saved.items())
    launch.train("", workdir, cache=cache)
    assert launch.rows(workdir) == launch.rows(finished)


@pytest.mark.slow
def test_really_full_disk(tmp_path, finished, cache):
    """The same on a small file system of its own, where this machine allows one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)])
    if mounted.returncode:
        pytest.skip("mounting a file system is not permitted")
    try:
        workdir = disk / "run"
        # What the run prints goes elsewhere.
        (disk / "run.log").symlink_to(tmp_path / "run.log")
        options = dict(cache=cache)
        process = launch.start("", workdir, **options)
        assert launch.wait_for(lambda: launch.last_step(workdir) >= 12, [process])
        process.terminate()
        launch.finish(process)
        filler = disk / "filler"
        with pytest.raises(OSError), open(filler, "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        os.truncate(filler, filler.stat().st_size - 8192)
        output = launch.train("", workdir, expect=1, **options)
        assert "full" in output or "could not be written" in output
        filler.unlink()
        launch.train("", workdir, **options)
        assert launch.rows(workdir) == launch.rows(finished)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_exit_code_of_the_command():
    """As a process of its own, seen from outside."""
    done = subprocess.run(
        f"{sys.executable} -m experiments.train --config configs/vit/digist.py --workdir run",
        cwd=launch.ROOT,
        env=launch.environment(1, None),
        capture_output=True,
        text=True,
        shell=True,
    )
    assert done.returncode == 1 and "did you mean 'configs/vit/digits.py'" in done.stderr
    assert not (launch.ROOT / "run").exists()
