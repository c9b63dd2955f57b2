"""Compiled memory of the contrastive losses per device, as the number of devices grows.

    python -m experiments.bench loss-memory [--local-batch 256] [--width 512] [--devices 2 8 32]

Loss and gradients are compiled, not run, for simulated CPU devices at a fixed batch per device. The
bytes are XLA's own temporary buffers; its sizes hold for that program, not for a GPU's or TPU's.
"""

from __future__ import annotations

import argparse
import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mmjax.losses import (
    ring_sigmoid_contrastive,
    ring_softmax_contrastive,
    sigmoid_contrastive,
    softmax_contrastive,
)

# kind -> (dense loss, ring loss, number of scalars)
LOSSES = {
    "softmax": (softmax_contrastive, ring_softmax_contrastive, 1),
    "sigmoid": (sigmoid_contrastive, ring_sigmoid_contrastive, 2),
}
COLLECTIVES = r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("


def compile_loss(kind: str, ring: bool, devices: int, local_batch: int, width: int):
    """Loss and all gradients, compiled for `devices` simulated devices.

    Returns:
      The jax.stages.Compiled; `memory_analysis().temp_size_in_bytes` is per device.

    Raises:
      ValueError: if JAX has fewer devices.
    """
    if devices > len(jax.devices()):
        raise ValueError(
            f"{devices} devices asked for, JAX has {len(jax.devices())}: run this in a process of "
            f"its own, or set jax_num_cpu_devices={devices} before JAX starts."
        )
    dense, ringed, scalars = LOSSES[kind]
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    loss = functools.partial(ringed, mesh=mesh, axes=("data",)) if ring else dense

    def ratio(*args):
        numerator, denominator = loss(*args)
        return numerator / denominator

    def abstract(shape, spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

    features = abstract((devices * local_batch, width), P("data"))
    arguments = (features, features, *[abstract((), P())] * scalars)
    step = jax.value_and_grad(ratio, argnums=tuple(range(len(arguments))))
    outputs = (NamedSharding(mesh, P()), tuple(argument.sharding for argument in arguments))
    return jax.jit(step, out_shardings=outputs).lower(*arguments).compile()


def collectives(compiled) -> dict[str, int]:
    """How often each kind of collective stands in the compiled program."""
    return dict(collections.Counter(re.findall(COLLECTIVES, compiled.as_text())))


def main(argv: list[str]) -> None:
    """Print the table; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="experiments.bench loss-memory", description=__doc__)
    parser.add_argument("--local-batch", type=int, default=256, help="pairs per device")
    parser.add_argument("--width", type=int, default=512, help="feature width")
    parser.add_argument("--devices", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(args.devices))

    print(
        f"Temporary memory per device of loss + gradients, MiB, at {args.local_batch} pairs of "
        f"width {args.width} per device (float32, compiled for simulated CPU devices)"
    )
    rows = [(kind, ring) for kind in LOSSES for ring in (False, True)]
    names = [f"{kind} {'ring' if ring else 'dense'}" for kind, ring in rows]
    print(f"{'devices':>8}" + "".join(f"{name:>16}" for name in names))
    for devices in args.devices:
        sizes = [
            compile_loss(kind, ring, devices, args.local_batch, args.width)
            .memory_analysis()
            .temp_size_in_bytes
            for kind, ring in rows
        ]
        print(f"{devices:>8}" + "".join(f"{size / 2**20:>16.2f}" for size in sizes), flush=True)
    print(f"Collectives in the program for {args.devices[-1]} devices:")
    for (kind, ring), name in zip(rows, names, strict=True):
        compiled = compile_loss(kind, ring, args.devices[-1], args.local_batch, args.width)
        found = ", ".join(f"{count} {op}" for op, count in sorted(collectives(compiled).items()))
        print(f"{name:>16}: {found}")


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
