"""Whether parameters taken from elsewhere mean there what they mean here.

Shapes alone do not say it: a tower with another activation or another number of heads has the same
shapes, and computes something else.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from mmjax import convert
from mmjax.config import ConfigError, dataclass_from, split_name
from mmjax.convert.family import read_json
from mmjax.data.tokenizer import Tokenizer, TrainedTokenizer
from mmjax.models import MODELS

# Fields that say how a part is run, how large its inputs are, or what is read from it: a tower may
# be taken from a model that does so otherwise.
_FREE = {
    "dtype",
    "remat",
    "unroll",
    "drop_path",
    "patch_dropout",
    "image_size",
    "max_len",
    "pooling",
    "num_classes",
    "projection",
    "head_input",
    "vocab_size",  # a larger one grows; see `smaller_vocabularies`
}
# The tables of a vocabulary: their paths, and the dimension of tokens.
_TABLES = {"token/embedding": 0, "head/kernel": 1}


def model_dataclass(model: Mapping[str, Any]) -> Any:
    """The dataclass that a `config.model` describes.

    Raises:
      ConfigError, UnknownNameError: see `mmjax.build`.
    """
    name, fields = split_name(model, "config.model")
    return dataclass_from(MODELS[name][0], fields, "config.model")


def is_run(source: Path) -> bool:
    """Whether a directory is the work directory of a run, be it without a checkpoint so far; it has
    a config.json of its own kind."""
    config = source / convert.CONFIG
    return (source / "checkpoints").is_dir() or (config.is_file() and "model" in read_json(config))


def is_checkpoint(source: Path) -> bool:
    """Whether a path is a checkpoint of Hugging Face format, or at least no run."""
    return source.is_file() or ((source / convert.CONFIG).is_file() and not is_run(source))


def check_handover(model: Mapping[str, Any], source: Path, names: Mapping[str, str]) -> None:
    """That the parts of a model which come from a source are made there as they are here.

    Args:
      model: `config.model`.
      source: the work directory of a run, or a checkpoint of Hugging Face format.
      names: {path of a parameter here: its path there}.

    Raises:
      ConfigError: listing every field that differs.
    """
    ours, theirs = model_dataclass(model), _config_of(source)
    if theirs is None:
        return
    problems = []
    # A table of vectors means the same whatever reads it.
    maps = {here: there for here, there in names.items() if not here.endswith("/embedding")}
    parts = {_parts(*pair) for pair in maps.items()}
    if type(ours) is type(theirs) and {(name, name) for name in _nested(ours)} <= parts:
        # All of it: how the parts go together must agree as well.
        parts = {("", "")}
    for here, there in sorted(parts):
        one, other = _at(ours, here), _at(theirs, there)
        if one is None or other is None:
            continue
        one, other = _fields(one), _fields(other)
        problems += [
            f"  {'.'.join(filter(None, (here.replace('/', '.'), key)))}: {one[key]!r} here, "
            f"{other[key]!r} there"
            for key in sorted(one.keys() & other.keys())
            if one[key] != other[key]
        ]
    if problems:
        raise ConfigError(
            f"config.init takes parameters from {source} that were made for another computation:\n"
            + "\n".join(problems)
            + "\nChange config.model to what it is there, or name the right source."
        )


def smaller_vocabularies(
    model: Mapping[str, Any], source: Path, names: Mapping[str, str]
) -> dict[str, int]:
    """The tables of tokens that have fewer rows in a source than here, and how many they have.

    Args: as of `check_handover`.
    """
    tables = {
        here: there
        for here, there in names.items()
        if any(here == table or here.endswith(f"/{table}") for table in _TABLES)
    }
    if not tables:
        return {}
    ours, theirs = model_dataclass(model), _config_of(source)
    smaller = {}
    for here, there in tables.items():
        sizes = []
        for config, path in ((ours, here), (theirs, there)):
            part = config and _at(config, path.rsplit("/", 2)[0] if path.count("/") > 1 else "")
            sizes.append(vars(part).get("vocab_size") if part else None)
        if None not in sizes and sizes[1] < sizes[0]:
            smaller[here] = sizes[1]
    return smaller


def with_tokens(path: str, target: jax.ShapeDtypeStruct, tokens: int) -> jax.ShapeDtypeStruct:
    """The shape of a table of so many tokens; it lies whole on every device."""
    shape = list(target.shape)
    shape[_axis(path)] = tokens
    whole = NamedSharding(target.sharding.mesh, PartitionSpec())
    return jax.ShapeDtypeStruct(tuple(shape), target.dtype, sharding=whole)


def grow(path: str, table: jax.Array, target: jax.ShapeDtypeStruct) -> jax.Array:
    """A table of tokens with more of them: new ones are the mean of those there are, so that they
    are neither likely nor unlikely at first (Hewitt, "Initializing New Word Embeddings for
    Pretrained Language Models", 2021)."""
    axis = _axis(path)
    mean = jnp.mean(table, axis=axis, keepdims=True)

    def grown() -> jax.Array:
        new = jnp.repeat(mean, target.shape[axis] - table.shape[axis], axis=axis)
        return jnp.concatenate([table, new], axis=axis).astype(target.dtype)

    return jax.jit(grown, out_shardings=target.sharding)()


def _axis(path: str) -> int:
    return next(axis for name, axis in _TABLES.items() if path.endswith(name))


def check_tokens(tokenizer: Tokenizer | None, source: Path, names: Mapping[str, str]) -> None:
    """That a table of tokens is read with the ids that it was trained with.

    It is certain for tokenizers that a run trained and keeps; those of files are the user's to
    name rightly.

    Args:
      tokenizer: of this run.
      source: the work directory of a run, or a checkpoint.
      names: {path of a parameter here: its path there}.

    Raises:
      ConfigError: if the run trained another one.
    """
    kept = source / "tokenizer"
    tables = [path for path in names if path.endswith("token/embedding")]
    if tokenizer is None or not tables or is_checkpoint(source) or not kept.is_dir():
        return
    if TrainedTokenizer.load(kept).backend.get_vocab() != tokenizer.backend.get_vocab():
        raise ConfigError(
            f"config.init takes {', '.join(tables)} from {source}, whose tokenizer gives tokens "
            f'other ids. Set config.data.tokenizer=dict(name="run", directory="{source}").'
        )


def check_adapters(lora: Mapping[str, Any], source: Path) -> None:
    """That adapters taken from a run do here what they did there.

    Args:
      lora: `config.lora`.
      source: the work directory of the run.

    Raises:
      ConfigError: listing every field that differs.
    """
    theirs = json.loads((source / "config.json").read_text("utf-8"))["lora"]
    problems = [
        f"  lora.{key}: {lora[key]!r} here, {theirs[key]!r} there"
        for key in ("rank", "alpha", "dora", "rslora")
        if lora[key] != theirs[key]
    ]
    if problems:
        raise ConfigError(
            f"config.init takes adapters from {source}, which were made otherwise:\n"
            + "\n".join(problems)
            + "\nChange config.lora to what it is there; or merge them first (experiments.convert) "
            "and take the result."
        )


def _config_of(source: Path) -> Any | None:
    """The dataclass of the model in a source; None if it does not say."""
    if is_checkpoint(source):
        return convert.open_checkpoint(source).config
    path = source / convert.CONFIG
    return model_dataclass(read_json(path)["model"]) if path.is_file() else None


def _parts(here: str, there: str) -> tuple[str, str]:
    """Which part of the model a parameter belongs to, on both sides: what is left of its paths
    without their common end, or the first component where they are equal."""
    ours, theirs = here.split("/"), there.split("/")
    while ours and theirs and ours[-1] == theirs[-1]:
        ours.pop()
        theirs.pop()
    if not ours and not theirs:
        return here.split("/")[0], there.split("/")[0]
    return "/".join(ours), "/".join(theirs)


def _at(config: Any, part: str) -> Any | None:
    """The dataclass of a part; None where a part is no dataclass of its own."""
    for name in filter(None, part.split("/")):
        config = vars(config).get(name)
        if not dataclasses.is_dataclass(config):
            return None
    return config


def _nested(config: Any) -> list[str]:
    """Names of the fields that are dataclasses."""
    values = ((field.name, getattr(config, field.name)) for field in dataclasses.fields(config))
    return [name for name, value in values if dataclasses.is_dataclass(value)]


def _fields(config: Any, prefix: str = "") -> dict[str, Any]:
    """Fields at any depth that decide what is computed."""
    flat = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in _FREE:
            continue
        if dataclasses.is_dataclass(value):
            flat |= _fields(value, f"{prefix}{field.name}.")
        else:
            flat[prefix + field.name] = value
    return flat
