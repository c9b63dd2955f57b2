"""Flash attention against plain attention on this GPU: what they differ in, and their speed.

    python -m experiments.bench attention [--batch 8] [--length 1024] [--rounds 5]

For each mask and shape of heads, in bfloat16: the largest difference of the output and of all
gradients from plain attention in float32, as a share of the largest number (bfloat16 has steps of
0.4%), and how many times faster forward and backward are than plain attention in bfloat16, turn by
turn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.config import ConfigError
from mmjax.nn import masks
from mmjax.nn.attention import attend, pick_kernel
from mmjax.nn.masks import Mask

HEADS = ((16, 16, 64), (16, 4, 64), (8, 8, 128))  # of queries, of keys, and their width


def make_masks(batch: int, length: int) -> dict[str, Mask | None]:
    """None, causal, one of padding, and one of packed samples."""
    place = jnp.arange(length)[None] * 4 // length
    segments = jnp.broadcast_to(jnp.where(place < 3, place + 1, 0), (batch, length))
    return {
        "none": None,
        "causal": masks.causal(length),
        "padding": masks.padding(segments > 0),
        "packed": masks.blocks(jnp.ones((batch, length), bool), group=segments),
    }


def differentiated(kernel: str, mask: Mask | None) -> Any:
    """(query, key, value, weights) -> the output and the gradients of its weighted sum."""

    def loss(query, key, value, weights):
        out = attend(query, key, value, mask, kernel=kernel).astype(jnp.float32)
        return jnp.sum(out * weights), out

    @jax.jit
    def run(*inputs):
        (_, out), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*inputs)
        return [out, *gradients]

    return run


def difference(found: list[jax.Array], expected: list[jax.Array]) -> float:
    """The largest, as a share of the largest number of each array."""
    pairs = [
        (np.asarray(f, np.float32), np.asarray(e)) for f, e in zip(found, expected, strict=True)
    ]
    return max(float(np.abs(f - e).max() / np.abs(e).max()) for f, e in pairs)


def main(argv: list[str]) -> int:
    """Print the table; see the module's docstring.

    Raises:
      ConfigError: there is no GPU.
    """
    parser = argparse.ArgumentParser(prog="experiments.bench attention", description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    if jax.default_backend() != "gpu":
        raise ConfigError(
            "Flash attention is cuDNN's, and JAX sees no GPU here: pip install -e .[cuda]"
        )
    print(f"{jax.devices()[0].device_kind}, batch {args.batch}, {args.length} tokens, bfloat16")
    print(f"{'mask':<10}{'heads':>14}{'difference':>12}{'faster':>10}")
    rng = np.random.default_rng(0)
    for heads, kv_heads, width in HEADS:
        shapes = [(args.batch, args.length, h, width) for h in (heads, kv_heads, kv_heads)]
        half = [jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes]
        weights = jnp.asarray(rng.normal(size=shapes[0]), jnp.float32)
        for name, mask in make_masks(args.batch, args.length).items():
            picked = pick_kernel(half[0], half[1], mask)
            exact = differentiated("xla", mask)(*[x.astype(jnp.float32) for x in half], weights)
            sides = {kernel: differentiated(kernel, mask) for kernel in (picked, "xla")}
            off = difference(sides[picked](*half, weights), exact)
            seconds: dict[str, list[float]] = {kernel: [] for kernel in sides}
            jax.block_until_ready([run(*half, weights) for run in sides.values()])
            for _ in range(args.rounds):
                for kernel, run in sides.items():
                    began = time.perf_counter()
                    for _ in range(10):
                        out = run(*half, weights)
                    jax.block_until_ready(out)
                    seconds[kernel].append(time.perf_counter() - began)
            ratio = statistics.median(seconds["xla"]) / statistics.median(seconds[picked])
            shape = f"{heads}/{kv_heads} x {width}"
            print(f"{name:<10}{shape:>14}{off:>12.2%}{ratio:>9.2f}x  ({picked})", flush=True)
    return 0
