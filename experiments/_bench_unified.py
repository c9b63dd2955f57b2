"""A unified model of Chameleon's shape in mmjax and in transformers, side by side.

Training: rows of text and of an image, which each side's frozen tokenizer makes codes of; the loss
is that of all tokens, words and codes (transformers' class hides codes from its own loss, so its
stack and head are called one after the other). Generation: greedy, text after an image and text.
Both sides have the same weights, in processes of their own, and work in turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments._bench_contrastive import peak_flops, peak_rss
from experiments._turns import rivals

# Chameleon-7B: width 4096, 32 blocks, MLPs of 11008, images of 512 pixels and 32 x 32 codes of
# 8192, a vocabulary of 65,536. "cpu" is that, scaled to two cores.
SIZES = {
    "cpu": dict(lm=(512, 8, 8, 1376), vocab=8192, codes=1024, pixels=128, base=32),
    "gpu": dict(lm=(2048, 16, 16, 5504), vocab=65_536, codes=8192, pixels=256, base=128),
    "tiny": dict(lm=(32, 2, 2, 64), vocab=512, codes=64, pixels=32, base=32),
}
MULTIPLIERS, FACTOR = (1, 1, 2, 2), 8
TEXT = 64  # words of a row, half before its image
IMAGE, BEGIN, END, FIRST_CODE = 5, 6, 7, 8


@dataclasses.dataclass(frozen=True)
class Job:
    """What is measured on both sides."""

    directory: str
    size: str
    batch: int
    dtype: str
    device: str
    new: int

    @property
    def codes(self) -> int:
        """Of an image."""
        return (SIZES[self.size]["pixels"] // FACTOR) ** 2

    def inputs(self, rows: int) -> tuple[Any, Any]:
        """Images [B, H, W, 3], and tokens with places for their codes."""
        import numpy as np

        random = np.random.default_rng(0)
        size = SIZES[self.size]
        images = random.uniform(-1, 1, (rows, size["pixels"], size["pixels"], 3))
        first = FIRST_CODE + size["codes"]
        words = random.integers(first, size["vocab"], (rows, TEXT), dtype=np.int32)
        marks = np.array([BEGIN, *[IMAGE] * self.codes, END], np.int32)
        before, after = np.split(words, 2, axis=1)
        tokens = np.concatenate([before, np.tile(marks, (rows, 1)), after], axis=1)
        return images.astype(np.float32), tokens


class MMJax:
    """Our side."""

    def __init__(self, job: Job):
        self.job = job

    def prepare(self) -> dict[str, Any]:
        import jax
        import numpy as np

        import mmjax
        from mmjax import convert, sharding
        from mmjax.generation import Generator
        from mmjax.train.experiment import base_config, load_initial, prepare

        job = self.job
        images, tokens = job.inputs(job.batch)
        length = tokens.shape[1]
        fields = convert.model_config(job.directory)
        fields |= dict(follow="any", lm=fields["lm"] | dict(dtype=job.dtype))
        layout = dict(name="codes", preset="siglip", size=images.shape[1], tokens=job.codes)
        conversation = dict(
            template="stream",
            max_len=length,
            images=1,
            layout=layout | dict(begin="<racm3:break>", end="<eoss>"),
            image_token=IMAGE,
        )
        config = base_config(
            task=dict(name="unified"),
            model=fields,
            init=((".*", job.directory, r"\g<0>"),),
            data=dict(
                tokenizer=None,
                train=dict(sources=[dict(name="json", form="drawing")], conversation=conversation),
            ),
            optimizer=dict(
                name="adamw",
                learning_rate=1e-5,
                schedule=dict(name="constant"),
                weight_decay=0.0,
                clip_norm=None,
            ),
            rules=dict(trainable=(("tokenizer/.*", False), (".*", True))),
            train=dict(steps=1000, batch_size=job.batch),
            checkpoint=dict(every=1000),
        )
        experiment = prepare(config)
        here = tokens == IMAGE
        batch = {
            "tokens": tokens,
            "images": images[:, None],
            "place": np.where(here, np.cumsum(here, axis=1) - 1, -1).astype(np.int32),
            "segments": np.ones(tokens.shape, np.int32),
            "weights": np.ones(tokens.shape, np.float32),
        }
        self.batch = sharding.global_batch(batch, experiment.mesh)
        self.state = experiment.initial_state(load_initial(experiment))
        began = time.perf_counter()
        self.step = experiment.lower_step(self.batch).compile()
        seconds = time.perf_counter() - began
        self.generator = Generator(mmjax.from_pretrained(job.directory, dtype=job.dtype))
        device = jax.local_devices()[0]
        return {
            "tokens": tokens.size,
            "flops": experiment.step_flops(self.batch),
            "compile_s": seconds,
            "device": device.device_kind,
        }

    def train(self) -> tuple[float, float]:
        import jax

        began = time.perf_counter()
        self.state, metrics = self.step(self.state, self.batch)
        jax.block_until_ready(metrics)
        return time.perf_counter() - began, float(metrics["loss"])

    def generate(self, batch: int, new: int) -> tuple[float, Any]:
        images, tokens = self.job.inputs(batch)
        began = time.perf_counter()
        made = self.generator(tokens, images[:, None], max_new_tokens=new).tokens
        return time.perf_counter() - began, made

    def peak(self) -> float:
        import jax

        memory = jax.local_devices()[0].memory_stats()
        return memory["peak_bytes_in_use"] / 2**30 if memory else peak_rss()


class Transformers:
    """The other side."""

    compiled = False

    def __init__(self, job: Job):
        import torch

        self.job, self.torch = job, torch
        self.device = "cuda" if job.device == "gpu" else "cpu"
        if self.device == "cuda":
            # As generous as the other side: float32 products by tensor cores.
            torch.set_float32_matmul_precision("high")

    def prepare(self) -> dict[str, Any]:
        from transformers import ChameleonForConditionalGeneration as Chameleon

        torch, job = self.torch, self.job

        def load() -> Any:
            model = Chameleon.from_pretrained(job.directory, attn_implementation="sdpa")
            return model.to(self.device)

        self.writer = load()  # stays as it is, as the other side's
        self.writer.generation_config.eos_token_id = None
        self.model = model = load()
        model.model.vqmodel.requires_grad_(False)
        self.stack: Callable = torch.compile(model.model) if self.compiled else model.model
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=True)
        self.pictures, self.tokens = self._inputs(job.batch)
        with torch.no_grad():
            ids = model.model.get_image_tokens(self.pictures).to(self.device)
        self.labels = self.tokens.clone()
        self.labels[self.tokens == IMAGE] = ids.flatten().long()
        began = time.perf_counter()
        self.train()
        return {"compile_s": time.perf_counter() - began}

    def _inputs(self, rows: int) -> tuple[Any, Any]:
        images, tokens = self.job.inputs(rows)
        # Contiguous NCHW, which is how its image processor delivers pictures.
        pictures = self.torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        return pictures.to(self.device), self.torch.from_numpy(tokens).long().to(self.device)

    def _autocast(self) -> Any:
        enabled = self.job.dtype == "bfloat16"
        return self.torch.autocast(self.device, self.torch.bfloat16, enabled=enabled)

    def train(self) -> tuple[float, float]:
        torch = self.torch
        began = time.perf_counter()
        with self._autocast():
            hidden = self.stack(
                input_ids=self.tokens, pixel_values=self.pictures, use_cache=False
            ).last_hidden_state
            logits = self.model.lm_head(hidden[:, :-1]).float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), self.labels[:, 1:].flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        value = loss.item()  # waits for the device
        return time.perf_counter() - began, value

    def generate(self, batch: int, new: int) -> tuple[float, Any]:
        torch = self.torch
        pictures, tokens = self._inputs(batch)
        options = {"cache_implementation": "static"} if self.device == "cuda" else {}
        began = time.perf_counter()
        with torch.inference_mode(), self._autocast():
            out = self.writer.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                pixel_values=pictures,
                max_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
                **options,
            )
        made = out[:, tokens.shape[1] :].cpu().numpy()  # waits for the device
        return time.perf_counter() - began, made

    def peak(self) -> float:
        torch = self.torch
        return torch.cuda.max_memory_allocated() / 2**30 if self.device == "cuda" else peak_rss()


class TransformersCompiled(Transformers):
    """The same, trained under torch.compile."""

    compiled = True


def _write(size: dict[str, Any], directory: str) -> None:
    """Random weights, which both sides read."""
    import torch
    from transformers import (
        ChameleonConfig,
        ChameleonForConditionalGeneration,
        ChameleonVQVAEConfig,
    )

    width, depth, heads, mlp = size["lm"]
    names = {"<image>": IMAGE, "<racm3:break>": BEGIN, "<eoss>": END}
    letters = str.maketrans("0123456789", "ABCDEFGHIJ")
    for code in range(size["codes"]):
        names[f"IMGIMG{str(code).translate(letters)}Z"] = FIRST_CODE + code
    torch.manual_seed(0)
    model = ChameleonForConditionalGeneration(
        ChameleonConfig(
            vocab_size=size["vocab"],
            hidden_size=width,
            intermediate_size=mlp,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            eos_token_id=None,
            vq_config=ChameleonVQVAEConfig(
                resolution=size["pixels"],
                base_channels=size["base"],
                channel_multiplier=list(MULTIPLIERS),
                num_embeddings=size["codes"],
            ),
            vocabulary_map=names,
        )
    )
    model.save_pretrained(directory)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.bench unified", description=__doc__
    )
    parser.add_argument("--size", choices=SIZES)
    parser.add_argument("--batch", type=int, default=4, help="rows of a training step")
    parser.add_argument("--generate", type=int, nargs="+", default=[1, 8], help="rows generated")
    parser.add_argument("--new", type=int, default=65, help="new tokens")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)

    import jax

    device = jax.default_backend()
    size = args.size or ("gpu" if device == "gpu" else "cpu")
    sides: dict[str, Callable] = {"mmjax": MMJax, "transformers": Transformers}
    if device == "gpu":
        sides["transformers compiled"] = TransformersCompiled
    with tempfile.TemporaryDirectory() as scratch:
        directory = str(Path(scratch) / "model")
        _write(SIZES[size], directory)
        job = Job(directory, size, args.batch, args.dtype, device, args.new)
        with rivals(sides, job) as ask:
            facts = {name: ask(name, "prepare") for name in sides}
            _training(ask, job, facts, args.rounds)
            for batch in args.generate:
                _generation(ask, [name for name in sides if "compiled" not in name], batch, args)
            peaks = ", ".join(f"{name} {ask(name, 'peak'):.2f}" for name in sides)
    print(
        "ratio: mmjax's speed over this row's, turn by turn. Generation: tokens/s of decoding, the "
        f"first token's time taken off.\npeak GiB: {peaks}"
    )
    return 0


def _training(ask: Any, job: Job, facts: dict[str, dict], rounds: int) -> None:
    ours = facts["mmjax"]
    peak = peak_flops(job.device, ours["device"], job.dtype)
    for name in facts:
        ask(name, "train")  # warm
    times: dict[str, list[float]] = {}
    losses = {}
    for _ in range(rounds):
        for name in facts:
            seconds, losses[name] = ask(name, "train")
            times.setdefault(name, []).append(seconds)
    print(
        f"\nChameleon's shape, size {job.size!r}, {job.dtype}, {ours['device']}: training, "
        f"{job.batch} rows of {TEXT} words and {job.codes} codes; median of {rounds} turns"
    )
    print(
        f"{'':24}{'tokens/s':>9}{'ratio':>8}{'(min-max)':>13}{'MFU':>6}{'loss':>8}{'compile s':>11}"
    )
    for name in facts:
        step = statistics.median(times[name])
        ratio, spread = _ratio(times[name], times["mmjax"]) if name != "mmjax" else ("", "")
        print(
            f"{name:24}{ours['tokens'] / step:9.0f}{ratio:>8}{spread:>13}"
            f"{ours['flops'] / step / peak:6.0%}{losses[name]:8.4f}"
            f"{facts[name]['compile_s']:11.1f}",
            flush=True,
        )


def _generation(ask: Any, names: list[str], batch: int, args: argparse.Namespace) -> None:
    rates: dict[str, list[float]] = {}
    made = {}
    for name in names:
        ask(name, "generate", batch, args.new)
        ask(name, "generate", batch, 1)  # warm
    for _ in range(args.rounds):
        for name in names:
            first, _ = ask(name, "generate", batch, 1)
            whole, made[name] = ask(name, "generate", batch, args.new)
            rates.setdefault(name, []).append((whole - first) / (args.new - 1) / batch)
    print(f"generation, {batch} rows, {args.new} new tokens")
    for name in names:
        ratio, spread = _ratio(rates[name], rates["mmjax"]) if name != "mmjax" else ("", "")
        print(f"{name:24}{1 / statistics.median(rates[name]):9.1f}{ratio:>8}{spread:>13}")
    same = made["mmjax"] == made["transformers"]
    print(f"{same.sum()} of {same.size} tokens are the same.", flush=True)


def _ratio(theirs: list[float], ours: list[float]) -> tuple[str, str]:
    """Of times, turn by turn: the median, and its range."""
    ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
    return f"{statistics.median(ratios):.2f}x", f"({ratios[0]:.2f}-{ratios[-1]:.2f})"
