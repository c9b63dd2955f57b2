"""What the arms of a study cost when they run: measured side by side, in one process.

python -m mmjax.study.speed DIRECTORY

Every arm reads one image and a question of 32 tokens (the prefill of an answer), with random
parameters, which take as long as trained ones. Arms take turns, round after round, so that whatever
else the machine does is shared by all. Written to costs.json in the study's directory.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mmjax import params
from mmjax.flops import matmul_flops
from mmjax.models import MODELS, FlamingoConfig, MllamaConfig, VLMConfig
from mmjax.study.grid import COSTS, STUDY, Arm, Study, arms_of, config_of, first_command
from mmjax.train.handover import model_dataclass
from mmjax.train.workdir import write_atomically

QUESTION, ROUNDS = 32, 15


def prefill(config: VLMConfig) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """What is run, and what it is given: parameters, tokens [1, T], images and places."""
    make = MODELS[config.name][1]
    graph, weights = params.split(nnx.jit(lambda: make(config, rngs=nnx.Rngs(0)))())
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


def measure(study: Study, arms: list[Arm], directory: Path) -> dict[str, dict[str, float]]:
    """{arm: GFLOP, milliseconds (the median of all rounds) and MiB of a prefill}"""
    programs, costs = {}, {}
    for arm in arms:
        config = model_dataclass(config_of(first_command(study, arm, directory)).model.to_dict())
        run, given = prefill(config)
        program = jax.jit(run).lower(*given).compile()
        memory = program.memory_analysis()
        total = (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            + memory.temp_size_in_bytes
            - memory.alias_size_in_bytes
        )
        costs[arm.name] = {"prefill GFLOP": matmul_flops(run, *given) / 1e9}
        costs[arm.name]["prefill MiB"] = total / 2**20
        jax.block_until_ready(program(*given))
        programs[arm.name] = program, given
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(ROUNDS):
        for name, (program, given) in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(program(*given))
            seconds[name].append(time.perf_counter() - began)
    for name, times in seconds.items():
        costs[name]["prefill ms"] = 1e3 * statistics.median(times)
    return costs


def main(directory: Path) -> None:
    """See the module."""
    study = Study(**json.loads((directory / STUDY).read_text("utf-8")))
    costs = measure(study, arms_of(study), directory)
    device = jax.devices()[0]
    text = {"device": device.device_kind, "platform": device.platform, "arms": costs}
    write_atomically(directory / COSTS, json.dumps(text, indent=2))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
