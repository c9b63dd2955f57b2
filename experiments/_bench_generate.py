"""Greedy generation in mmjax and in transformers, side by side, with the same weights.

Each side lives in a process of its own, and they work in turns. Both read the same directory:
--weights, or random weights of SmolLM2-135M's shape. On a GPU transformers has a static cache, for
which its `generate` compiles the step with torch.compile; on a CPU it is as it comes.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from experiments._turns import rivals


@dataclasses.dataclass(frozen=True)
class Job:
    """What is measured on both sides."""

    directory: str
    dtype: str
    device: str
    prompt: int


class MMJax:
    """Our side."""

    def __init__(self, job: Job):
        import mmjax
        from mmjax.generation import Generator

        self.job = job
        self.model = mmjax.from_pretrained(job.directory, dtype=job.dtype)
        self.generator = Generator(self.model)

    def run(self, batch: int, new: int) -> tuple[float, Any]:
        prompts = _prompts(batch, self.job.prompt)
        began = time.perf_counter()
        tokens = self.generator(prompts, max_new_tokens=new).tokens
        return time.perf_counter() - began, tokens


class Transformers:
    """The other side."""

    def __init__(self, job: Job):
        import torch
        from transformers import AutoModelForCausalLM

        self.job, self.torch = job, torch
        self.device = "cuda" if job.device == "gpu" else "cpu"
        if self.device == "cuda":
            # As generous as the other side: float32 products by tensor cores.
            torch.set_float32_matmul_precision("high")
        self.model = AutoModelForCausalLM.from_pretrained(
            job.directory, dtype=getattr(torch, job.dtype)
        ).to(self.device)
        self.model.generation_config.eos_token_id = None
        self.options = {"cache_implementation": "static"} if self.device == "cuda" else {}

    def run(self, batch: int, new: int) -> tuple[float, Any]:
        torch = self.torch
        prompts = torch.from_numpy(_prompts(batch, self.job.prompt)).to(self.device)
        began = time.perf_counter()
        with torch.inference_mode():
            out = self.model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
                **self.options,
            )
        tokens = out[:, self.job.prompt :].cpu().numpy()  # waits for the device
        return time.perf_counter() - began, tokens


SIDES = {"mmjax": MMJax, "transformers": Transformers}


def _prompts(batch: int, length: int) -> Any:
    import numpy as np

    return np.random.default_rng(0).integers(100, 30_000, (batch, length))


def _write(weights: str | None, directory: str) -> None:
    """The directory that both sides read."""
    from flax import nnx

    import mmjax
    from mmjax.models.lm import LM, LMConfig
    from mmjax.nn.rope import Rope

    if weights is not None:
        mmjax.save_pretrained(mmjax.from_pretrained(weights), directory)
        return
    config = LMConfig(
        vocab_size=49152,
        max_len=2048,
        width=576,
        depth=30,
        heads=9,
        kv_heads=3,
        mlp_width=1536,
        activation="silu",
        norm_eps=1e-5,
        tied=True,
        rope=Rope(theta=1e5),
    )
    model = LM(config, rngs=nnx.Rngs(0))
    mmjax.save_pretrained(model, directory, architecture="LlamaForCausalLM")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.bench generate", description=__doc__
    )
    parser.add_argument("--weights", help="a directory or GGUF file; random if not given")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=64, help="tokens in a prompt")
    parser.add_argument("--new", type=int, default=65, help="new tokens")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)

    import jax

    device = jax.default_backend()
    with tempfile.TemporaryDirectory() as scratch:
        directory = str(Path(scratch) / "model")
        # A process of its own: this one must not hold a GPU's memory.
        writer = multiprocessing.get_context("spawn").Process(
            target=_write, args=(args.weights, directory)
        )
        writer.start()
        writer.join()
        if writer.exitcode:
            raise RuntimeError("The weights could not be written; the reason stands above.")
        with rivals(SIDES, Job(directory, args.dtype, device, args.prompt)) as ask:
            print(
                f"\n{args.weights or 'SmolLM2-135M, random weights'}, {args.dtype}, {device}: "
                f"prompts of {args.prompt} tokens, {args.new} new ones, greedy; median of "
                f"{args.rounds} turns"
            )
            print(
                f"{'batch':>5}  {'':14}{'tokens/s':>10}{'ratio':>8}{'(min-max)':>14}"
                f"{'first token ms':>16}{'ratio':>8}{'first call s':>14}"
            )
            for batch in args.batch:
                _compare(ask, batch, args.new, args.rounds)
    print(
        "tokens/s: of decoding, the first token's time taken off. ratio: mmjax's speed over this "
        "row's, turn by turn. first call: the first of this batch, compilation included."
    )
    return 0


def _compare(ask: Any, batch: int, new: int, rounds: int) -> None:
    """Prints a row for each side, and whether they agree."""
    first, rate, whole = {}, {}, {}
    cold = {name: ask(name, "run", batch, new)[0] for name in SIDES}
    for name in SIDES:
        ask(name, "run", batch, 1)  # warm
    for _ in range(rounds):
        for name in SIDES:
            start, _ = ask(name, "run", batch, 1)
            total, whole[name] = ask(name, "run", batch, new)
            first.setdefault(name, []).append(start)
            rate.setdefault(name, []).append(batch * (new - 1) / (total - start))
    for name in SIDES:
        ratio, spread, sooner = "", "", ""
        if name != "mmjax":
            ratios = sorted(a / b for a, b in zip(rate["mmjax"], rate[name], strict=True))
            ratio = f"{statistics.median(ratios):.2f}x"
            spread = f"({ratios[0]:.2f}-{ratios[-1]:.2f})"
            earlier = [b / a for a, b in zip(first["mmjax"], first[name], strict=True)]
            sooner = f"{statistics.median(earlier):.2f}x"
        print(
            f"{batch:5}  {name:14}{statistics.median(rate[name]):10.1f}{ratio:>8}{spread:>14}"
            f"{1e3 * statistics.median(first[name]):16.0f}{sooner:>8}{cold[name]:14.1f}"
        )
    same = whole["mmjax"] == whole["transformers"]
    print(f"       {same.sum()} of {same.size} tokens are the same.", flush=True)
