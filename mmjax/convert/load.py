"""Checkpoints of Hugging Face format into sharded arrays, tensor by tensor."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from mmjax import rules as rule_tables
from mmjax import sharding
from mmjax.convert import files, gguf, resize
from mmjax.convert.family import Family, Origin, Source, find, read_json, transformers_config
from mmjax.convert.kinds import Transform
from mmjax.convert.table import ConversionError, Entry, check, lay_out, rename
from mmjax.models import MODELS
from mmjax.models.checks import check_dtype
from mmjax.params import Params, abstract, merge
from mmjax.paths import located
from mmjax.registry import nearest

CONFIG, GENERATION = "config.json", "generation_config.json"


class Checkpoint(NamedTuple):
    """A checkpoint that was looked at, but not read.

    Attributes:
      origin: class, config and place.
      family: its conversion.
      config: of our model.
      tensors: what can be read.
      file_names: canonical name -> name in the file.
    """

    origin: Origin
    family: Family
    config: Any
    tensors: files.Tensors
    file_names: Mapping[str, str]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Looks at a checkpoint directory, or at a GGUF file; see `mmjax.paths.located`.

    Raises:
      ConversionError: if it is none, is damaged, or is of an unknown type.
    """
    try:
        path = located(path)
    except FileNotFoundError as error:
        raise ConversionError(str(error)) from None
    if not path.exists():
        raise ConversionError(f"There is no {path}: give the directory of a checkpoint.")
    if path.is_file():
        content, tensors = gguf.open_file(path)
        architecture, family = find(content, str(path))
    else:
        content = read_json(path / CONFIG)
        if "model_type" not in content and "model" in content:
            raise ConversionError(
                f"{path} is the work directory of a run: mmjax.read_run reads its model, and "
                "experiments.convert writes it in the format of Hugging Face."
            )
        architecture, family = find(content, str(path))
        if family.generation and (path / GENERATION).is_file():
            settings = read_json(path / GENERATION)
            content |= {key: settings[key] for key in family.generation if key in settings}
        tensors = files.open_directory(path)
    file_names = rename(tensors.shapes, family.renames, str(path))
    hf = transformers_config(content, str(path))
    source = Source(hf, frozenset(file_names), path if path.is_dir() else None)
    try:
        config = family.from_hf(source)
    except ValueError as error:
        raise ConversionError(f"{path}: {error}") from error
    origin = Origin(architecture, json.dumps(content, sort_keys=True), str(path))
    return Checkpoint(origin, family, config, tensors, file_names)


def float_dtype(dtype: Any) -> np.dtype:
    """What `dtype`, or a name such as "bfloat16", stands for.

    Raises:
      UnknownNameError: (a ValueError) if parameters cannot be of it.
    """
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    check_dtype(name)
    return jnp.dtype(name)


def from_pretrained(
    directory: str | Path,
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    rules: rule_tables.Table | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> nnx.Module:
    """The model in a directory of Hugging Face format, or in a GGUF file.

    Everything is checked before anything is read. Then each tensor goes from the file to the
    devices that hold it, one after the other, so that the host holds no more than one or two.

    Args:
      directory: with `config.json` and `model.safetensors` (or several files and their index).
      dtype: of the parameters and the computation, float32 if None. Vectors and scalars (norms,
        biases, temperatures) are kept in float32 in any case.
      mesh: of devices to lay the parameters on; the default device if None.
      rules: the table of sharding strategies, `mmjax.sharding.DEFAULT_RULES` if None.
      image_size: pixels, or (height, width), to interpolate position embeddings to.

    Returns:
      The module, with its config as `config` and where it comes from as `origin`.

    Raises:
      ConversionError: if the directory is no checkpoint, is damaged, of an unknown type, or does
        not fit its config; all problems are listed, and nothing is loaded.
      MeshError, RuleError: if the rules do not fit.
      UnknownNameError: on a dtype that is not float32, bfloat16 or float16.
    """
    checkpoint = open_checkpoint(directory)
    dtype = float_dtype(jnp.float32 if dtype is None else dtype)
    config = with_fields(checkpoint.config, dtype=dtype.name)
    graph, params = load(
        checkpoint._replace(config=config), placement(mesh, rules), lambda path, shape: dtype
    )
    if image_size is not None:
        config, params = resize.resized(config, params, image_size)
        graph, _ = structure(checkpoint.family.module(config), config)
    model = merge(graph, params)
    model.origin = checkpoint.origin
    return model


def model_config(directory: str | Path) -> dict[str, Any]:
    """The `config.model` of an experiment, for the model in a directory: its name and fields.

    Raises:
      ConversionError: see `from_pretrained`.
    """
    checkpoint = open_checkpoint(directory)
    model = checkpoint.family.module(checkpoint.config)
    names = [name for name in MODELS if MODELS[name][1] is model]
    if not names:
        raise ConversionError(
            f"{directory}: a {checkpoint.origin.architecture} is not trained on its own. Take its "
            "weights by config.init into a model that has such a part."
        )
    return {"name": names[0], **dataclasses.asdict(checkpoint.config)}


def load_params(directory: str | Path, targets: Params) -> Params:
    """Some parameters of a checkpoint, straight into sharded arrays.

    Position tables made for another resolution are interpolated, as the model would do.

    Args:
      targets: {path in that model: shape with sharding and type}.

    Returns:
      {path in that model: array}.

    Raises:
      ConversionError: if a parameter is not there, or has another shape; all are listed.
    """
    checkpoint = open_checkpoint(directory)
    _, shapes = structure(checkpoint.family.module(checkpoint.config), checkpoint.config)
    tables = resize.position_tables(checkpoint.config)
    resampled = {
        path
        for path, target in targets.items()
        if path in tables and shapes[path].shape != target.shape
    }
    problems = [
        f"  {path!r} is not there; {nearest(path, shapes)}"
        for path in targets
        if path not in shapes
    ]
    problems += [
        f"  {path!r} has shape {shapes[path].shape} there, {target.shape} here"
        for path, target in targets.items()
        if path in shapes and path not in resampled and shapes[path].shape != target.shape
    ]
    if problems:
        raise ConversionError(
            f"{directory} does not hold the parameters asked for:\n" + "\n".join(problems)
        )
    anywhere = SingleDeviceSharding(jax.local_devices()[0])

    def shardings(shapes: Params) -> dict[str, Sharding]:
        return {
            path: targets[path].sharding if path in targets and path not in resampled else anywhere
            for path in shapes
        }

    def dtype(path: str, shape: tuple[int, ...]) -> np.dtype:
        return targets[path].dtype if path in targets else np.dtype(np.float32)

    _, params = load(checkpoint, shardings, dtype, lambda path: path in targets)
    for path in resampled:
        table = resize.resized_table(params[path], tables[path], targets[path].shape[0])
        params[path] = jax.device_put(table, targets[path].sharding)
    return params


def load(
    checkpoint: Checkpoint,
    shardings: Callable[[Params], Mapping[str, Sharding]],
    dtype: Callable[[str, tuple[int, ...]], np.dtype],
    wanted: Callable[[str], bool] = lambda path: True,
) -> tuple[nnx.GraphDef, Params]:
    """The parameters of a checkpoint.

    Args:
      shardings: from shapes by path to shardings by path.
      dtype: (path, shape) -> type of a matrix or table.
      wanted: paths to load; the others are checked all the same, but not read.

    Raises:
      ConversionError: see `from_pretrained`.
    """
    config, family, tensors = checkpoint.config, checkpoint.family, checkpoint.tensors
    graph, shapes = structure(family.module(config), config)
    entries = lay_out(family.rows(config), shapes)
    found = {name: tensors.shapes[there] for name, there in checkpoint.file_names.items()}
    check(entries, found, family.ignored(config), tensors.where)
    targets = {
        path: jax.ShapeDtypeStruct(
            shape.shape,
            jnp.float32 if _is_vector(path, shape.shape) else dtype(path, shape.shape),
            sharding=place,
        )
        for (path, shape), place in zip(shapes.items(), shardings(shapes).values(), strict=True)
    }
    return graph, _read(entries, targets, tensors, checkpoint.file_names, wanted)


@functools.lru_cache(maxsize=16)
def structure(model: type[nnx.Module], config: Any) -> tuple[nnx.GraphDef, Params]:
    """Graph definition and shapes of `model(config)`, traced once for each config."""
    return abstract(lambda: model(config, rngs=nnx.Rngs(0)))


def with_fields(config: Any, **values: Any) -> Any:
    """A copy of a dataclass in which fields of these names, at any depth, have these values."""
    changes = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in values:
            changes[field.name] = values[field.name]
        elif dataclasses.is_dataclass(value):
            changes[field.name] = with_fields(value, **values)
    return dataclasses.replace(config, **changes)


def _is_vector(path: str, shape: Sequence[int]) -> bool:
    return len(shape) - ("layers" in path.split("/")) <= 1


def placement(
    mesh: Mesh | None, table: rule_tables.Table | None
) -> Callable[[Params], Mapping[str, Sharding]]:
    """Where parameters go: on a mesh by a table (`mmjax.sharding.DEFAULT_RULES` if None).

    Raises:
      ValueError: if there is a table but no mesh.
    """
    if mesh is None:
        if table is not None:
            raise ValueError("rules say how parameters lie on a mesh: give the mesh too.")
        place = SingleDeviceSharding(jax.local_devices()[0])
        return lambda shapes: dict.fromkeys(shapes, place)
    table = sharding.DEFAULT_RULES if table is None else table
    return lambda shapes: sharding.parameter_shardings(shapes, table, mesh)


def _read(
    entries: Sequence[Entry],
    targets: Mapping[str, jax.ShapeDtypeStruct],
    tensors: files.Tensors,
    file_names: Mapping[str, str],
    wanted: Callable[[str], bool],
) -> Params:
    params: Params = {}
    pending: Any = ()
    wanted_entries = [entry for entry in entries if any(wanted(path) for path in entry.paths)]
    # Memory that is used again is memory that need not be found, and cleared, for each tensor. Two,
    # since the tensor before may still be on its way to the devices while one is read.
    largest = max((tensors.size(file_names[entry.name]) for entry in wanted_entries), default=0)
    buffers = itertools.cycle([files.aligned(largest), files.aligned(largest)])
    for entry in wanted_entries:
        raw = tensors.read(file_names[entry.name], next(buffers))
        jax.block_until_ready(pending)
        structs = tuple(targets[path] for path in entry.paths)
        if entry.layer is None:
            arrays = _converter(entry.transform, structs)(_place(raw, entry, structs))
        else:
            parts = tuple(_layer_of(struct) for struct in structs)
            if entry.layer == 0:
                stacks = _allocator(structs)()
            else:
                stacks = tuple(params[path] for path in entry.paths)
            # In two programs: in one, XLA would transpose while it inserts, at a quarter the speed.
            layers = _converter(entry.transform, parts)(_place(raw, entry, parts))
            arrays = _inserter(structs)(stacks, layers, np.int32(entry.layer))
        params |= dict(zip(entry.paths, arrays, strict=True))
        pending = arrays
    jax.block_until_ready(pending)  # it may still be read from a buffer
    return {path: params[path] for path in targets if path in params and wanted(path)}


def _layer_of(stack: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Shape and sharding of one layer of a stack."""
    where = stack.sharding
    if isinstance(where, NamedSharding):
        where = NamedSharding(where.mesh, PartitionSpec(*where.spec[1:]))
    return jax.ShapeDtypeStruct(stack.shape[1:], stack.dtype, sharding=where)


def _place(raw: np.ndarray, entry: Entry, structs: Sequence[jax.ShapeDtypeStruct]) -> jax.Array:
    """The tensor on the devices, each of which gets the part it needs where that is known."""
    where = structs[0].sharding
    if isinstance(where, NamedSharding):
        spec = PartitionSpec()
        if entry.transform.spec is not None:
            missing = len(structs[0].shape) - len(where.spec)
            spec = entry.transform.spec(PartitionSpec(*where.spec, *(None,) * missing))
        where = NamedSharding(where.mesh, spec)
    return jax.make_array_from_callback(raw.shape, where, lambda index: raw[index])


@functools.lru_cache(maxsize=256)
def _allocator(structs: tuple[jax.ShapeDtypeStruct, ...]) -> Callable:
    return jax.jit(
        lambda: tuple(jnp.zeros(s.shape, s.dtype) for s in structs),
        out_shardings=tuple(s.sharding for s in structs),
    )


@functools.lru_cache(maxsize=256)
def _converter(transform: Transform, structs: tuple[jax.ShapeDtypeStruct, ...]) -> Callable:
    def convert(source):
        arrays = transform.to_ours(source)
        # Copied, since an array on a CPU may lie in the very buffer it was read into.
        return tuple(jnp.array(a, s.dtype, copy=True) for a, s in zip(arrays, structs, strict=True))

    return jax.jit(convert, out_shardings=tuple(s.sharding for s in structs))


@functools.lru_cache(maxsize=256)
def _inserter(structs: tuple[jax.ShapeDtypeStruct, ...]) -> Callable:
    def insert(stacks, layers, index):
        return tuple(
            jax.lax.dynamic_update_index_in_dim(stack, layer, index, 0)
            for stack, layer in zip(stacks, layers, strict=True)
        )

    # The stacks are given up: the layer is written in place.
    return jax.jit(insert, donate_argnums=0, out_shardings=tuple(s.sharding for s in structs))
