"""Experiment configs: ConfigDicts made by `get_config(arg)`, with strict overrides.

python -m experiments.train --config configs/siglip/openmoji.py:size=S,res=96 --config.seed=1
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib.util
import inspect
import json
import numbers
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from ml_collections import ConfigDict

from mmjax.registry import nearest

T = TypeVar("T")

# Below these, keys that a config leaves at their defaults can be set as well: what stands there is
# checked, and unknown keys are refused, where it is used.
_OPEN = re.compile(
    r"(task|model|data\.train|data\.tokenizer|evals\.[^.]+|optimizer\.(options|schedule))\..+"
)


class ConfigError(ValueError):
    """A config, an override or an argument that cannot be used; the message says what to do."""


def parse_arg(arg: str | None, **defaults: Any) -> ConfigDict:
    """Read "key=value,flag" as given after the colon of `--config file.py:ARG`.

    Each key takes the type of its default; a key alone means True.

    Args:
      arg: the text after the colon, or None.
      **defaults: every key that the config understands.

    Raises:
      ConfigError: on an unknown key (with the nearest) or a value of another type; for the text
        "help", with all keys and their defaults.
    """
    if arg == "help":
        raise ConfigError(", ".join(f"{key}={value}" for key, value in defaults.items()))
    result = dict(defaults)
    for item in filter(None, (arg or "").split(",")):
        key, equals, text = item.partition("=")
        if key not in defaults:
            raise ConfigError(f"The config has no argument {key!r}; {nearest(key, defaults)}")
        result[key] = _convert(text if equals else "True", defaults[key], f"argument {key!r}")
    return ConfigDict(result)


def load(spec: str, overrides: Iterable[str] = ()) -> ConfigDict:
    """Run `get_config` of a file and apply overrides.

    Args:
      spec: "path/to/config.py" or "path/to/config.py:argument".
      overrides: items such as "train.steps=100".

    Returns:
      The config, its keys locked.

    Raises:
      ConfigError: if the file, its argument, a key or a value is unusable.
    """
    config = call(spec, "get_config")
    config.lock()
    for item in overrides:
        _override(config, item)
    return config


def call(spec: str, function: str) -> Any:
    """What a function of a file returns for the argument of "path/to/file.py:argument".

    Raises:
      ConfigError: if there is no such file or function.
    """
    path, _, arg = spec.partition(":")
    return _function(_run(path), function)(arg or None)


def describe(spec: str) -> str:
    """What a config file says of itself, and its arguments with their defaults.

    Raises:
      ConfigError: if there is no such file.
    """
    path = spec.partition(":")[0]
    module = _run(path)
    get_config = _function(module, "get_config")
    paragraphs = [inspect.cleandoc(doc) for doc in (module.__doc__, get_config.__doc__) if doc]
    try:
        get_config("help")
        paragraphs.append("It has no arguments.")
    except ConfigError as arguments:
        paragraphs.append(f"Its arguments, as in --config {path}:KEY=VALUE,...:\n{arguments}")
    return "\n\n".join(paragraphs)


def _run(path: str) -> types.ModuleType:
    if not Path(path).is_file():
        folder = Path(path).parent
        others = [str(p) for p in folder.rglob("*.py")] if folder.is_dir() else []
        if not others:
            others = [str(p) for p in Path("configs").rglob("*.py") if p.name != "__init__.py"]
        raise ConfigError(f"There is no config file {path!r}; {nearest(path, others)}")
    module_spec = importlib.util.spec_from_file_location("mmjax_experiment_config", path)
    module = importlib.util.module_from_spec(module_spec)
    # Configs import their neighbours (configs.openmoji) wherever the command is started.
    root = str(Path(__file__).resolve().parents[1])
    if root not in sys.path:
        sys.path.append(root)
    module_spec.loader.exec_module(module)
    return module


def _function(module: types.ModuleType, function: str) -> Callable[[str | None], Any]:
    if not hasattr(module, function):
        raise ConfigError(f"{module.__spec__.origin!r} defines no function {function}(arg).")
    return getattr(module, function)


def _override(config: ConfigDict, item: str) -> None:
    dotted, equals, text = item.partition("=")
    if not equals:
        raise ConfigError(f"Override --config.{item} needs a value: --config.{item}=VALUE.")
    _set(config, config, dotted.split("."), 0, text)


def _set(config: ConfigDict, node: Any, keys: Sequence[str], depth: int, text: str) -> Any:
    """`node`, which stands at keys[:depth], with the value that `text` gives to what is at `keys`.

    Groups are changed in place, tuples and lists are made anew.
    """
    key, dotted, last = keys[depth], ".".join(keys), depth + 1 == len(keys)

    def changed(present: Any) -> Any:
        return (
            _convert(text, present, dotted)
            if last
            else _set(config, present, keys, depth + 1, text)
        )

    if isinstance(node, ConfigDict | Mapping):
        if key in node:
            new = changed(node[key])
        elif last and _OPEN.fullmatch(dotted):
            new = changed(None)
        else:
            raise ConfigError(
                f"The config has no key {dotted!r}; {_nearest_keys(config, keys, depth)}"
            )
        if not isinstance(node, ConfigDict):  # within a tuple or list
            return {**node, key: new}
        with node.ignore_type(), node.unlocked():
            node[key] = new
        if isinstance(node[key], ConfigDict):
            node[key].lock()
        return node
    if isinstance(node, tuple | list):
        where = ".".join(keys[:depth])
        if not key.isdecimal() or int(key) >= len(node):
            raise ConfigError(
                f"The config has no key {dotted!r}: {where!r} has {len(node)} entries, which are "
                f"numbered from 0, as in {where}.0."
            )
        entries = list(node)
        entries[int(key)] = changed(entries[int(key)])
        return type(node)(entries)
    raise ConfigError(f"The config has no key {dotted!r}; {_nearest_keys(config, keys, depth)}")


def _nearest_keys(config: ConfigDict, keys: Sequence[str], depth: int) -> str:
    """A phrase for error messages: the keys that keys[depth] may have been meant to be part of."""
    node: Any = config
    for key in keys[:depth]:
        node = node[int(key)] if isinstance(node, tuple | list) else node[key]
    if isinstance(node, ConfigDict | Mapping):
        # The level where the name went wrong is the likely one.
        close = difflib.get_close_matches(keys[depth], list(node), n=1, cutoff=0.5)
        if close:
            return f"did you mean {'.'.join([*keys[:depth], close[0], *keys[depth + 1 :]])!r}?"
    close = difflib.get_close_matches(".".join(keys), list(flatten(config)), n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(map(repr, close))}?"
    group = ".".join(keys[:depth])
    if not isinstance(node, ConfigDict | Mapping):
        return f"{group!r} is no group, its value is {node!r}."
    if not len(node):
        return f"{group!r} is empty: give the whole group, as in --config.{group}={{'KEY': VALUE}}."
    return f"the keys of {repr(group) if group else 'a config'} are {', '.join(node)}."


def _literal(text: str) -> Any:
    """What a Python literal says, in which groups may be written dict(key=value) too.

    Raises:
      ValueError, SyntaxError: if it is none.
    """
    return ast.literal_eval(_DictCalls().visit(ast.parse(text.strip(), mode="eval")))


class _DictCalls(ast.NodeTransformer):
    """dict(key=value) -> {"key": value}, as config files write their groups."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        named = all(keyword.arg for keyword in node.keywords)
        if (
            not (isinstance(node.func, ast.Name) and node.func.id == "dict")
            or node.args
            or not named
        ):
            return node
        keys = [ast.Constant(keyword.arg) for keyword in node.keywords]
        return ast.Dict(keys, [keyword.value for keyword in node.keywords])


def _convert(text: str, current: Any, what: str) -> Any:
    """Text to the type of the present value. A value of None takes any literal, or the text."""
    if isinstance(current, str):
        return text
    try:
        value = _literal(text)
    except (ValueError, SyntaxError):
        if current is None:
            return text
        value = {"true": True, "false": False}.get(text.lower(), text)
    if isinstance(current, ConfigDict | Mapping):
        if isinstance(value, dict):
            return ConfigDict(value)
        one_of = f"override one of its keys: {', '.join(f'{what}.{k}' for k in current)}, or "
        raise ConfigError(
            f"{what!r} is a group; {one_of if len(current) else ''}give the whole group, as in "
            f"--config.{what}={{'KEY': VALUE}}."
        )
    if value is None or current is None:
        return value
    if isinstance(current, float) and type(value) is int:
        return float(value)
    if isinstance(current, tuple | list) and isinstance(value, tuple | list):
        return type(current)(value)
    if type(value) is not type(current):
        raise ConfigError(
            f"{what} must be of type {type(current).__name__} like its present value "
            f"{current!r}, not {text!r}."
        )
    return value


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train.steps": 100, ...}; empty groups are kept as {}."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping | ConfigDict) and len(value):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def to_json(config: ConfigDict) -> str:
    """A stable text form: what is hashed, stored in the work directory and compared on resuming."""
    return json.dumps(_plain(config), indent=2, sort_keys=True)


def _plain(value: Any) -> Any:
    if isinstance(value, ConfigDict | Mapping):
        return {str(key): _plain(value[key]) for key in value}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def difference(old: str, new: str, ignore: Sequence[str] = ()) -> list[str]:
    """Lines that say how two JSON configs differ.

    Args:
      old: from `to_json`.
      new: likewise.
      ignore: dotted keys (or groups of keys) that may differ.
    """
    old_flat, new_flat = flatten(json.loads(old)), flatten(json.loads(new))
    lines = []
    for key in sorted(old_flat | new_flat):
        if any(key == skip or key.startswith(skip + ".") for skip in ignore):
            continue
        before, after = (flat.get(key, "(absent)") for flat in (old_flat, new_flat))
        if before != after:
            lines.append(f"  {key}: {before!r} -> {after!r}")
    return lines


def dataclass_from(cls: type[T], config: Mapping[str, Any], where: str) -> T:
    """A (nested) frozen dataclass from a ConfigDict.

    A dataclass with a field `name` that is no argument (`init=False`) stands for itself and for its
    subclasses: a group's key `name` picks the one whose constant it is. A field may also be of
    several such classes, `Config | OtherConfig`.

    Args:
      cls: the dataclass.
      config: a mapping with its fields.
      where: where the mapping stands in the config, for error messages.

    Raises:
      ConfigError: naming every unknown field (with the nearest), every missing one and every value
        that is not of the annotated type, or a variant that does not exist.
    """
    return _dataclass_from((cls,), config, where)


def _dataclass_from(options: tuple[type, ...], config: Mapping[str, Any], where: str) -> Any:
    if not isinstance(config, Mapping | ConfigDict):
        raise ConfigError(f"{where} must be a group of keys, not {config!r}.")
    cls, config = _variant(options, config, where)
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    problems = [
        f"  {where}.{key} is unknown; {nearest(key, fields)}" for key in config if key not in fields
    ]
    problems += [
        f"  {where}.{name} is missing"
        for name, field in fields.items()
        if name not in config
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    problems += type_problems({key: hints[key] for key in fields}, config, where)
    if problems:
        raise ConfigError(f"{where} does not describe a {cls.__name__}:\n" + "\n".join(problems))
    values = {}
    for key in config:
        value = config[key]
        options = _dataclasses_in(hints[key])
        if options and isinstance(value, Mapping | ConfigDict):
            value = _dataclass_from(options, value, f"{where}.{key}")
        elif isinstance(value, ConfigDict):
            value = value.to_dict()
        elif isinstance(value, list):
            value = tuple(value)
        values[key] = value
    return cls(**values)


def _dataclasses_in(hint: Any) -> tuple[type, ...]:
    """The dataclasses of an annotation `Config`, `Config | None` or `Config | OtherConfig`."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return tuple(option for option in options if dataclasses.is_dataclass(option))


def type_problems(hints: Mapping[str, Any], values: Mapping[str, Any], where: str) -> list[str]:
    """A line for each value that is not of its annotated type.

    Numbers, strings, booleans, None, groups, and tuples of them are told apart; a list passes for a
    tuple (JSON has no tuples), a whole number for a float. Any other annotation takes everything.

    Args:
      hints: {key: annotation}, as `typing.get_type_hints` has them.
      values: some of these keys, and perhaps others, which are left alone.
      where: where the values stand in the config.
    """
    return [
        f"  {where}.{key} must be {_expected(hints[key])}, not {values[key]!r}"
        for key in values
        if key in hints and not _fits(values[key], hints[key])
    ]


_WORDS = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a string",
    type(None): "None",
    Any: "any value",
}


def _fits(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, option) for option in args)
    if origin is typing.Literal:
        return value in args
    if origin is type(None):
        return value is None
    if origin is bool:
        return isinstance(value, bool | np.bool_)
    if origin in (int, float):
        kind = numbers.Integral if origin is int else numbers.Real
        return isinstance(value, kind) and not isinstance(value, bool)
    if origin is str:
        return isinstance(value, str)
    if origin in (tuple, list, Sequence):
        if not isinstance(value, tuple | list):
            return False
        if origin is tuple and args and args[-1] is not ...:
            return len(value) == len(args) and all(map(_fits, value, args))
        return all(_fits(entry, args[0]) for entry in value) if args else True
    if origin in (dict, Mapping):
        return isinstance(value, Mapping | ConfigDict)
    if dataclasses.is_dataclass(origin):
        return isinstance(value, Mapping | ConfigDict | origin)
    return True


def _expected(hint: Any) -> str:
    origin, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(dict.fromkeys(map(_expected, args)))
    if origin is typing.Literal:
        return " or ".join(map(repr, args))
    if origin in (tuple, list, Sequence):
        if origin is tuple and args and args[-1] is not ...:
            return f"({', '.join(map(_expected, args))})"
        return f"a tuple, each entry {_expected(args[0])}" if args else "a tuple"
    if origin in (dict, Mapping) or dataclasses.is_dataclass(origin):
        return "a group of keys"
    return _WORDS.get(origin, str(hint))


def _has_constant_name(cls: type) -> bool:
    return any(field.name == "name" and not field.init for field in dataclasses.fields(cls))


def _variant(
    options: tuple[type, ...], config: Mapping[str, Any], where: str
) -> tuple[type, Mapping[str, Any]]:
    """The class that a group describes, and the group without what chose it."""
    left = [cls for cls in options if _has_constant_name(cls)]
    if not left:
        return options[0], config
    variants = {}
    while left:
        cls = left.pop()
        left += cls.__subclasses__()
        # A class that inherits its name, or has an empty one, is there for others to build on.
        if vars(cls).get("name"):
            variants[cls.name] = cls
    rest = {key: config[key] for key in config if key != "name"}
    if "name" in config:
        if config["name"] not in variants:
            raise ConfigError(
                f"{where}.name={config['name']!r} does not exist; "
                f"{nearest(config['name'], variants)}"
            )
        return variants[config["name"]], rest
    if len(options) > 1 or options[0] not in variants.values():
        raise ConfigError(f"{where}.name is missing. Valid: {', '.join(sorted(variants))}.")
    return options[0], rest


def split_name(config: Mapping[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """`dict(name="flip", p=0.5)` -> ("flip", {"p": 0.5}).

    Raises:
      ConfigError: if there is no name.
    """
    if not isinstance(config, Mapping | ConfigDict) or "name" not in config:
        raise ConfigError(f"{where} must be a group with the key 'name'; it is {config!r}.")
    return config["name"], {key: config[key] for key in config if key != "name"}
