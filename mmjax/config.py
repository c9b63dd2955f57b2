"""Experiment configs: ConfigDicts made by `get_config(arg)`, with strict overrides.

python -m experiments.train --config configs/siglip/openmoji.py:size=S,res=96 --config.seed=1
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib.util
import json
import sys
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ml_collections import ConfigDict

from mmjax.registry import nearest

T = TypeVar("T")


class ConfigError(ValueError):
    """A config, an override or an argument that cannot be used; the message says what to do."""


def parse_arg(arg: str | None, **defaults: Any) -> ConfigDict:
    """Read "key=value,flag" as given after the colon of `--config file.py:ARG`.

    Each key takes the type of its default; a key alone means True.

    Args:
      arg: the text after the colon, or None.
      **defaults: every key that the config understands.

    Raises:
      ConfigError: on an unknown key (with the nearest) or a value of another type.
    """
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
    if not hasattr(module, function):
        raise ConfigError(f"{path!r} defines no function {function}(arg).")
    return getattr(module, function)(arg or None)


def _override(config: ConfigDict, item: str) -> None:
    dotted, equals, text = item.partition("=")
    if not equals:
        raise ConfigError(f"Override --config.{item} needs a value: --config.{item}=VALUE.")
    node = config
    *parents, last = dotted.split(".")
    for depth, key in enumerate([*parents, last]):
        if not isinstance(node, ConfigDict) or key not in node:
            options = list(flatten(config))
            if isinstance(node, ConfigDict):
                # The level where the name went wrong is the likely one.
                prefix = ".".join([*parents, last][:depth])
                close = difflib.get_close_matches(key, list(node.keys()), n=1, cutoff=0.5)
                if close:
                    tail = [*parents, last][depth + 1 :]
                    whole = ".".join(filter(None, [prefix, close[0], *tail]))
                    raise ConfigError(f"The config has no key {dotted!r}; did you mean {whole!r}?")
            raise ConfigError(f"The config has no key {dotted!r}; {nearest(dotted, options)}")
        if depth < len(parents):
            node = node[key]
    if isinstance(node[last], ConfigDict):
        inner = ", ".join(f"{dotted}.{key}" for key in node[last])
        raise ConfigError(f"{dotted!r} is a group; override one of its keys: {inner}.")
    value = _convert(text, node[last], f"--config.{dotted}")
    with node.ignore_type():
        node[last] = value


def _convert(text: str, current: Any, what: str) -> Any:
    """Text to the type of the present value. A value of None takes any literal."""
    if isinstance(current, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        if current is None:
            return text
        value = {"true": True, "false": False}.get(text.lower(), text)
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
      ConfigError: naming every unknown field (with the nearest) and every missing one, or a variant
        that does not exist.
    """
    return _dataclass_from((cls,), config, where)


def _dataclass_from(options: tuple[type, ...], config: Mapping[str, Any], where: str) -> Any:
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
