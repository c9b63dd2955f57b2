"""Configs: arguments, overrides, comparison; whatever is misspelt is named with the nearest."""

import dataclasses

import pytest
from ml_collections import ConfigDict

from mmjax import config as configs

FILE = """
from ml_collections import ConfigDict
from mmjax.config import parse_arg

def get_config(arg=None):
    arg = parse_arg(arg, size="S", res=48, lr=0.5, big=False)
    return ConfigDict(dict(
        seed=0, size=arg.size, note=None,
        train=dict(steps=arg.res, rate=arg.lr, betas=(0.9, 0.95), big=arg.big),
    ))
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "experiment.py"
    path.write_text(FILE)
    return str(path)


def test_arguments_take_the_type_of_their_defaults(file):
    config = configs.load(f"{file}:size=B,res=96,lr=2,big")
    assert (config.size, config.train.steps, config.train.rate, config.train.big) == (
        "B",
        96,
        2.0,
        True,
    )
    assert isinstance(config.train.rate, float)


def test_overrides(file):
    config = configs.load(
        file, ["train.steps=7", "train.betas=(0.8, 0.9)", "note=hello", "train.rate=1", "size=L"]
    )
    assert config.train.to_dict() == dict(steps=7, rate=1.0, betas=(0.8, 0.9), big=False)
    assert (config.note, config.size) == ("hello", "L")


@pytest.mark.parametrize(
    "spec, overrides, message",
    [
        (":sise=B", [], "no argument 'sise'; did you mean 'size'"),
        (":res=big", [], "argument 'res' must be of type int"),
        ("", ["trian.steps=3"], "did you mean 'train.steps'"),
        ("", ["train.stesp=3"], "did you mean 'train.steps'"),
        ("", ["sede=3"], "did you mean 'seed'"),
        ("", ["train.steps=3.5"], "must be of type int"),
        ("", ["train.steps=many"], "must be of type int"),
        ("", ["train.big=1"], "must be of type bool"),
        ("", ["train.betas=3"], "must be of type tuple"),
        ("", ["train=3"], "'train' is a group; override one of its keys: train.betas"),
        ("", ["train.steps"], "needs a value"),
        ("", ["train.steps.more=3"], "no key 'train.steps.more'"),
    ],
)
def test_mistakes_are_named_with_what_was_meant(file, spec, overrides, message):
    with pytest.raises(configs.ConfigError) as error:
        configs.load(file + spec, overrides)
    assert message in str(error.value)


def test_a_missing_file_names_the_nearest(file):
    with pytest.raises(configs.ConfigError, match=r"did you mean '.*experiment\.py'"):
        configs.load(file.replace("experiment", "experimint"))


def test_difference_shows_what_changed():
    old = configs.to_json(ConfigDict(dict(a=1, b=dict(c=(1, 2), d="x"), mesh=dict(data=1))))
    new = configs.to_json(ConfigDict(dict(a=1, b=dict(c=(1, 3), e="x"), mesh=dict(data=2))))
    assert configs.difference(old, new, ignore=("mesh",)) == [
        "  b.c: [1, 2] -> [1, 3]",
        "  b.d: 'x' -> '(absent)'",
        "  b.e: '(absent)' -> 'x'",
    ]
    assert configs.difference(old, old) == []


@dataclasses.dataclass(frozen=True)
class Inner:
    width: int


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner
    other: Inner | None = None
    name: str = "x"


@dataclasses.dataclass(frozen=True)
class Shape:
    size: int
    name: str = dataclasses.field(default="", init=False)


@dataclasses.dataclass(frozen=True)
class Circle(Shape):
    name: str = dataclasses.field(default="circle", init=False)


@dataclasses.dataclass(frozen=True)
class Ring(Circle):
    hole: int
    name: str = dataclasses.field(default="ring", init=False)


@dataclasses.dataclass(frozen=True)
class Line:
    length: int
    name: str = dataclasses.field(default="line", init=False)


@dataclasses.dataclass(frozen=True)
class Drawing:
    shape: Shape
    frame: Line
    other: Ring | Line | None = None


@pytest.mark.parametrize(
    "drawing",
    [
        Drawing(Circle(1), Line(2)),
        Drawing(Ring(3, 1), Line(2), Ring(4, 2)),
        Drawing(Ring(3, 1), Line(2), Line(5)),
    ],
)
def test_a_name_picks_a_dataclass(drawing):
    fields = ConfigDict(dataclasses.asdict(drawing))
    assert configs.dataclass_from(Drawing, fields, "config") == drawing
    del fields.frame["name"]  # there is no choice
    assert configs.dataclass_from(Drawing, fields, "config") == drawing


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(shape=dict(size=1)), "config.shape.name is missing. Valid: circle, ring."),
        (dict(shape=dict(name="circel", size=1)), "did you mean 'circle'"),
        (dict(shape=dict(name="line", length=1)), "config.shape.name='line' does not exist"),
        (dict(shape=dict(name="ring", size=1)), "config.shape.hole is missing"),
        (dict(shape=dict(name="circle", siez=1)), "config.shape.siez is unknown; did you mean"),
        (dict(other=dict(length=1)), "config.other.name is missing. Valid: line, ring."),
        (dict(frame=dict(name="ring", size=1, hole=1)), "config.frame.name='ring' does not exist"),
    ],
)
def test_names_that_pick_nothing(fields, message):
    whole = dict(shape=dict(name="circle", size=1), frame=dict(length=2))
    with pytest.raises(configs.ConfigError) as error:
        configs.dataclass_from(Drawing, {**whole, **fields}, "config")
    assert message in str(error.value)


def test_dataclasses_are_nested_and_strict():
    made = configs.dataclass_from(
        Outer, ConfigDict(dict(inner=dict(width=3), other=dict(width=4))), "config.model"
    )
    assert made == Outer(Inner(3), Inner(4))
    with pytest.raises(configs.ConfigError) as error:
        configs.dataclass_from(Outer, dict(iner=dict(width=3), nam="y"), "config.model")
    message = str(error.value)
    assert "config.model.iner is unknown; did you mean 'inner'?" in message
    assert "config.model.nam is unknown; did you mean 'name'?" in message
    assert "config.model.inner is missing" in message
