"""Adapters of linear maps as directories of PEFT, both ways.

    save_adapter(model, "adapter")     # adapter_config.json, adapter_model.safetensors
    load_adapter(model, "adapter")     # gives a model these adapters

The base model is not in there. The format is what `PeftModel.save_pretrained` writes for a
`LoraConfig`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmjax.convert.family import Family, Origin, families, read_json
from mmjax.convert.files import Item, open_file, write_file
from mmjax.convert.kinds import SAME, TRANSPOSED
from mmjax.convert.save import describe, refuse_existing, to_host, whole_directory
from mmjax.convert.table import ConversionError, Entry, rename
from mmjax.nn import lora
from mmjax.nn.linear import Linear
from mmjax.nn.lora import LoRAConfig, LowRank
from mmjax.params import split
from mmjax.registry import nearest

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_A, _B, _MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
_WEIGHT = ".weight"
# Options that change what is computed wherever they are set.
_OTHERS = (
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
# Ways to begin that leave the base model as it is.
_BEGINNINGS = (True, False, "gaussian", "eva", "orthogonal")


class _Counterpart(NamedTuple):
    """What a linear map of ours is in transformers.

    Attributes:
      weights: canonical names of its weights; of a stack, layer by layer.
      stacked: whether it is one.
      transposed: whether they are [outputs, inputs].
    """

    weights: list[str]
    stacked: bool
    transposed: bool


def save_adapter(
    model: nnx.Module,
    directory: str | Path,
    *,
    base: str | None = None,
    architecture: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the adapters of a model as a directory that PEFT loads.

    With several processes all call this, and the first writes.

    Args:
      base: the base model's name or directory, for `adapter_config.json`; None for the origin's.
      architecture: the base model's class in transformers; see `save_pretrained`.
      overwrite: whether the directory may be there already; it is then replaced.

    Raises:
      FileExistsError: if it is, and may not.
      ConversionError: if there are no adapters, they are of several kinds, or a linear map that has
        one is no linear layer of its own in transformers.
    """
    directory = Path(directory).absolute()
    refuse_existing(directory, overwrite=overwrite)
    maps = lora.adapted_maps(model)
    config = _one_kind(maps)
    name, family, counterparts = _counterparts(model, architecture)
    alien = [f"  {path}" for path in maps if path not in counterparts]
    if alien:
        raise ConversionError(
            f"In {name} these are no linear layers of their own, but parts of a larger one or "
            "something else, and PEFT cannot say what their adapters do:\n"
            + "\n".join(alien)
            + "\nWrite the merged model instead (save_pretrained)."
        )
    modules = _modules(family, counterparts.values(), name)
    items, targets = [], []
    for path, linear in maps.items():
        weights, stacked, _ = counterparts[path]
        arrays = {end: to_host(array) for end, array in _arrays(linear).items()}
        for layer, weight in enumerate(weights):
            targets.append(modules[weight])
            for end, array in arrays.items():
                part = (array[layer] if stacked else array).T
                items.append(_item(_PREFIX + modules[weight] + end, part))
    origin: Origin | None = vars(model).get("origin")
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if name.endswith(("ForCausalLM", "LMHeadModel")) else None,
        "base_model_name_or_path": origin.directory if base is None and origin else base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "target_modules": _shortest(targets, modules.values()),
        "use_dora": config.dora,
        "use_rslora": config.rslora,
        "fan_in_fan_out": not all(counterparts[path].transposed for path in maps),
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    first = jax.process_index() == 0
    with whole_directory(directory) if first else contextlib.nullcontext(directory) as scratch:
        write_file(scratch / WEIGHTS, items, write=first)
        if first:
            text = json.dumps(content, indent=2, sort_keys=True) + "\n"
            (scratch / CONFIG).write_text(text, encoding="utf-8")


def load_adapter(
    model: nnx.Module, directory: str | Path, *, architecture: str | None = None
) -> None:
    """Gives a model the adapters in a directory of PEFT, in place.

    Args:
      architecture: the model's class in transformers; see `save_pretrained`.

    Raises:
      ConversionError: if the directory holds something else than LoRA or DoRA, or does not fit the
        model, which is then as it was; all problems are listed.
    """
    directory = Path(directory)
    options = _options(directory)
    found = _tensors(directory / WEIGHTS)
    name, family, counterparts = _counterparts(model, architecture)
    canonical = rename((module + _WEIGHT for module in found), family.renames, str(directory))
    adapters = {here: found[there.removesuffix(_WEIGHT)] for here, there in canonical.items()}
    chosen = {
        path: part for path, part in counterparts.items() if adapters.keys() & set(part.weights)
    }
    known = {weight for part in chosen.values() for weight in part.weights}
    every = [weight for part in counterparts.values() for weight in part.weights]
    problems = [
        f"  {weight.removesuffix(_WEIGHT)!r} is no linear layer of its own here; "
        + nearest(weight, every).split("Valid")[0]
        for weight in adapters
        if weight not in known
    ]
    problems += [
        f"  {weight.removesuffix(_WEIGHT)!r} has no adapter, but other layers' have"
        for weight in known
        if weight not in adapters
    ]
    maps = lora.linear_maps(model)
    for path, part in chosen.items():
        expected = _shapes(maps[path], options)
        for weight in part.weights:
            shapes = {end: array.shape for end, array in adapters.get(weight, {}).items()}
            if shapes and shapes != expected:
                problems.append(f"  {weight.removesuffix(_WEIGHT)!r}: {shapes}, not {expected}")
    if problems:
        raise ConversionError(
            f"The adapters of {directory} do not fit this {name}:\n"
            + "\n".join(problems[:50])
            + "\nNothing was loaded. Is it the base model that they were trained with?"
        )
    targets = "|".join(re.escape(path) for path in chosen)
    lora.add(model, LoRAConfig(**options, targets=targets), rngs=nnx.Rngs(0))
    for path, part in chosen.items():
        linear = maps[path]
        layers = [adapters[weight] for weight in part.weights]
        now = _arrays(linear)
        for end, variable in _variables(linear.lora).items():
            parts = [jnp.asarray(layer[end], jnp.float32).T for layer in layers]
            value = jnp.stack(parts) if part.stacked else parts[0]
            # Of a magnitude, ours is what is added to that of the kernel: the present one.
            variable.set_value(value - now[end] if end == _MAGNITUDE else value)


def _one_kind(maps: Mapping[str, Linear]) -> LoRAConfig:
    """What all adapters have in common. Raises ConversionError if there is no such thing."""
    kinds = {dataclasses.replace(linear.lora.config, targets="") for linear in maps.values()}
    if not kinds:
        raise ConversionError("The model has no adapters: mmjax.nn.lora.add gives it some.")
    if len(kinds) > 1:
        raise ConversionError(
            "A directory of PEFT holds adapters of one kind, but the model has several:\n"
            + "\n".join(sorted(f"  {kind}" for kind in kinds))
            + "\nWrite the merged model instead (save_pretrained)."
        )
    return kinds.pop()


def _counterparts(
    model: nnx.Module, architecture: str | None
) -> tuple[str, Family, dict[str, _Counterpart]]:
    """The model's class in transformers, and our linear maps that are linear layers there."""
    plain = {path: x for path, x in split(model)[1].items() if not lora.is_adapter(path)}
    name, entries, _ = describe(model, plain, vars(model).get("origin"), architecture)
    result: dict[str, _Counterpart] = {}
    for entry in filter(_is_linear, entries):
        path = entry.paths[0].removesuffix("/kernel")
        start = _Counterpart([], entry.layer is not None, entry.transform is TRANSPOSED)
        result.setdefault(path, start).weights.append(entry.name)
    return name, families()[name], result


def _is_linear(entry: Entry) -> bool:
    return (
        len(entry.paths) == 1
        and entry.paths[0].endswith("/kernel")
        and entry.name.endswith(_WEIGHT)
        and entry.transform in (SAME, TRANSPOSED)
        and len(entry.shape) == 2
    )


def _modules(family: Family, parts: Iterable[_Counterpart], where: str) -> dict[str, str]:
    """Names of weights -> those of the modules they are in."""
    names = rename(
        (weight for part in parts for weight in part.weights), family.module_names, where
    )
    return {weight: module.removesuffix(_WEIGHT) for module, weight in names.items()}


def _shortest(targets: Sequence[str], every: Iterable[str]) -> list[str]:
    """Names by which PEFT finds the targets and nothing else: their last components, where no other
    module has these."""
    others = {name.rpartition(".")[2] for name in set(every) - set(targets)}
    last = [(name, name.rpartition(".")[2]) for name in targets]
    return sorted({name if end in others else end for name, end in last})


def _variables(adapter: LowRank) -> dict[str, nnx.Param]:
    """By what their names end in there."""
    found = {_A: adapter.a, _B: adapter.b, _MAGNITUDE: adapter.magnitude}
    return {end: variable for end, variable in found.items() if variable is not None}


def _arrays(linear: Linear) -> dict[str, jax.Array]:
    """What PEFT stores, each layer's transposed."""
    arrays = {end: variable[...] for end, variable in _variables(linear.lora).items()}
    if _MAGNITUDE in arrays:
        arrays[_MAGNITUDE] = _magnitude(linear.lora, linear.kernel[...])
    return arrays


@jax.jit  # as a whole, where the kernel lies on several processes
def _magnitude(adapter: LowRank, kernel: jax.Array) -> jax.Array:
    return adapter.full_magnitude(kernel)


def _shapes(linear: Linear, options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    inputs, outputs = linear.kernel.shape[-2:]
    shapes = {_A: (options["rank"], inputs), _B: (outputs, options["rank"])}
    return {**shapes, _MAGNITUDE: (outputs,)} if options["dora"] else shapes


def _item(name: str, array: np.ndarray) -> Item:
    return Item(name, array.dtype, array.shape, lambda: array)


def _options(directory: Path) -> dict[str, Any]:
    """The fields of `LoRAConfig`, but for the targets.

    Raises:
      ConversionError: if it is no adapter, or has options that mmjax does not have.
    """
    content = read_json(directory / CONFIG)
    if content.get("peft_type") != "LORA":
        raise ConversionError(
            f"{directory} has peft_type={content.get('peft_type')!r}; only 'LORA' is read."
        )
    odd = [key for key in _OTHERS if content.get(key)]
    if content.get("bias", "none") != "none":
        odd.append("bias")
    if content.get("init_lora_weights", True) not in _BEGINNINGS:
        odd.append("init_lora_weights")
    if odd:
        raise ConversionError(
            f"{directory / CONFIG} has options that mmjax does not have:\n"
            + "\n".join(f"  {key}={content[key]!r}" for key in odd)
            + "\nMerge it with PEFT (merge_and_unload), and load the result."
        )
    return {
        "rank": content["r"],
        "alpha": content["lora_alpha"],
        "dora": content.get("use_dora", False),
        "rslora": content.get("use_rslora", False),
    }


def _tensors(file: Path) -> dict[str, dict[str, np.ndarray]]:
    """Arrays by the module they are for and by what their names end in.

    Raises:
      ConversionError: if there is no such file, or it is damaged or has other tensors.
    """
    if not file.is_file():
        raise ConversionError(
            f"{file.parent} has no {file.name}. Adapters that are pickles (adapter_model.bin) are "
            "not read: save them again with PEFT."
        )
    tensors = open_file(file)
    result: dict[str, dict[str, np.ndarray]] = {}
    for name in tensors.shapes:
        ends = [end for end in (_A, _B, _MAGNITUDE) if name.endswith(end)]
        if not ends or not name.startswith(_PREFIX):
            raise ConversionError(
                f"{file} has a tensor {name!r}, which is no part of an adapter. If it is a copy of "
                "the base model's, save again with save_embedding_layers=False."
            )
        module = name.removeprefix(_PREFIX).removesuffix(ends[0])
        result.setdefault(module, {})[ends[0]] = tensors.read(name)
    return result
