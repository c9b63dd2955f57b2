"""Configs: arguments, overrides, comparison; whatever is misspelt is named with the nearest."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from ml_collections import ConfigDict

from experiments import common
from mmjax import config as configs

FILE = """
from ml_collections import ConfigDict
from mmjax.config import parse_arg

def get_config(arg=None):
    arg = parse_arg(arg, size="S", res=48, lr=0.5, big=False)
    return ConfigDict(dict(
        seed=0, size=arg.size, note=None,
        train=dict(steps=arg.res, rate=arg.lr, betas=(0.9, 0.95), big=arg.big),
        model=dict(name="vit", width=8),
        data=dict(train=dict(sources=[dict(name="json", path="a"), dict(name="json", path="b")])),
        optimizer=dict(name="adamw", options={}),
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


def test_overrides_of_entries_and_groups(file):
    config = configs.load(
        file,
        [
            "data.train.sources.1.path=c",
            "optimizer.options={'b2': 0.5}",
            "note=dict(rank=4, targets='.*')",
            "model.dtype=bfloat16",  # the config leaves it at its default
            "model.depth=3",
        ],
    )
    assert [source["path"] for source in config.data.train.sources] == ["a", "c"]
    assert config.optimizer.to_dict() == dict(name="adamw", options=dict(b2=0.5))
    assert config.note.to_dict() == dict(rank=4, targets=".*")
    assert config.model.to_dict() == dict(name="vit", width=8, dtype="bfloat16", depth=3)
    assert config.is_locked and config.note.is_locked and config.optimizer.options.is_locked


def test_what_is_no_literal_stays_text(file):
    for text in ("dict(rank=x)", "list()", "dict(4)", "a b"):
        assert configs.load(file, [f"note={text}"]).note == text


def test_a_mistake_names_a_few_keys_only(file):
    with pytest.raises(configs.ConfigError) as error:
        configs.load(file, ["tain.rate=1"])
    assert str(error.value) == "The config has no key 'tain.rate'; did you mean 'train.rate'?"


def test_a_file_describes_itself(file):
    Path(file).write_text(f'"""Cats and dogs."""\n{FILE}')
    text = configs.describe(f"{file}:size=B")
    assert text.startswith("Cats and dogs.") and text.endswith("size=S, res=48, lr=0.5, big=False")


def test_help_shows_the_commands_and_the_arguments_of_the_file(file, capsys):
    parser = common.parser("What it does.\n\n    python -m one\n    python -m two")
    with pytest.raises(SystemExit) as left:
        common.parse(parser, ["--config", file, "--help"])
    output = capsys.readouterr().out
    assert left.value.code == 0
    assert "\n    python -m one\n    python -m two\n" in output
    assert "size=S, res=48, lr=0.5, big=False" in output


def test_processes_need_to_find_each_other(file):
    argv = ["--config", file, "--workdir", "x", "--processes", "2", "--process", "0"]
    with pytest.raises(configs.ConfigError, match="--coordinator HOST:PORT"):
        common.parse(common.parser(""), argv)


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
        ("", ["optimizer.options=3"], "give the whole group, as in --config.optimizer.options={"),
        ("", ["data.train.sources.2.path=c"], "'data.train.sources' has 2 entries"),
        ("", ["data.train.sources.path=c"], "'data.train.sources' has 2 entries"),
        ("", ["data.train.sources.1=c"], "'data.train.sources.1' is a group"),
        ("", ["data.train.sources.0.name.x=c"], "no key 'data.train.sources.0.name.x'"),
        ("", ["zoo=3"], "the keys of a config are data, model, note, optimizer, seed"),
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


@dataclasses.dataclass(frozen=True)
class Typed:
    count: int = 1
    share: float = 0.5
    flag: bool = False
    word: str | None = None
    pair: tuple[int, int] = (1, 2)
    sizes: tuple[int, ...] | int = ()
    table: Sequence[tuple[str, Any]] = ()
    kind: Literal["a", "b"] = "a"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    inner: Inner | None = None
    anything: Any = None


@pytest.mark.parametrize(
    "fields",
    [
        dict(share=1, word="x", sizes=(1, 2, 3), table=((".*", True), ("a", "b"))),
        dict(share=float("inf"), word=None, sizes=4, pair=[3, 4], kind="b"),
        dict(options={"b2": 1}, inner=dict(width=3), anything=object()),
    ],
)
def test_values_of_the_annotated_types(fields):
    made = configs.dataclass_from(Typed, ConfigDict(fields), "config.typed")
    assert made.share == fields.get("share", 0.5)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(count="4"), "config.typed.count must be a whole number, not '4'"),
        (dict(count=True), "count must be a whole number, not True"),
        (dict(count=4.0), "count must be a whole number"),
        (dict(share="x"), "share must be a number"),
        (dict(share=None), "share must be a number"),
        (dict(flag="no"), "flag must be True or False, not 'no'"),
        (dict(flag=1), "flag must be True or False"),
        (dict(word=3), "word must be a string or None"),
        (dict(pair=(1, 2, 3)), "pair must be (a whole number, a whole number), not (1, 2, 3)"),
        (dict(pair=(1, "2")), "pair must be (a whole number, a whole number)"),
        (dict(sizes=("a",)), "sizes must be a tuple, each entry a whole number or a whole number"),
        (dict(table=(".*", False)), "table must be a tuple, each entry (a string, any value)"),
        (dict(kind="c"), "kind must be 'a' or 'b'"),
        (dict(options=3), "options must be a group of keys"),
        (dict(inner=3), "inner must be a group of keys or None"),
        (dict(inner=dict(width="3")), "config.typed.inner.width must be a whole number"),
        (4, "config.typed must be a group of keys, not 4"),
    ],
)
def test_values_of_other_types(fields, message):
    with pytest.raises(configs.ConfigError) as error:
        configs.dataclass_from(Typed, fields, "config.typed")
    assert message in str(error.value)
