"""The device mesh, and how parameters, batches and activations lie on it.

The mesh has three axes: `data` (replicated parameters), `fsdp` (sharded parameters) and `tensor`
(sharded computation within a layer). A batch is divided over `data` and `fsdp`. Parameters follow a
rules table whose values are strategies, joined by "+" and applied in order:

- `replicate`: every device holds the whole array;
- `tensor(d)`: dimension d lies on the tensor axis;
- `fsdp`: the largest dimension that is still free and divisible lies on the fsdp axis.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmjax import rules

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Arrays below this size are not worth a gather: norms, biases, scalars.
FSDP_MIN_SIZE = 2**14

# One table serves every model, since all are built from the layers of mmjax.nn.
DEFAULT_RULES: rules.Table = (
    (r"(.*/)?(query|key|value|up|gate)/(kernel|lora/b)", "tensor(-1)+fsdp"),
    (r"(.*/)?(out|down)/(kernel|lora/a)", "tensor(-2)+fsdp"),
    (r".*", "fsdp"),
)

# The logical names that layers give to the dimensions of their activations (mmjax.nn.partition).
ACTIVATIONS: Mapping[str, Any] = {
    "batch": BATCH_AXES,
    "tokens": None,
    "embed": None,
    "heads": "tensor",
    "mlp": "tensor",
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; at most one is -1, which takes the devices that are left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


class MeshError(ValueError):
    """A mesh that does not fit the devices, or arrays that do not fit the mesh."""


def mesh_shape(config: MeshConfig, num_devices: int) -> tuple[int, int, int]:
    """The sizes of (data, fsdp, tensor), with -1 filled in.

    Raises:
      MeshError: if the sizes do not multiply to the number of devices.
    """
    sizes = [config.data, config.fsdp, config.tensor]
    shown = ",".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
        raise MeshError(f"Mesh {shown}: sizes must be positive, and at most one may be -1.")
    fixed = math.prod(size for size in sizes if size > 0)
    if -1 in sizes and num_devices % fixed == 0:
        sizes[sizes.index(-1)] = num_devices // fixed
    if math.prod(sizes) != num_devices:
        raise MeshError(
            f"Mesh {shown} does not divide the {num_devices} device(s) that are here. Change "
            "config.mesh.{data,fsdp,tensor} so that their product is "
            f"{num_devices} (one of them may be -1: what is left)."
        )
    return tuple(sizes)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over the devices given (all devices of all processes by default).

    Between slices of a multi-slice system, where the network is slower, only the data axis runs.

    Raises:
      MeshError: if the sizes do not fit.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = mesh_shape(config, len(devices))
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if len(slices) > 1:
        if shape[0] % len(slices):
            raise MeshError(f"The data axis ({shape[0]}) must divide by {len(slices)} slices.")
        inner = (shape[0] // len(slices), *shape[1:])
        grid = mesh_utils.create_hybrid_device_mesh(inner, (len(slices), 1, 1), devices)
    elif devices[0].platform == "cpu":
        grid = np.asarray(devices).reshape(shape)
    else:
        grid = mesh_utils.create_device_mesh(shape, devices)
    return Mesh(grid, AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading dimension over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_shards(mesh: Mesh) -> int:
    """Over how many shards a batch is divided."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch(batch_size: int, mesh: Mesh, *, accumulate: int, processes: int) -> None:
    """Raises MeshError if a global batch cannot be divided evenly."""
    shards = batch_shards(mesh)
    if shards % processes:
        raise MeshError(
            f"data x fsdp = {shards} shards of the batch do not divide over {processes} processes: "
            "each reads its own rows. Let config.mesh.tensor lie within one process."
        )
    step = math.lcm(shards * accumulate, processes)
    if batch_size < 1 or batch_size % step:
        lower = batch_size // step * step
        options = f"{lower} or {lower + step}" if lower > 0 else f"{step}"
        raise MeshError(
            f"A batch of {batch_size} does not divide over data x fsdp = {shards} shards, "
            f"{accumulate} accumulated part(s) and {processes} process(es). "
            f"Nearest train.batch_size: {options}."
        )


_STRATEGY = re.compile(r"(replicate|fsdp)|tensor\((-?\d+)\)")


def parameter_spec(path: str, shape: Sequence[int], strategy: str, mesh: Mesh) -> PartitionSpec:
    """Where a parameter lies, by a strategy such as "tensor(-1)+fsdp".

    Scalars and small arrays stay whole under `fsdp`; sharding along the stacked `layers` dimension
    is avoided, since the scan over layers would gather it at every step.

    Raises:
      MeshError: on an unknown strategy, or a tensor dimension that is missing or indivisible.
    """
    spec: list[str | None] = [None] * len(shape)
    for part in strategy.split("+"):
        parsed = _STRATEGY.fullmatch(part.strip())
        if not parsed:
            raise MeshError(
                f"Sharding strategy {part!r} of {path!r} is unknown. "
                "Valid: replicate, fsdp, tensor(dimension), joined by '+'."
            )
        if parsed[2] is not None:
            dim = int(parsed[2])
            if not -len(shape) <= dim < len(shape):
                raise MeshError(f"{path!r} of shape {tuple(shape)} has no dimension {dim}.")
            if shape[dim] % mesh.shape["tensor"]:
                raise MeshError(
                    f"Dimension {dim} of {path!r}, shape {tuple(shape)}, does not divide by the "
                    f"tensor axis ({mesh.shape['tensor']}). Choose another mesh.tensor, or give "
                    "this parameter the strategy 'fsdp' or 'replicate' in rules.sharding."
                )
            if mesh.shape["tensor"] > 1:
                spec[dim] = "tensor"
        elif parsed[1] == "fsdp" and mesh.shape["fsdp"] > 1 and math.prod(shape) >= FSDP_MIN_SIZE:
            first = 1 if "layers" in path.split("/") else 0
            free = [
                dim
                for dim in range(first, len(shape))
                if spec[dim] is None and shape[dim] % mesh.shape["fsdp"] == 0
            ]
            if free:
                spec[max(free, key=lambda dim: (shape[dim], dim))] = "fsdp"
    return PartitionSpec(*spec)


def parameter_shardings(
    params: Mapping[str, Any], table: rules.Table, mesh: Mesh
) -> dict[str, NamedSharding]:
    """A sharding for each parameter.

    Args:
      params: arrays or shapes by path.
      table: rows of (pattern, strategy). Of `DEFAULT_RULES`, which are for every model, rows may
        match nothing: a tokenizer of convolutions alone has none of their layers.
      mesh: the mesh.

    Raises:
      RuleError, MeshError: if table, parameters and mesh do not fit.
    """
    if tuple(map(tuple, table)) == DEFAULT_RULES:
        table = [row for row in table if any(re.fullmatch(row[0], path) for path in params)]
    strategies = rules.match(table, params, name="rules.sharding")
    return {
        path: NamedSharding(mesh, parameter_spec(path, leaf.shape, strategies[path], mesh))
        for path, leaf in params.items()
    }


def activation_constraint(mesh: Mesh):
    """What `mmjax.nn.partition.activation_sharding` takes: logical names to this mesh.

    A dimension that the mesh does not divide is left to the compiler.
    """

    def constraint(x, names):
        spec = []
        for name, size in zip(names, x.shape, strict=True):
            axes = None if name is None else ACTIVATIONS[name]
            parts = math.prod(
                mesh.shape[a] for a in ([axes] if isinstance(axes, str) else axes or ())
            )
            spec.append(axes if axes and size % parts == 0 else None)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))

    return constraint


def place_like_sharding(tree: Any, shardings: Any) -> Any:
    """Put host arrays on the mesh, each process giving the parts its devices hold."""

    def place(x, sharding):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, tree, shardings)


def global_batch(arrays: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch become part of one global array each."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in arrays.items()
    }
