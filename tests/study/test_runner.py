"""Running studies: rates, seeds, failures, interruptions. The runs are imitated, but in the last
tests."""

import concurrent.futures
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from mmjax import config as configs
from mmjax.study import Local, Study, StudyError, run_study, runner
from mmjax.study.grid import config_of

ROOT = Path(__file__).resolve().parents[2]
STUDY = Study(
    config="tests/experiments/digits_config.py",
    axes={"batch": (16, 32, 64)},
    metric="eval/test/top1",
    rates=(1e-3, 1e-2),
    seeds=3,
)


class Imitation:
    """Instead of processes: a score for each arm, rate and seed, in the order they are run."""

    def __init__(self, broken=(), stop_after=None):
        self.broken, self.stop_after = broken, stop_after
        self.called = []

    def call(self, arguments, log, cache, slot):
        text = arguments[arguments.index("--config") + 1]
        workdir = Path(arguments[arguments.index("--workdir") + 1])
        config = config_of(arguments[2:-2])
        if "lr=" not in text:  # comes before the arms
            self.called.append(text)
            if "before" in self.broken:
                log.write_text("error: it cannot be\n")
                return 1
            self.finish(workdir, 0, [], config)
            return 0
        batch, rate = re.search(r"batch=(\d+),lr=([\d.e-]+)", text).groups()
        seed = re.search(r"--config.seed=(\d+)", " ".join(arguments))[1]
        name = (int(batch), float(rate), int(seed))
        if self.stop_after == len(self.called):
            raise KeyboardInterrupt
        self.called.append(name)
        if name in self.broken or name[:1] in self.broken:
            log.write_text("step 1\nTraceback (most recent call last):\nerror: it cannot be\n")
            return 1
        # The larger batch likes the larger rate.
        score = 0.5 + 0.1 * (float(rate) > 5e-3) * (1 if int(batch) > 16 else -1) + 0.01 * int(seed)
        rows = [
            {"step": 1, "train/loss": 1.0},
            {"step": 2, "eval/test/top1": score, "eval/other/top1": 1 - score},
        ]
        self.finish(workdir, seed, rows, config)
        return 0

    @staticmethod
    def finish(workdir, seed, rows, config):
        workdir.mkdir(parents=True, exist_ok=True)
        digests = {"config_sha256": "c", "parameters_sha256": "p", "order_sha256": str(seed)}
        facts = {"code": "x", "devices": ["1 x cpu"], "packages": {}}
        (workdir / "manifest.json").write_text(json.dumps([digests | facts]))
        (workdir / "config.json").write_text(configs.to_json(config))
        (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def start(self):
        pass

    def stop(self):
        pass


def run(directory, monkeypatch, study=STUDY, **options):
    imitation = Imitation(**options)
    monkeypatch.setattr(runner, "_CHILDREN", imitation)
    said = []
    try:
        failures = run_study(study, directory, Local(()), said.append)
    except KeyboardInterrupt:
        failures = None
    return failures, imitation.called, said


def tables(directory):
    return pd.read_csv(directory / "rows.csv"), pd.read_csv(directory / "summary.csv")


def test_rates_then_seeds(tmp_path, monkeypatch):
    failures, called, _ = run(tmp_path, monkeypatch)
    assert failures == {}
    search = [(b, r, 0) for b in (16, 32, 64) for r in (1e-3, 1e-2)]
    best = {16: 1e-3, 32: 1e-2, 64: 1e-2}
    assert called == search + [(b, best[b], s) for b in (16, 32, 64) for s in (1, 2)]
    rows, summary = tables(tmp_path)
    assert len(rows) == 12
    stored = pd.read_parquet(tmp_path / "rows.parquet").astype({"batch": int, "order": int})
    pd.testing.assert_frame_equal(stored, rows, check_dtype=False)
    assert summary.rate.tolist() == [1e-3, 1e-2, 1e-2] and (summary.seeds == 3).all()
    assert summary["eval/test/top1/mean"].tolist() == pytest.approx([0.51, 0.61, 0.61])
    assert summary["eval/test/top1/std"].tolist() == pytest.approx([0.01] * 3)
    report = (tmp_path / "report.md").read_text()
    assert "| batch=32 | 0.01 (highest) | 3 | 0.61 ± 0.01 |" in report
    # Again there is nothing to do.
    assert run(tmp_path, monkeypatch)[:2] == ({}, [])


def test_an_interrupted_study_ends_with_the_same_tables(tmp_path, monkeypatch):
    run(tmp_path / "whole", monkeypatch)
    for stop in (0, 3, 3, 3):
        assert run(tmp_path / "parts", monkeypatch, stop_after=stop)[0] is None
    run(tmp_path / "parts", monkeypatch)
    clocks = ["seconds"]
    for number in (0, 1):
        one, other = (tables(tmp_path / name)[number] for name in ("parts", "whole"))
        pd.testing.assert_frame_equal(
            one.drop(columns=clocks, errors="ignore"), other.drop(columns=clocks, errors="ignore")
        )
    one, other = ((tmp_path / name / "report.md").read_text() for name in ("parts", "whole"))
    assert without_seconds(one) == without_seconds(other)


def without_seconds(report):
    """The table of costs says how long runs took."""
    return re.sub(r"## Costs.*?(?=\n!\[|\n## )", "", report, flags=re.S)


def with_another_score(directory, more=""):
    """A config with a further evaluator."""
    file = directory / "base.py"
    file.write_text(
        f"""
from mmjax import config as configs


def get_config(arg=None):
    config = configs.load({str(ROOT / STUDY.config)!r} + (":" + arg if arg else ""))
    with config.unlocked():
        config.evals.other = config.evals.test
    {more}
    return config
"""
    )
    return str(file)


def test_arms_are_compared_by_another_score(tmp_path, monkeypatch):
    study = dataclasses.replace(STUDY, config=with_another_score(tmp_path), score="eval/other/top1")
    run(tmp_path / "study", monkeypatch, study)
    assert tables(tmp_path / "study")[1].rate.tolist() == [1e-3, 1e-2, 1e-2]  # as before
    report = (tmp_path / "study" / "report.md").read_text()
    # Of the seeds 0 to 2: 0.5 + 0.1 - 0.02 is not the best now.
    assert "| batch=16 | 0.001 (lowest) | 3 | 0.49 ± 0.01 |" in report
    assert report.index("| batch=16 |") < report.index("| batch=32 |")


def test_what_comes_before(tmp_path, monkeypatch):
    study = dataclasses.replace(STUDY, before={"batch": "configs/vit/digits.py:steps=1"})
    with pytest.raises(StudyError, match="All arms need runs that failed"):
        run(tmp_path, monkeypatch, study, broken=("before",))
    # An argument that the arms set themselves is theirs.
    _, called, _ = run(tmp_path, monkeypatch, study)
    assert called[:2] == ["configs/vit/digits.py:steps=1", (16, 1e-3, 0)]
    assert run(tmp_path, monkeypatch, study)[:2] == ({}, [])


def test_what_fails_does_not_stop_the_rest(tmp_path, monkeypatch):
    """One arm at every rate, another at its better one."""
    failures, called, _ = run(tmp_path, monkeypatch, broken=((16,), (32, 1e-2, 0)))
    assert set(failures) == {
        "batch=16/lr=0.001/seed=0", "batch=16/lr=0.01/seed=0", "batch=32/lr=0.01/seed=0",
    }  # fmt: skip
    assert all(
        "exit code 1" in text and "error: it cannot be" in text for text in failures.values()
    )
    assert (32, 1e-3, 2) in called and (64, 1e-2, 2) in called
    _, summary = tables(tmp_path)
    assert summary.arm.tolist() == ["batch=32", "batch=64"]
    report = (tmp_path / "report.md").read_text()
    assert "3 failed" in report and "error: it cannot be" in report
    # What failed is tried again.
    failures, called, _ = run(tmp_path, monkeypatch)
    assert failures == {} and called[:3] == [(16, 1e-3, 0), (16, 1e-2, 0), (32, 1e-2, 0)]
    assert tables(tmp_path)[1].arm.tolist() == ["batch=16", "batch=32", "batch=64"]


def test_a_directory_of_another_study(tmp_path, monkeypatch):
    run(tmp_path / "a", monkeypatch)
    for fields, said in (
        (dict(rates=(1e-3,)), r"rates: \[0.001, 0.01\] there, \[0.001\] here"),
        (dict(seeds=2), "seeds: 3 there, 2 here"),
        (dict(axes={"batch": (16, 32)}), "axes: "),
    ):
        with pytest.raises(StudyError, match=said):
            run(tmp_path / "a", monkeypatch, study=dataclasses.replace(STUDY, **fields))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("mine")
    with pytest.raises(StudyError, match="holds no study"):
        run(tmp_path / "b", monkeypatch)
    unknown = dataclasses.replace(STUDY, metric="eval/test/top2")
    with pytest.raises(StudyError, match="did you mean 'eval/test/top1'"):
        run(tmp_path / "c", monkeypatch, study=unknown)


def test_a_study_goes_on_with_more_seeds_and_rates(tmp_path, monkeypatch):
    run(tmp_path, monkeypatch)
    more = dataclasses.replace(STUDY, seeds=4, rates=(1e-4, *STUDY.rates))
    failures, called, _ = run(tmp_path, monkeypatch, study=more)
    # The smallest batch likes small rates alike, and its first is the best then.
    assert failures == {} and [name for name in called if name[2] == 0] == [
        (16, 1e-4, 0), (32, 1e-4, 0), (64, 1e-4, 0),
    ]  # fmt: skip
    assert [name for name in called if name[0] == 32 and name[2]] == [(32, 1e-2, 3)]
    with pytest.raises(StudyError, match="seeds: 4 there, 3 here"):
        run(tmp_path, monkeypatch)


def test_finished_runs_of_another_config(tmp_path, monkeypatch):
    """A report must not mix them."""
    study = dataclasses.replace(STUDY, config=with_another_score(tmp_path))
    run(tmp_path / "study", monkeypatch, study, stop_after=5)
    with_another_score(tmp_path, "config.model.depth = 7")
    with pytest.raises(StudyError, match=r"(?s)5 finished runs .*model.depth: \d -> 7.*Undo that"):
        run(tmp_path / "study", monkeypatch, study)
    with_another_score(tmp_path)
    assert len(run(tmp_path / "study", monkeypatch, study)[1]) == 7


def test_all_jobs_are_cancelled(tmp_path, monkeypatch):
    """Those of a cluster would go on, the one that is waited for too."""

    class Job:
        cancelled = False

        def result(self):
            raise KeyboardInterrupt

        def cancel(self):
            self.cancelled = True

    class Cluster:
        def __init__(self):
            self.jobs = []

        def submit(self, function, *args):
            self.jobs.append(Job())
            return self.jobs[-1]

    cluster = Cluster()
    with pytest.raises(KeyboardInterrupt):
        run_study(STUDY, tmp_path, cluster, lambda text: None)
    assert len(cluster.jobs) == 6 and all(job.cancelled for job in cluster.jobs)


def test_jobs_that_submitit_starts(tmp_path, monkeypatch):
    """Its own way to run jobs here, which pickles them as for a cluster."""
    submitit = pytest.importorskip("submitit")
    monkeypatch.setattr(runner, "_CHILDREN", Imitation())
    executor = runner.slurm(STUDY, tmp_path, cluster="debug")
    assert isinstance(executor, submitit.AutoExecutor)
    assert run_study(STUDY, tmp_path, executor, lambda text: None) == {}
    assert len(tables(tmp_path)[0]) == 12


def test_one_process_a_device():
    local = Local(("3", "GPU-5"))
    seen = [local.submit(lambda slot: slot.device) for _ in range(8)]
    assert {job.result() for job in concurrent.futures.as_completed(seen)} <= {"3", "GPU-5"}
    assert Local(()).submit(lambda slot: slot).result() == runner.Slot()


def test_several_processes_share_a_device_or_the_cores():
    slots = runner._slots(("3", "5"), 3)
    assert [slot.device for slot in slots] == ["3", "5"] * 3
    assert {slot.memory for slot in slots} == {0.3}
    cores = os.sched_getaffinity(0)
    shares = [slot.cores for slot in runner._slots((), len(cores))]
    assert set().union(*shares) == cores and sum(map(len, shares)) == len(cores)
    with pytest.raises(StudyError, match="as many cores"):
        Local((), len(cores) + 1)
    with pytest.raises(StudyError, match="runs nothing"):
        Local((), 0)


def ablate(workdir, arg):
    return [
        sys.executable, "-m", "experiments.ablate",
        "--study", f"tests/study/digits_study.py:{arg}", "--workdir", str(workdir),
    ]  # fmt: skip


@pytest.mark.slow
def test_a_real_study_with_an_arm_that_fails(tmp_path):
    done = subprocess.run(
        ablate(tmp_path / "study", "broken"), cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "width=broken" in done.stdout and "adamx" in done.stdout
    rows, summary = tables(tmp_path / "study")
    assert set(summary.arm) == {"width=narrow", "width=wide"}
    assert rows["eval/test/top1"].between(0, 1).all()


@pytest.mark.slow
def test_a_real_study_that_is_killed(tmp_path):
    subprocess.run(ablate(tmp_path / "whole", "seeds=2,rates=2"), cwd=ROOT, check=True)
    process = subprocess.Popen(ablate(tmp_path / "parts", "seeds=2,rates=2"), cwd=ROOT)
    for number in (signal.SIGKILL, signal.SIGTERM):
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(25)
        process.send_signal(number)
        process.wait(120)
        process = subprocess.Popen(ablate(tmp_path / "parts", "seeds=2,rates=2"), cwd=ROOT)
    assert process.wait(300) == 0
    whole, parts = (tables(tmp_path / name)[0] for name in ("whole", "parts"))
    columns = [name for name in whole if not name.startswith(("perf/", "seconds"))]
    pd.testing.assert_frame_equal(whole[columns], parts[columns])


@pytest.mark.slow
def test_the_smallest_study_of_connectors(tmp_path):
    command = [
        sys.executable, "-m", "experiments.ablate", "--processes", "2",
        "--study", "configs/ablate/connectors.py:smoke", "--workdir", str(tmp_path / "study"),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows, _ = tables(tmp_path / "study")
    assert len(rows) == rows.arm.nunique() == 8 and rows.order.nunique() == 1
    costs = json.loads((tmp_path / "study" / "costs.json").read_text())["arms"]
    assert set(costs) == set(rows.arm)
    report = (tmp_path / "study" / "report.md").read_text()
    for title in ("Arms", "Groups of questions", "Controls", "Costs", "At equal visual tokens"):
        assert f"## {title}" in report
    assert "At equal connector parameters" in report and "same records" in report
