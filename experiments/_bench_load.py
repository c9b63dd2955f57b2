"""Loading a Llama of 7B shape from sharded bfloat16 files: peak memory and time.

    python -m experiments.bench load [--layers 32] [--devices 8] [--directory DIR]

Each reader runs in a process of its own: mmjax on one device and on simulated ones, and
transformers (if it and PyTorch are installed). The weights are random; they are written once, to
--directory if given (13.5 GB for 32 layers), and the files are read once before, so that all find
them in the page cache if that is large enough.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from mmjax.convert.files import Item, write_directory

WIDTH, HEADS, MLP, VOCABULARY = 4096, 32, 11008, 32000


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="experiments.bench load")
    parser.add_argument("--layers", type=int, default=32, help="32 is 7B")
    parser.add_argument("--devices", type=int, default=8, help="simulated, for the sharded run")
    parser.add_argument("--directory", type=Path, help="where the weights are, or go")
    parser.add_argument("--reader", choices=READERS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.reader:
        print(json.dumps(READERS[args.reader](args.directory)))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        directory = args.directory or Path(scratch) / "llama"
        write(directory, args.layers)
        size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
        for file in directory.glob("*.safetensors"):
            with open(file, "rb", buffering=0) as stream:
                while stream.read(2**24):
                    pass
        print(f"Llama of {args.layers} layers: {size / 1e9:.2f} GB in bfloat16")
        readers = {"mmjax": 1, "mmjax_sharded": args.devices}
        if importlib.util.find_spec("torch"):
            readers["transformers"] = 1
        for reader, devices in readers.items():
            row = _measure(reader, directory, devices)
            base, peak = row["base"], row["peak"]
            print(
                f"{reader:16} {devices} device(s): {row['seconds']:6.1f} s  peak {peak / 1e9:6.2f} "
                f"GB, {(peak - base) / size:.2f} x the files above the {base / 1e9:.2f} GB that "
                f"the process has before; {peak / size:.2f} x in all"
            )
            if "shares" in row:
                print(f"{'':16} largest share of a device: {max(row['shares']) / size:.3f}")
    return 0


def _measure(reader: str, directory: Path, devices: int) -> dict:
    command = [sys.executable, "-m", "experiments.bench", "load", "--reader", reader]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    run = subprocess.run(
        [*command, "--directory", str(directory)],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return json.loads(run.stdout.strip().splitlines()[-1])


def write(directory: Path, layers: int) -> None:
    """Random weights, without ever holding more than one tensor; nothing if they are there."""
    if (directory / "config.json").exists():
        return
    directory.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).normal(scale=0.02, size=2**20).astype(ml_dtypes.bfloat16)
    kind = np.dtype(ml_dtypes.bfloat16)

    def item(name: str, *shape: int) -> Item:
        size = int(np.prod(shape))
        return Item(name, kind, shape, lambda: np.resize(noise, size).reshape(shape))

    def items() -> Iterator[Item]:
        yield item("model.embed_tokens.weight", VOCABULARY, WIDTH)
        for layer in range(layers):
            prefix = f"model.layers.{layer}."
            for name in ("q", "k", "v", "o"):
                yield item(f"{prefix}self_attn.{name}_proj.weight", WIDTH, WIDTH)
            yield item(f"{prefix}mlp.gate_proj.weight", MLP, WIDTH)
            yield item(f"{prefix}mlp.up_proj.weight", MLP, WIDTH)
            yield item(f"{prefix}mlp.down_proj.weight", WIDTH, MLP)
            yield item(f"{prefix}input_layernorm.weight", WIDTH)
            yield item(f"{prefix}post_attention_layernorm.weight", WIDTH)
        yield item("model.norm.weight", WIDTH)
        yield item("lm_head.weight", VOCABULARY, WIDTH)

    write_directory(directory, list(items()), 5 * 10**9)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": MLP,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(config))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _mmjax(directory: Path, mesh=None) -> dict:
    import jax

    import mmjax
    from mmjax.params import split

    jax.block_until_ready(jax.numpy.zeros(1))
    base, start = _peak(), time.perf_counter()
    model = mmjax.from_pretrained(directory, dtype="bfloat16", mesh=mesh)
    arrays = jax.block_until_ready(split(model)[1])
    shares = dict.fromkeys(jax.devices(), 0)
    for array in arrays.values():
        for shard in array.addressable_shards:
            shares[shard.device] += shard.data.nbytes
    seconds = time.perf_counter() - start
    return {"base": base, "peak": _peak(), "seconds": seconds, "shares": list(shares.values())}


def _mmjax_sharded(directory: Path) -> dict:
    from mmjax.sharding import MeshConfig, make_mesh

    return _mmjax(directory, make_mesh(MeshConfig(data=1, fsdp=-1)))


def _transformers(directory: Path) -> dict:
    import torch
    import transformers

    base, start = _peak(), time.perf_counter()
    model = transformers.LlamaForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    # Weights may be mapped files until they are touched.
    total = sum(float(p.view(torch.int16).max()) for p in model.parameters())
    seconds = time.perf_counter() - start
    assert np.isfinite(total)
    return {"base": base, "peak": _peak(), "seconds": seconds}


READERS = {"mmjax": _mmjax, "mmjax_sharded": _mmjax_sharded, "transformers": _transformers}
