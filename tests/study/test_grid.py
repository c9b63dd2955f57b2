"""Grids: which arms there are, and what is said of those that cannot be."""

import dataclasses
from pathlib import Path

import pytest

from mmjax.study import Study, StudyError, load_study, plan
from mmjax.study.grid import arms_of, command, config_of
from mmjax.study.runs import make_run

ROOT = Path(__file__).resolve().parents[2]
DIGITS = "tests/experiments/digits_config.py"
STUDY = Study(
    config=DIGITS,
    axes={"batch": (16, 32), "width": {"a": {"model.mlp_width": 32}, "b": {"model.depth": 2}}},
    metric="eval/test/top1",
    rates=(1e-3, 1e-2),
    arguments={"steps": 8},
)


# A config of a vision-language model whose connector makes side x side tokens.
VLM = """
from ml_collections import ConfigDict
from mmjax.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, side=2, lr=1e-3)
    tower = dict(width=16, depth=1, heads=2, mlp_width=16, norm_eps=1e-6)
    return ConfigDict(dict(
        seed=0,
        evals=dict(x=dict(name="loss")),
        optimizer=dict(learning_rate=arg.lr),
        rules=dict(trainable=(("encoder/.*", False), (".*", True))),
        model=dict(
            name="vlm",
            encoder=dict(
                image_size=16, patch_size=4, activation="gelu", pooling="none",
                position="learned", **tower,
            ),
            connector=dict(name="pooling", grid=(arg.side, arg.side)),
            lm=dict(
                vocab_size=8, max_len=16, activation="silu", tied=True,
                rope=dict(theta=1e4), **tower,
            ),
            image_token=8,
            features=(-1,),
        ),
    ))
"""


def replace(**fields):
    return dataclasses.replace(STUDY, **fields)


def test_a_grid_and_its_configs():
    arms = plan(STUDY)
    assert [arm.name for arm in arms] == [
        "batch=16,width=a", "batch=16,width=b", "batch=32,width=a", "batch=32,width=b",
    ]  # fmt: skip
    config = config_of(command(STUDY, arms[1], rate=1e-2, seed=7, stage=None, start=None))
    assert (config.train.batch_size, config.model.depth, config.train.steps) == (16, 2, 8)
    assert (config.optimizer.learning_rate, config.seed) == (1e-2, 7)
    left = arms_of(replace(skip=({"batch": 16, "width": "b"}, {"width": "a"})))
    assert [arm.name for arm in left] == ["batch=32,width=b"]


def test_arms_may_differ_in_where_they_begin(tmp_path):
    file = tmp_path / "base.py"
    file.write_text(
        f"""
from mmjax import config as configs
from mmjax.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, source="a", lr=1e-3)
    config = configs.load({str(ROOT / DIGITS)!r})
    config.init = ((".*", arg.source, "x"),)
    return config
"""
    )
    study = Study(
        config=str(file), axes={"source": ("a", "b")}, metric="eval/test/top1", rates=(1e-3,)
    )
    assert [arm.name for arm in plan(study)] == ["source=a", "source=b"]


def test_arms_beside_the_grid():
    beside = {"deep": {"model.depth": 3, "batch": 64}}
    arms = plan(replace(beside=beside))
    assert arms[-1].name == "deep" and arms[-1].levels == {} and len(arms) == 5
    config = config_of(command(STUDY, arms[-1], rate=1e-2, seed=0, stage=None, start=None))
    assert (config.train.batch_size, config.model.depth) == (64, 3)
    with pytest.raises(StudyError, match=r"called like arms of it: batch=16,width=a\."):
        plan(replace(beside={"batch=16,width=a": {"model.depth": 3}}))
    with pytest.raises(StudyError, match="deep: its config is that of batch=16,width=b"):
        plan(replace(beside={"deep": {"batch": 16, "model.depth": 2}}))


def test_runs_that_come_before(tmp_path):
    study = load_study("configs/ablate/connectors.py")
    assert set(study.before) == {"encoder", "lm"}
    arguments = command(
        study, plan(study)[0], rate=1e-3, seed=0, stage=None, start=None, directory=tmp_path
    )
    assert f"encoder={tmp_path}/before/encoder/train,lm={tmp_path}/before/lm/train" in arguments[1]
    wrong = dataclasses.replace(study, before={"lm": "configs/lm/scenes.py:stpes=3"})
    with pytest.raises(StudyError, match=r"before 'lm': .*did you mean 'steps'.*Nothing has"):
        plan(wrong)


def test_stages_follow_each_other(tmp_path):
    study = Study(
        config="configs/llava/scenes.py",
        axes={"connector": ("align",)},
        metric="eval/scenes/accuracy",
        rates=(1e-3,),
        stages=("align", "tune"),
    )
    arguments = command(study, arms_of(study)[0], rate=1e-3, seed=1, stage="tune", start=tmp_path)
    assert arguments == [
        "--config",
        f"configs/llava/scenes.py:connector=align,lr=0.001,stage=tune,start={tmp_path}",
        "--config.seed=1",
    ]


def test_arms_may_differ_in_their_stages(tmp_path):
    study = Study(
        config="configs/llava/scenes.py",
        axes={"stages": {"one": {"stages": ("single",)}, "two": {"stages": ("align", "tune")}}},
        metric="eval/scenes/accuracy",
        rates=(1e-3,),
    )
    one, two = (make_run(study, arm, 1e-3, 0, tmp_path) for arm in arms_of(study))
    assert [name for name, _ in one.stages] == ["single"]
    assert [name for name, _ in two.stages] == ["align", "tune"]
    start = f"start={two.directory}/align"
    assert [start in arguments[1] for _, arguments in two.stages] == [False, True]
    assert "stages" not in " ".join(one.stages[0][1][1:])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (dict(axes={"btach": (1, 2)}), "did you mean 'batch'"),
        (dict(axes={"model.dept": (1, 2)}), "did you mean 'depth'"),
        (dict(axes={"steps": (8, 9)}, rate="rate"), "no argument 'rate'"),
        (dict(axes={"batch": (16, 32), "train.batch_size": (8,)}), r"its config is that of batch"),
        (dict(axes={"path": ("a,b",)}), "has a comma"),
        (dict(axes={}), "needs axes"),
        (dict(axes={"batch": ()}), "each axis a level"),
        (dict(rates=()), "give one or more"),
        (dict(seeds=0), "runs nothing"),
        (dict(skip=({"btach": 1},)), "did you mean 'batch'"),
        (
            dict(score="eval/tets/top1"),
            "no evaluator gives 'eval/tets/top1'; did you mean 'eval/te",
        ),
        (dict(contrasts={"c": ("batch=16,width=a", "batch=16")}), "contrast 'c': no arm is 'batch"),
    ],
)
def test_what_cannot_be_studied(fields, said):
    with pytest.raises(StudyError, match=said):
        plan(replace(**fields))


def test_what_connectors_cannot_meet_is_said_before_anything_runs(tmp_path):
    (tmp_path / "base.py").write_text(VLM)
    file = tmp_path / "base.py"
    study = Study(config=str(file), axes={"side": (2, 5, 6)}, metric="eval/x/y", rates=(1e-3,))
    with pytest.raises(StudyError) as error:
        plan(study)
    text = str(error.value)
    assert "2 of 3 arms cannot be studied" in text and "Nothing has been run" in text
    assert "side=5: " in text and "grid=(4, 4) is the nearest" in text
    assert "side=6: " in text


@pytest.mark.parametrize("file", sorted((ROOT / "configs/ablate").glob("[!_]*.py")))
def test_studies_of_this_repository_can_be_run(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    study = load_study(str(file))
    assert len(plan(study)) > 1 and study.seeds >= 3


@pytest.mark.parametrize(
    ("size", "arms"), [("", 17), ("smoke", 8), pytest.param("full", 8, marks=pytest.mark.slow)]
)
def test_the_study_of_connectors(size, arms, monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.chdir(ROOT)
    study = load_study(f"configs/ablate/connectors.py:{size}")
    found = plan(study)
    assert len(found) == arms
    assert {arm.settings["connector"] for arm in found} == set(study.axes["connector"])


def test_files_of_studies(tmp_path):
    assert load_study("tests/study/digits_study.py:seeds=2").seeds == 2
    file = tmp_path / "none.py"
    file.write_text("def get_study(arg):\n    return 1\n")
    with pytest.raises(StudyError, match=r"returns no mmjax\.study\.Study"):
        load_study(str(file))
    file.write_text("")
    with pytest.raises(ValueError, match=r"defines no function get_study\(arg\)"):
        load_study(str(file))
