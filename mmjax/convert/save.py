"""Models into directories that transformers loads."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from mmjax.convert.family import (
    Family,
    Origin,
    Source,
    families,
    read_json,
    transformers_config,
)
from mmjax.convert.files import Item, write_directory
from mmjax.convert.load import CONFIG, GENERATION, float_dtype, with_fields
from mmjax.convert.table import ConversionError, Entry, lay_out
from mmjax.nn import lora
from mmjax.params import split

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Fields of our configs that say how a model is run or trained, not what it computes.
_RUNTIME = {
    "dtype": "float32",
    "remat": "none",
    "unroll": 1,
    "drop_path": 0.0,
    "patch_dropout": 0.0,
    "partial_patches": "crop",
    "init_scale": 1.0,
    "init_bias": 0.0,
    "max_scale": None,
    "padding": "attend",
    "early": "all",
    "dropout": 0.0,
    "follow": "any",
    "shape": None,
}

# Files beside the weights that belong to a checkpoint.
COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "spiece.model",
    "sentencepiece*.model",
    "chat_template*",
    "*processor_config.json",
    GENERATION,
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
)


def save_pretrained(
    model: nnx.Module,
    directory: str | Path,
    *,
    architecture: str | None = None,
    like: str | Path | None = None,
    dtype: Any = None,
    max_shard_size: int = 5 * 10**9,
    overwrite: bool = False,
) -> None:
    """Writes a directory that transformers, and whoever reads its format, loads.

    A model that was read from a checkpoint keeps the class, the further entries of `config.json`
    and the companions of its origin (tokenizer, preprocessing). Adapters (LoRA) are merged into
    their kernels. The directory appears whole or not at all. With several processes all call this,
    and the first writes.

    Args:
      architecture: the class in transformers; None for the origin's, or the first that fits.
      like: a directory of transformers to take companions from, instead of the origin's.
      dtype: of all tensors: float32, bfloat16 or float16; None keeps each as it is here.
      max_shard_size: of one weights file, in bytes.
      overwrite: whether the directory may be there already; it is then replaced.

    Raises:
      FileExistsError: if it is, and may not.
      ConversionError: if no class of transformers computes what this model does.
      UnknownNameError: on another dtype.
    """
    directory = Path(directory).absolute()
    refuse_existing(directory, overwrite=overwrite)
    model = lora.merge(model)
    _, params = split(model)
    origin: Origin | None = vars(model).get("origin")
    name, entries, content = describe(model, params, origin, architecture)
    dtype = None if dtype is None else float_dtype(dtype)
    items = [item(entry, params, dtype) for entry in entries]
    largest = max(items, key=lambda one: one.size)
    content |= {"architectures": [name], "dtype": largest.dtype.name}
    content.pop("torch_dtype", None)
    settings = {key: content.pop(key) for key in families()[name].generation if key in content}
    first = jax.process_index() == 0
    with whole_directory(directory) if first else contextlib.nullcontext(directory) as scratch:
        write_directory(scratch, items, max_shard_size, write=first)
        if first:
            write_json(scratch / CONFIG, content)
            source = like if like is not None else origin and origin.directory
            if source is not None and Path(source).is_dir():
                copy_companions(Path(source), scratch)
            file = scratch / GENERATION
            there = read_json(file) if settings and file.is_file() else {}
            if there | settings != there:
                write_json(file, there | settings)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def refuse_existing(directory: Path, *, overwrite: bool) -> None:
    """Raises FileExistsError if something is there already that may not be replaced."""
    if not overwrite and directory.exists() and (directory.is_file() or any(directory.iterdir())):
        raise FileExistsError(
            f"{directory} is there already and nothing was written: choose another directory, or "
            "say that it may be replaced (overwrite)."
        )


def describe(
    model: nnx.Module, params: Mapping[str, Any], origin: Origin | None, architecture: str | None
) -> tuple[str, list[Entry], dict[str, Any]]:
    """The class that a model is saved as, its tensors, and the content of its `config.json`.

    Raises:
      ConversionError: if there is no such class.
    """
    known = families()
    if architecture is not None:
        names = [architecture]
    elif origin is not None:
        names = [origin.architecture]
    else:
        names = [name for name in known if known[name].module(model.config) is type(model)]
        if not names:
            raise ConversionError(
                f"No class of transformers corresponds to {type(model).__name__}. Those that "
                f"mmjax converts: {', '.join(known.names())}."
            )
    shapes = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in params.items()}
    reasons = []
    for name in names:
        family = known[name]
        try:
            entries = lay_out(family.rows(model.config), shapes)
            tensor_names = frozenset(entry.name for entry in entries)
            hf = say(family, model.config, tensor_names)
        except (ValueError, AttributeError) as error:
            reasons.append(f"  {name}: {error}")
            continue
        return name, entries, _content(family, hf, model.config, origin, tensor_names)
    raise ConversionError(
        f"This {type(model).__name__} cannot be saved in a format of transformers:\n"
        + "\n".join(reasons)
    )


def say(family: Family, config: Any, names: frozenset[str]) -> PretrainedConfig:
    """What transformers calls a config of ours.

    Args:
      names: of the tensors, as the family has them.

    Raises:
      ValueError: if the family computes something else.
    """
    hf = family.to_hf(config)
    differing = difference(family.from_hf(Source(hf, names, None)), config)
    if differing:
        raise ValueError(f"it cannot say {', '.join(differing)}")
    return hf


def difference(theirs: Any, ours: Any) -> list[str]:
    """Fields that differ, but for those of running and training."""
    theirs, ours = (_flat(with_fields(config, **_RUNTIME)) for config in (theirs, ours))
    return [
        f"{key}={ours.get(key)!r} (it would be {theirs.get(key)!r})"
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key) != ours.get(key)
    ]


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    result = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            result |= _flat(value, f"{prefix}{field.name}.")
        else:
            result[prefix + field.name] = value
    return result


def _content(
    family: Family, hf: Any, config: Any, origin: Origin | None, names: frozenset[str]
) -> dict[str, Any]:
    """The config.json: that of the origin, but for what has changed since."""
    new = json.loads(hf.to_json_string(use_diff=False))
    if origin is None:
        return new
    original = json.loads(origin.config)
    if original.get("model_type") != family.model_type:
        return new
    before = family.from_hf(Source(transformers_config(original, origin.directory), names, None))
    if not difference(before, config):
        return original
    old = json.loads(family.to_hf(before).to_json_string(use_diff=False))
    return _with_changes(original, old, new)


def _with_changes(original: dict, old: dict, new: dict) -> dict[str, Any]:
    """`original`, with what differs between `old` and `new`."""
    result = copy.deepcopy(original)
    for key, value in new.items():
        if old.get(key) == value:
            continue
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = _with_changes(result[key], old.get(key) or {}, value)
        else:
            result[key] = value
    return result


def item(entry: Entry, params: Mapping[str, Any], dtype: np.dtype | None) -> Item:
    """One tensor to write; `dtype` None: as it is here."""
    arrays = [params[path] for path in entry.paths]
    kind = np.dtype(arrays[0].dtype) if dtype is None else dtype

    def data() -> np.ndarray:
        parts = arrays if entry.layer is None else [array[entry.layer] for array in arrays]
        return to_host(entry.transform.to_theirs(*parts).astype(kind))

    return Item(entry.name, kind, entry.shape, data)


def to_host(array: jax.Array) -> np.ndarray:
    """The whole array, also where it lies on devices of several processes."""
    if not array.is_fully_addressable:
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def copy_companions(source: Path, target: Path) -> None:
    """Files of tokenizer and processor, as far as they are there."""
    for pattern in COMPANIONS:
        for file in source.glob(pattern):
            place = target / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            if file.is_file():
                shutil.copy2(file, place)


@contextlib.contextmanager
def whole_directory(directory: Path) -> Iterator[Path]:
    """A directory to write into, which takes the place of `directory` at the end of the block.

    What was there before is there until then, and stays there if anything fails.
    """
    directory = directory.absolute()
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent) as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        yield new
        old = Path(scratch) / "old"
        if directory.exists():
            os.replace(directory, old)
        try:
            os.replace(new, directory)
        except BaseException:
            if old.exists():
                os.replace(old, directory)
            raise
