"""The same CLIP in mmjax and in PyTorch (transformers), side by side.

Each side lives in a process of its own, and they work in turns. Both compute the same thing:
towers of equal shape, softmax loss, AdamW; random weights, since speed does not depend on them.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

from experiments._turns import rivals

# Towers as in Table 1 of Radford et al. (2021) where they are named B and L; S has ViT-S's image
# tower.
SIZES = {
    "S/16": dict(image=(384, 12, 6, 1536, 16), text=(384, 12, 6, 1536), embed=384),
    "B/16": dict(image=(768, 12, 12, 3072, 16), text=(512, 12, 8, 2048), embed=512),
    "B/32": dict(image=(768, 12, 12, 3072, 32), text=(512, 12, 8, 2048), embed=512),
    "L/14": dict(image=(1024, 24, 16, 4096, 14), text=(768, 12, 12, 3072), embed=768),
    "tiny": dict(image=(64, 2, 2, 128, 16), text=(64, 2, 2, 128), embed=64),
}
VOCABULARY, LENGTH, RESOLUTION = 49408, 77, 224


@dataclasses.dataclass(frozen=True)
class Job:
    """What is measured on both sides."""

    size: str
    batch: int
    dtype: str
    device: str
    remat: str
    unroll: int


class MMJax:
    """Our side."""

    def __init__(self, job: Job):
        import jax
        import numpy as np

        from mmjax import sharding
        from mmjax.params import merge
        from mmjax.train.experiment import base_config, prepare

        self.jax = jax
        shape = SIZES[job.size]
        width, depth, heads, mlp, patch = shape["image"]
        common = dict(
            activation="quick_gelu",
            norm_eps=1e-5,
            dtype=job.dtype,
            remat=job.remat,
            unroll=job.unroll,
        )
        image = dict(
            image_size=RESOLUTION,
            patch_size=patch,
            width=width,
            depth=depth,
            heads=heads,
            mlp_width=mlp,
            pooling="cls",
            position="learned",
            pre_norm=True,
            patch_bias=False,
            **common,
        )
        width, depth, heads, mlp = shape["text"]
        text = dict(
            vocab_size=VOCABULARY,
            max_len=LENGTH,
            width=width,
            depth=depth,
            heads=heads,
            mlp_width=mlp,
            attention="causal",
            pooling="argmax",
            padding="attend",
            **common,
        )
        config = base_config(
            task=dict(name="contrastive", loss="softmax", chunked=False),
            model=dict(name="clip", image=image, text=text, embed_dim=shape["embed"]),
            data=dict(tokenizer=None),
            optimizer=dict(
                name="adamw",
                learning_rate=1e-4,
                schedule=dict(name="constant"),
                weight_decay=0.1,
                clip_norm=None,
            ),
            train=dict(steps=1000, batch_size=job.batch),
            checkpoint=dict(every=1000),
        )
        experiment = prepare(config)
        random = np.random.default_rng(0)
        images, tokens = _inputs(random, job.batch)
        batch = sharding.global_batch(
            {"image": images, "text": tokens, "text_mask": np.ones(tokens.shape, bool)},
            experiment.mesh,
        )
        self.batch, self.state = batch, experiment.initial_state({})
        graphdef = experiment.graphdef

        def infer(params: Any, images: Any, tokens: Any) -> Any:
            model = merge(graphdef, params)
            return model.encode_image(images), model.encode_text(tokens)

        began = time.perf_counter()
        self.train_step = experiment.lower_step(batch).compile()
        self.train_compile = time.perf_counter() - began
        began = time.perf_counter()
        self.infer_step = (
            jax.jit(infer).lower(self.state.params, batch["image"], batch["text"]).compile()
        )
        self.infer_compile = time.perf_counter() - began
        self.train_flops = experiment.step_flops(batch)

    def run(self, mode: str, steps: int) -> float:
        began = time.perf_counter()
        for _ in range(steps):
            if mode == "train":
                self.state, out = self.train_step(self.state, self.batch)
            else:
                out = self.infer_step(self.state.params, self.batch["image"], self.batch["text"])
        self.jax.block_until_ready(out)
        return (time.perf_counter() - began) / steps

    def facts(self) -> dict[str, Any]:
        device = self.jax.local_devices()[0]
        memory = device.memory_stats()
        return {
            "peak_gib": memory["peak_bytes_in_use"] / 2**30 if memory else peak_rss(),
            "compile_s": {"train": self.train_compile, "infer": self.infer_compile},
            "train_flops": self.train_flops,
            "device": device.device_kind,
        }


class Torch:
    """transformers' CLIPModel with scaled-dot-product attention, and torch's fused AdamW."""

    compiled = False

    def __init__(self, job: Job):
        import numpy as np
        import torch
        from transformers import CLIPConfig, CLIPModel

        self.torch = torch
        shape = SIZES[job.size]
        width, depth, heads, mlp, patch = shape["image"]
        vision = dict(
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=mlp,
            patch_size=patch,
            image_size=RESOLUTION,
        )
        width, depth, heads, mlp = shape["text"]
        text = dict(
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=mlp,
            vocab_size=VOCABULARY,
            max_position_embeddings=LENGTH,
            eos_token_id=2,
        )
        config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=shape["embed"])
        config._attn_implementation = "sdpa"
        self.device = "cuda" if job.device == "gpu" else "cpu"
        self.model = CLIPModel(config).to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, weight_decay=0.1, fused=True
        )
        images, tokens = _inputs(np.random.default_rng(0), job.batch)
        # Contiguous NCHW, which is how its image processor delivers pictures.
        images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        self.images = torch.from_numpy(images).to(self.device)
        self.tokens = torch.from_numpy(tokens).long().to(self.device)
        self.half = job.dtype == "bfloat16"
        if self.device == "cuda":
            # As generous as the other side: float32 products by tensor cores.
            torch.set_float32_matmul_precision("high")
        self.forward: Callable = torch.compile(self.model) if self.compiled else self.model
        self.compile_s = {}
        for mode in ("train", "infer"):
            began = time.perf_counter()
            self.run(mode, 1)
            self.compile_s[mode] = time.perf_counter() - began if self.compiled else 0.0

    def run(self, mode: str, steps: int) -> float:
        torch = self.torch
        began = time.perf_counter()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.half):
            for _ in range(steps):
                if mode == "train":
                    loss = self.forward(
                        input_ids=self.tokens, pixel_values=self.images, return_loss=True
                    ).loss
                    loss.backward()
                    self.optimizer.step()
                    self.optimizer.zero_grad(set_to_none=True)
                else:
                    with torch.inference_mode():
                        self.forward(input_ids=self.tokens, pixel_values=self.images)
        if self.device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / steps

    def facts(self) -> dict[str, Any]:
        torch = self.torch
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.device == "cuda" else peak_rss()
        return {"peak_gib": peak, "compile_s": self.compile_s}


class TorchCompiled(Torch):
    """The same under torch.compile."""

    compiled = True


def _inputs(random: Any, batch: int) -> tuple[Any, Any]:
    import numpy as np

    images = random.standard_normal((batch, RESOLUTION, RESOLUTION, 3), np.float32)
    tokens = random.integers(1, VOCABULARY - 1, (batch, LENGTH), dtype=np.int32)
    tokens[:, -1] = VOCABULARY - 1
    return images, tokens


def peak_rss() -> float:
    """GiB of this process at its highest, with libraries."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.bench contrastive", description=__doc__
    )
    parser.add_argument("--size", choices=SIZES, default="S/16")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps in each turn")
    parser.add_argument("--remat", default="none", help="mmjax's policy")
    parser.add_argument("--unroll", type=int, default=1, help="mmjax's layers per scan iteration")
    args = parser.parse_args(argv)

    import jax

    device = jax.default_backend()
    job = Job(args.size, args.batch, args.dtype, device, args.remat, args.unroll)
    sides = {"mmjax": MMJax, "PyTorch": Torch}
    if device == "gpu":
        sides["PyTorch compiled"] = TorchCompiled
    times: dict[tuple[str, str], list[float]] = {}
    with rivals(sides, job) as ask:
        for mode in ("infer", "train"):
            for name in sides:
                ask(name, "run", mode, 1)  # warm
            for _ in range(args.rounds):
                for name in sides:
                    seconds = ask(name, "run", mode, args.steps)
                    times.setdefault((mode, name), []).append(seconds)
        facts = {name: ask(name, "facts") for name in sides}

    peak = peak_flops(device, facts["mmjax"]["device"], args.dtype)
    flops = {"train": facts["mmjax"]["train_flops"], "infer": facts["mmjax"]["train_flops"] / 3}
    print(
        f"\nCLIP {args.size}, {RESOLUTION} px, batch {args.batch}, {args.dtype}, "
        f"{facts['mmjax']['device']}; median of {args.rounds} turns of {args.steps} step(s)"
    )
    print(
        f"{'':8}{'':18}{'img/s':>9}{'ratio':>8}{'(min-max)':>14}{'MFU':>7}{'peak GiB':>10}"
        f"{'compile s':>11}"
    )
    for mode in ("infer", "train"):
        for name in sides:
            mine, theirs = times[mode, "mmjax"], times[mode, name]
            median = statistics.median(theirs)
            ratios = sorted(b / a for a, b in zip(mine, theirs, strict=True))
            spread = f"({ratios[0]:.2f}-{ratios[-1]:.2f})" if name != "mmjax" else ""
            ratio = f"{statistics.median(ratios):.2f}x" if name != "mmjax" else ""
            print(
                f"{mode:8}{name:18}{args.batch / median:9.1f}{ratio:>8}{spread:>14}"
                f"{flops[mode] / median / peak:7.0%}{facts[name]['peak_gib']:10.2f}"
                f"{facts[name]['compile_s'][mode]:11.1f}"
            )
    print(
        "ratio: mmjax's speed over this row's, turn by turn. MFU: matmul FLOPs over "
        + (
            "the data sheet's peak."
            if device == "gpu"
            else "the speed of a 2048-cubed product here."
        )
        + " Peak memory is of the whole process on a CPU, of the device's allocator on a GPU."
    )
    return 0


def peak_flops(device: str, kind: str, dtype: str) -> float:
    """FLOP/s that could be had at best."""
    from mmjax.flops import PEAK_TFLOPS

    if device != "cpu":
        return PEAK_TFLOPS[kind] * 1e12
    import jax
    import jax.numpy as jnp

    x = jnp.ones((2048, 2048), dtype)
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    best = min(_timed(lambda: product(x).block_until_ready()) for _ in range(20))
    return 2 * 2048**3 / best


def _timed(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
