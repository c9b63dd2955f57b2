"""Compile a training step for hardware that is not here: memory, FLOPs and collectives per device.

    python -m experiments.plan --config configs/siglip/b16.py --mesh data=2,fsdp=4
    python -m experiments.plan --config configs/siglip/b16.py --topology v5e:4x4 --mesh fsdp=16

Without --topology the devices are simulated CPU ones: shardings and collectives are those of XLA's
partitioner, memory and FLOPs those of the CPU program. With --topology and the `tpu` extra the real
TPU compiler makes the real TPU program. Nothing is run: FLOPs and bytes are facts about the
program, times are not given.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
import time
from collections.abc import Sequence

from experiments import common
from mmjax.config import ConfigError, dataclass_from, parse_arg
from mmjax.sharding import AXES, MeshConfig, make_mesh

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8}
_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
# "%name = f32[8,64]{1,0} all-gather(" or "= (f32[..], f32[..]) all-reduce-start("; `-done` repeats
# it.
_COLLECTIVE = re.compile(rf"= (?P<shapes>[^=]*?) (?P<kind>{_KINDS})(-start)?\(")
_SHAPE = re.compile(r"(?P<dtype>[a-z]+[0-9]*)\[(?P<dims>[0-9,]*)\]")
_COMPUTATION = re.compile(r"%(?P<name>[\w.-]+) \(.*\) -> (?P<result>.*) \{$")
_CALLS = re.compile(r"calls=%([\w.-]+)")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_OP_NAME = re.compile(r'op_name="(?P<name>[^"]*)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation in the text of a compiled program.

    Attributes:
      kind: "all-gather", ...
      mebibytes: of its result on one device.
      source: the JAX operation it was made for.
      looped: whether it stands within a loop, and so runs several times.
    """

    kind: str
    mebibytes: float
    source: str
    looped: bool


def collectives(text: str) -> list[Collective]:
    """The collectives of a compiled program (`compiled.as_text()`)."""
    lines = re.sub(r"/\*.*?\*/", "", text).splitlines()
    callers = {}
    for line in lines:
        called, name = _CALLS.search(line), _OP_NAME.search(line)
        if called and name:
            callers[called[1]] = name["name"]
    found, channels, computation = [], set(), None
    for line in lines:
        computation = _COMPUTATION.match(line) or computation
        match = _COLLECTIVE.search(line)
        if match is None:
            continue
        kind, shapes, name = match["kind"], match["shapes"], _OP_NAME.search(line)
        # One that runs beside computation is written once for each part of that computation, under
        # its channel. Those that the compiler combined have no name, and share channels.
        channel = _CHANNEL.search(line)
        if channel and name:
            if channel[1] in channels:
                continue
            channels.add(channel[1])
        source = name["name"] if name else callers.get(computation and computation["name"])
        if computation and computation["name"].startswith("all-reduce-scatter"):
            # A TPU's reduce-scatter: an all-reduce of which each device keeps its part.
            kind, shapes = "reduce-scatter", computation["result"]
        source = source or "(made by the compiler)"
        found.append(Collective(kind, _mebibytes(shapes), source, "/while/body" in source))
    return found


def _mebibytes(shapes: str) -> float:
    size = 0
    for shape in _SHAPE.finditer(shapes):
        dims = filter(None, shape["dims"].split(","))
        size += _BYTES.get(shape["dtype"], 4) * math.prod(map(int, dims))
    return size / 2**20


def main(argv: Sequence[str] | None) -> int:
    parser = common.parser(__doc__, workdir=False)
    parser.add_argument("--mesh", help="sizes such as data=2,fsdp=4; config.mesh by default")
    parser.add_argument("--topology", help="a TPU topology such as v5e:4x4 or v5p:2x2x2")
    parser.add_argument("--all", action="store_true", help="list every collective, not a summary")
    args, config = common.parse(parser, argv)
    import jax

    if args.mesh:
        # An axis that is not named has one device.
        config.mesh = parse_arg(args.mesh, **dict.fromkeys(AXES, 1))
    mesh_config = dataclass_from(MeshConfig, config.mesh, "config.mesh")
    if args.topology:
        devices, platform = _tpu_devices(args.topology), "tpu"
    else:
        count = mesh_config.data * mesh_config.fsdp * mesh_config.tensor
        if count < 1:
            raise ConfigError("Say the size of every axis: --mesh data=2,fsdp=4.")
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
        devices, platform = jax.devices(), "cpu"
    mesh = make_mesh(mesh_config, devices)

    from mmjax.train.experiment import prepare

    experiment = prepare(config, mesh)
    began = time.perf_counter()
    lowered = experiment.lower_step(experiment.batch_shapes(), platform)
    traced = time.perf_counter() - began
    compiled = lowered.compile()
    seconds = time.perf_counter() - began - traced
    flops = experiment.step_flops(experiment.batch_shapes())
    memory = compiled.memory_analysis()
    shape = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    print(f"\n{args.config} on {len(devices)} x {devices[0].device_kind} ({shape})")
    print(f"traced in {traced:.1f} s, compiled in {seconds:.1f} s\n")
    print("per device")
    for label, size in (
        ("arguments (state and batch)", memory.argument_size_in_bytes),
        ("temporaries", memory.temp_size_in_bytes),
        ("results", memory.output_size_in_bytes),
        ("of these results, in the place of arguments", memory.alias_size_in_bytes),
    ):
        print(f"  {label:44}{size / 2**20:12.1f} MiB")
    peak = (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )
    print(f"  {'together':44}{peak / 2**20:12.1f} MiB")
    print(f"  {'matmul FLOPs of a step':44}{flops / len(devices) / 1e12:12.3f} TFLOP")
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(
            "The step compiles, but this jaxlib cannot print the program of this libtpu "
            f"({str(error).splitlines()[0][:200]}). Install the version that belongs to it: "
            "pip install -e .[tpu]"
        ) from None
    _print_collectives(collectives(text), args.all)
    return 0


def _print_collectives(found: list[Collective], everything: bool) -> None:
    print("\ncollectives in the program (those in a loop run once an iteration)")
    if not found:
        print("  none")
    rows: dict[tuple, list[Collective]] = collections.defaultdict(list)
    for item in found:
        source = item.source if everything else _shorten(item.source)
        rows[item.kind, item.looped, source].append(item)
    print(f"  {'count':>5}  {'kind':20}{'MiB each':>12}  {'loop':5} made for")
    for (kind, looped, source), items in sorted(rows.items()):
        sizes = sorted(item.mebibytes for item in items)
        size = f"{sizes[0]:.3g}" if sizes[0] == sizes[-1] else f"{sizes[0]:.3g}-{sizes[-1]:.3g}"
        print(f"  {len(items):5d}  {kind:20}{size:>12}  {'yes' if looped else '':5} {source}")


def _shorten(source: str) -> str:
    """Forward or backward, and the last part: "backward: dot_general"."""
    if source.startswith("("):
        return source
    if source.startswith("state."):
        return "a parameter, whole for its use"
    way = "backward" if "transpose(" in source else "forward"
    operation = re.sub(r"[.)\d]+$", "", source.split(";")[0].rsplit("/", 1)[-1])
    return f"{way}: {operation}"


def _tpu_devices(topology: str) -> list:
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(topology, "tpu").devices)
    except Exception as error:
        raise ConfigError(
            f"The topology {topology!r} cannot be had: {str(error).splitlines()[0][:300]} It needs "
            "`pip install -e .[tpu]`, and names such as v5e:4x4, v5p:2x2x2 or v6e:4x4."
        ) from None


if __name__ == "__main__":
    common.run(main)
