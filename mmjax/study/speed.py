"""What the arms of a study cost when they run: measured side by side, in one process.

python -m mmjax.study.speed DIRECTORY

Every arm reads one image and a question of 32 tokens (the prefill of an answer), with parameters of
zeros, which take as long as trained ones. Arms take turns, round after round, so that whatever else
the machine does is shared by all. arms.json in the study's directory says what they are, and what
was measured is written to costs.json.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mmjax import params
from mmjax.flops import matmul_flops
from mmjax.models import MODELS, FlamingoConfig, MllamaConfig, VLMConfig
from mmjax.study.grid import ARMS, COSTS, config_of
from mmjax.train.handover import model_dataclass
from mmjax.train.workdir import write_atomically

QUESTION, ROUNDS = 32, 15


# {(path, shape and type): parameters}, which the arms share where they have the same.
Shared = dict[tuple[str, jax.ShapeDtypeStruct], jax.Array]


def prefill(config: VLMConfig, shared: Shared) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """What is run, and what it is given: parameters, tokens [1, T], images and places."""
    make = MODELS[config.name][1]
    graph, shapes = params.abstract(lambda: make(config, rngs=nnx.Rngs(0)))
    weights = {}
    for path, shape in shapes.items():
        key = path, jax.ShapeDtypeStruct(shape.shape, shape.dtype)
        if key not in shared:
            shared[key] = jnp.zeros(shape.shape, shape.dtype)
        weights[path] = shared[key]
    # One token stands for an image that is looked at from between the blocks.
    visual = 1 if isinstance(config, FlamingoConfig | MllamaConfig) else config.image_tokens
    length = visual + QUESTION
    tokens = jnp.ones((1, length), jnp.int32)
    place = jnp.where(jnp.arange(length) < visual, jnp.arange(length), -1)[None]
    size = config.encoder.image_size
    images = jnp.zeros((1, config.frames, size, size, 3), jnp.float32)

    def run(weights, tokens, images, place):
        model = params.merge(graph, weights)
        return model.prefill(
            tokens, jnp.ones(tokens.shape, bool), length=length, images=images, place=place
        )[0]

    return run, (weights, tokens, images, place)


def measure(arms: Mapping[str, Sequence[str]]) -> tuple[dict[str, dict], dict[str, str]]:
    """{arm: GFLOP, milliseconds (the median of all rounds) and MiB of a prefill}; and {arm: why it
    could not be measured}.

    Args:
      arms: {arm: arguments of `experiments.train`}.
    """
    programs, costs, failures = {}, {}, {}
    shared: Shared = {}
    for name, arguments in arms.items():
        config = model_dataclass(config_of(arguments).model.to_dict())
        try:
            run, given = prefill(config, shared)
            program = jax.jit(run).lower(*given).compile()
            jax.block_until_ready(program(*given))
        except jax.errors.JaxRuntimeError as error:  # no room for it, say
            failures[name] = str(error)
            continue
        memory = program.memory_analysis()
        total = (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            + memory.temp_size_in_bytes
            - memory.alias_size_in_bytes
        )
        costs[name] = {"prefill GFLOP": matmul_flops(run, *given) / 1e9}
        costs[name]["prefill MiB"] = total / 2**20
        programs[name] = program, given
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(ROUNDS):
        for name, (program, given) in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(program(*given))
            seconds[name].append(time.perf_counter() - began)
    for name, times in seconds.items():
        costs[name]["prefill ms"] = 1e3 * statistics.median(times)
    return costs, failures


def main(directory: Path) -> None:
    """See the module."""
    arms = json.loads((directory / ARMS).read_text("utf-8"))
    costs, failures = measure(arms)
    device = jax.devices()[0]
    name = device.device_kind
    if device.platform == "cpu":
        name = f"{len(os.sched_getaffinity(0))} cores of a CPU"
    text = {"device": name, "commands": arms, "arms": costs, "failed": failures}
    write_atomically(directory / COSTS, json.dumps(text, indent=2))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
