"""Vision-language models of LLaVA-1.5's shape in mmjax and in transformers, side by side.

For each connector: instruction tuning (the encoder frozen, connector and language model trained
with AdamW, half of the text supervised), and the latency of an answer to a question about an image.
Each side lives in a process of its own, and they work in turns; weights are random, since speed
does not depend on them.

The other side is transformers' LLaVA with scaled-dot-product attention; for connectors other than
its own, transformers' module of that connector stands in the place of its projector. Connectors
that transformers has not are measured alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

from experiments._bench_contrastive import peak_flops, peak_rss
from experiments._turns import rivals

# LLaVA-1.5-7B is CLIP L/14 at 336 pixels (width 1024, 24 blocks, 576 patches) and Llama (width
# 4096, 32 blocks, MLPs of 11008). "cpu" is that, scaled to two cores.
SIZES = {
    "cpu": dict(image=(168, 14, 384, 12, 6, 1536), lm=(768, 12, 12, 2048), vocab=32_064),
    "gpu": dict(image=(336, 14, 1024, 24, 16, 4096), lm=(2048, 24, 16, 5632), vocab=32_064),
    "tiny": dict(image=(56, 14, 32, 2, 2, 64), lm=(32, 2, 2, 64), vocab=512),
}
QUESTION, ANSWER, NEW = 32, 80, 17


@dataclasses.dataclass(frozen=True)
class Job:
    """What is measured on both sides."""

    size: str
    batch: int
    dtype: str
    device: str

    @property
    def side(self) -> int:
        """Patches of an image, down and across."""
        pixels, patch, *_ = SIZES[self.size]["image"]
        return pixels // patch

    def connector(self, name: str) -> dict[str, Any]:
        """The fields of a connector: a quarter of the patches where it compresses."""
        width = SIZES[self.size]["image"][2]
        grid = (self.side // 2, self.side // 2)
        latents = grid[0] * grid[1]
        narrow = dict(heads=width // 32, head_dim=32)
        fields = {
            "linear": {},
            "mlp": {},
            "pooling": dict(grid=grid),
            "pixel_shuffle": dict(factor=2),
            "c_abstractor": dict(grid=grid, width=width),
            "perceiver": dict(latents=latents, depth=2, **narrow),
            "idefics2": dict(latents=latents, depth=2, kv_heads=max(width // 128, 1), **narrow),
            "qformer": dict(
                queries=latents, width=width, depth=4, heads=width // 32, mlp_width=4 * width
            ),
        }
        return {"name": name, **fields[name]}

    def inputs(self, visual: int) -> tuple[Any, Any, Any]:
        """Images, tokens with room for visual ones, and which are supervised."""
        import numpy as np

        random = np.random.default_rng(0)
        pixels = SIZES[self.size]["image"][0]
        vocab = SIZES[self.size]["vocab"]
        images = random.standard_normal((self.batch, 1, pixels, pixels, 3), np.float32)
        text = random.integers(1, vocab - 1, (self.batch, QUESTION + ANSWER), dtype=np.int32)
        places = np.full((self.batch, visual), vocab - 1, np.int32)
        tokens = np.concatenate([text[:, :1], places, text[:, 1:]], axis=1)
        supervised = np.zeros(tokens.shape, bool)
        supervised[:, -ANSWER:] = True
        return images, tokens, supervised


CONNECTORS = (
    "linear",
    "mlp",
    "pooling",
    "pixel_shuffle",
    "c_abstractor",
    "perceiver",
    "idefics2",
    "qformer",
)


class MMJax:
    """Our side."""

    def __init__(self, job: Job):
        self.job = job

    def prepare(self, name: str) -> dict[str, Any]:
        import jax
        import numpy as np

        from mmjax import sharding
        from mmjax.generation import Generator
        from mmjax.params import merge
        from mmjax.train.experiment import base_config, prepare
        from mmjax.train.handover import model_dataclass

        job = self.job
        pixels, patch, width, depth, heads, mlp = SIZES[job.size]["image"]
        encoder = dict(
            image_size=pixels,
            patch_size=patch,
            width=width,
            depth=depth,
            heads=heads,
            mlp_width=mlp,
            activation="quick_gelu",
            norm_eps=1e-5,
            pooling="cls",
            position="learned",
            pre_norm=True,
            patch_bias=False,
            dtype=job.dtype,
        )
        width, depth, heads, mlp = SIZES[job.size]["lm"]
        vocab = SIZES[job.size]["vocab"]
        lm = dict(
            vocab_size=vocab,
            max_len=2048,
            width=width,
            depth=depth,
            heads=heads,
            mlp_width=mlp,
            activation="silu",
            norm_eps=1e-5,
            tied=False,
            rope=dict(theta=1e4),
            dtype=job.dtype,
        )
        model = dict(
            name="vlm",
            encoder=encoder,
            connector=job.connector(name),
            lm=lm,
            image_token=vocab - 1,
        )
        visual = model_dataclass(model).image_tokens
        images, tokens, supervised = job.inputs(visual)
        length = tokens.shape[1]
        layout = dict(name="whole", preset="clip", size=pixels, tokens=visual)
        conversation = dict(
            template="vicuna_v1",
            max_len=length,
            images=1,
            layout=layout,
            max_targets=ANSWER,
            image_token=vocab - 1,
        )
        config = base_config(
            task=dict(name="vlm", targets=ANSWER),
            model=model,
            data=dict(
                tokenizer=None,
                train=dict(sources=[dict(name="json", form="llava")], conversation=conversation),
            ),
            optimizer=dict(
                name="adamw",
                learning_rate=1e-5,
                schedule=dict(name="constant"),
                weight_decay=0.0,
                clip_norm=None,
            ),
            rules=dict(trainable=(("encoder/.*", False), (".*", True))),
            train=dict(steps=1000, batch_size=job.batch),
            checkpoint=dict(every=1000),
        )
        experiment = prepare(config)
        here = tokens == vocab - 1
        batch = {
            "tokens": tokens,
            "images": images,
            "place": np.where(here, np.cumsum(here, axis=1) - 1, -1).astype(np.int32),
            "segments": np.ones(tokens.shape, np.int32),
            "weights": supervised.astype(np.float32),
        }
        self.batch = sharding.global_batch(batch, experiment.mesh)
        self.state = experiment.initial_state({})
        began = time.perf_counter()
        self.step = experiment.lower_step(self.batch).compile()
        seconds = time.perf_counter() - began
        # Copies: a training step gives the parameters it was given away.
        params = jax.tree.map(jax.numpy.copy, self.state.params)
        self.generator = Generator(merge(experiment.graphdef, params))
        self.question = (tokens[:1, : QUESTION + visual], images[:1])
        device = jax.local_devices()[0]
        return {
            "tokens": tokens.size,
            "visual": visual,
            "flops": experiment.step_flops(self.batch),
            "compile_s": seconds,
            "device": device.device_kind,
        }

    def train(self) -> float:
        import jax

        began = time.perf_counter()
        self.state, metrics = self.step(self.state, self.batch)
        jax.block_until_ready(metrics)
        return time.perf_counter() - began

    def answer(self) -> float:
        tokens, images = self.question
        began = time.perf_counter()
        self.generator(tokens, images, max_new_tokens=NEW)
        return time.perf_counter() - began

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

    def prepare(self, name: str) -> dict[str, Any]:
        from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
        from transformers import LlavaForConditionalGeneration as Llava

        torch, job = self.torch, self.job
        pixels, patch, width, depth, heads, mlp = SIZES[job.size]["image"]
        vision = CLIPVisionConfig(
            image_size=pixels,
            patch_size=patch,
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=mlp,
        )
        wide, depth, heads, mlp = SIZES[job.size]["lm"]
        vocab = SIZES[job.size]["vocab"]
        text = LlamaConfig(
            vocab_size=vocab,
            hidden_size=wide,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=mlp,
            eos_token_id=None,
        )
        config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=vocab - 1)
        config._attn_implementation = "sdpa"
        model = Llava(config)
        fields = job.connector(name)
        if name not in MODULES:
            return {"alone": True}
        visual = job.side**2
        if MODULES[name] is not None:
            model.model.multi_modal_projector = MODULES[name](torch, fields, width, wide, job.side)
            with torch.no_grad():
                features = torch.zeros(1, job.side**2, width)
                visual = model.model.multi_modal_projector(features).shape[1]
        model.model.vision_tower.requires_grad_(False)
        model.generation_config.eos_token_id = None
        self.model = model.to(self.device)
        self.forward: Callable = torch.compile(self.model) if self.compiled else self.model
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=True)
        images, tokens, supervised = job.inputs(visual)
        # Contiguous NCHW, which is how its image processor delivers pictures.
        pictures = torch.from_numpy(images[:, 0]).permute(0, 3, 1, 2).contiguous()
        self.pictures = pictures.to(self.device)
        self.tokens = torch.from_numpy(tokens).long().to(self.device)
        labels = torch.where(torch.from_numpy(supervised), torch.from_numpy(tokens).long(), -100)
        self.labels = labels.to(self.device)
        self.asked = QUESTION + visual
        began = time.perf_counter()
        self.train()
        return {"alone": False, "compile_s": time.perf_counter() - began}

    def train(self) -> float:
        torch = self.torch
        began = time.perf_counter()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.job.dtype == "bfloat16"):
            loss = self.forward(
                input_ids=self.tokens, pixel_values=self.pictures, labels=self.labels
            ).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def answer(self) -> float:
        torch = self.torch
        tokens = self.tokens[:1, : self.asked]
        options = {"cache_implementation": "static"} if self.device == "cuda" else {}
        began = time.perf_counter()
        with (
            torch.inference_mode(),
            torch.autocast(self.device, torch.bfloat16, enabled=self.job.dtype == "bfloat16"),
        ):
            out = self.model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                pixel_values=self.pictures[:1],
                max_new_tokens=NEW,
                do_sample=False,
                pad_token_id=0,
                **options,
            )
        out.cpu()  # waits for the device
        return time.perf_counter() - began

    def peak(self) -> float:
        torch = self.torch
        return torch.cuda.max_memory_allocated() / 2**30 if self.device == "cuda" else peak_rss()


class TransformersCompiled(Transformers):
    """The same, trained under torch.compile."""

    compiled = True


def _pooling(torch: Any, fields: dict, width: int, wide: int, side: int) -> Any:
    class Pooling(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.pool = torch.nn.AdaptiveAvgPool2d(fields["grid"])
            self.linear = torch.nn.Linear(width, wide)

        def forward(self, x):
            x = x.transpose(1, 2).unflatten(2, (side, side))
            return self.linear(self.pool(x).flatten(2).transpose(1, 2))

    return Pooling()


def _pixel_shuffle(torch: Any, fields: dict, width: int, wide: int, side: int) -> Any:
    from transformers import Idefics3Config
    from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

    return Idefics3Connector(
        Idefics3Config(
            vision_config={"hidden_size": width},
            text_config={"model_type": "llama", "hidden_size": wide},
            scale_factor=fields["factor"],
        )
    )


def _perceiver(torch: Any, fields: dict, width: int, wide: int, side: int) -> Any:
    from transformers import IdeficsConfig
    from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

    config = IdeficsConfig(vision_config={"embed_dim": width})
    resampler = IdeficsPerceiverResampler(
        config, width, fields["depth"], fields["heads"], fields["head_dim"], fields["latents"]
    )
    return torch.nn.Sequential(resampler, torch.nn.Linear(width, wide))


def _idefics2(torch: Any, fields: dict, width: int, wide: int, side: int) -> Any:
    from transformers import Idefics2Config
    from transformers.models.idefics2.modeling_idefics2 import Idefics2Connector

    class Connector(torch.nn.Module):
        def __init__(self):
            super().__init__()
            config = Idefics2Config(
                vision_config={"hidden_size": width},
                text_config={"model_type": "mistral", "hidden_size": wide},
                perceiver_config={
                    "hidden_size": wide,
                    "resampler_n_latents": fields["latents"],
                    "resampler_depth": fields["depth"],
                    "resampler_n_heads": fields["heads"],
                    "resampler_head_dim": fields["head_dim"],
                    "num_key_value_heads": fields["kv_heads"],
                },
            )
            config.text_config.intermediate_size = 4 * wide
            config._attn_implementation = "sdpa"
            config.perceiver_config._attn_implementation = "sdpa"
            self.connector = Idefics2Connector(config)

        def forward(self, x):
            return self.connector(x, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device))

    return Connector()


def _qformer(torch: Any, fields: dict, width: int, wide: int, side: int) -> Any:
    from transformers import Blip2QFormerConfig
    from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel

    class Connector(torch.nn.Module):
        def __init__(self):
            super().__init__()
            config = Blip2QFormerConfig(
                hidden_size=fields["width"],
                num_hidden_layers=fields["depth"],
                num_attention_heads=fields["heads"],
                intermediate_size=fields["mlp_width"],
                encoder_hidden_size=width,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
            self.queries = torch.nn.Parameter(torch.zeros(1, fields["queries"], fields["width"]))
            self.qformer = Blip2QFormerModel(config)
            self.linear = torch.nn.Linear(fields["width"], wide)

        def forward(self, x):
            queries = self.queries.expand(x.shape[0], -1, -1)
            out = self.qformer(query_embeds=queries, encoder_hidden_states=x)
            return self.linear(out.last_hidden_state)

    return Connector()


# What stands in the place of LLaVA's projector; None: itself.
MODULES: dict[str, Callable | None] = {
    "linear": lambda torch, fields, width, wide, side: torch.nn.Linear(width, wide),
    "mlp": None,
    "pooling": _pooling,
    "pixel_shuffle": _pixel_shuffle,
    "perceiver": _perceiver,
    "idefics2": _idefics2,
    "qformer": _qformer,
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.bench vlm", description=__doc__)
    parser.add_argument("--size", choices=SIZES)
    parser.add_argument("--connectors", nargs="+", choices=CONNECTORS, default=CONNECTORS)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)

    import jax

    device = jax.default_backend()
    job = Job(args.size or ("gpu" if device == "gpu" else "cpu"), args.batch, args.dtype, device)
    sides: dict[str, Callable] = {"mmjax": MMJax, "transformers": Transformers}
    if device == "gpu":
        sides["transformers compiled"] = TransformersCompiled
    peaks = dict.fromkeys(sides, 0.0)
    for number, connector in enumerate(args.connectors):
        # In new processes: what the one before leaves in memory slows the next.
        with rivals(sides, job) as ask:
            facts = {name: ask(name, "prepare", connector) for name in sides}
            if number == 0:
                peak = peak_flops(device, facts["mmjax"]["device"], args.dtype)
                _head(job, args.rounds, facts["mmjax"]["device"])
            _compare(ask, connector, facts, peak, args.rounds)
            peaks = {name: max(peaks[name], ask(name, "peak")) for name in sides}
    print(
        "ratio: mmjax's speed over this row's, turn by turn. answer: to a question about an image, "
        f"{QUESTION} tokens beside the visual ones, {NEW} new tokens, batch 1. MFU: matmul FLOPs "
        "of a training step over "
        + ("the data sheet's peak." if device == "gpu" else "the speed of a 2048-cubed product.")
    )
    print("peak GiB: " + ", ".join(f"{name} {peak:.2f}" for name, peak in peaks.items()))
    return 0


def _head(job: Job, rounds: int, kind: str) -> None:
    print(
        f"\nLLaVA-1.5's shape, size {job.size!r}, batch {job.batch}, {job.dtype}, {kind}; median "
        f"of {rounds} turns"
    )
    print(
        f"{'connector':14}{'visual':>7}  {'':22}{'tokens/s':>9}{'ratio':>8}{'(min-max)':>13}"
        f"{'MFU':>6}{'answer ms':>11}{'ratio':>8}{'(min-max)':>13}{'compile s':>11}"
    )


def _compare(ask: Any, connector: str, facts: dict, peak: float, rounds: int) -> None:
    """Prints a row for each side that has the connector."""
    present = [name for name in facts if not facts[name].get("alone")]
    ours = facts["mmjax"]
    times: dict[tuple[str, str], list[float]] = {}
    for name in present:
        ask(name, "train")
        ask(name, "answer")  # warm
    for _ in range(rounds):
        for mode in ("train", "answer"):
            for name in present:
                times.setdefault((mode, name), []).append(ask(name, mode))
    for name in present:
        cells = {}
        for mode in ("train", "answer"):
            ratios = sorted(
                b / a for a, b in zip(times[mode, "mmjax"], times[mode, name], strict=True)
            )
            other = name != "mmjax"
            cells[mode] = (
                statistics.median(times[mode, name]),
                f"{statistics.median(ratios):.2f}x" if other else "",
                f"({ratios[0]:.2f}-{ratios[-1]:.2f})" if other else "",
            )
        step, ratio, spread = cells["train"]
        answer, faster, range_ = cells["answer"]
        print(
            f"{connector:14}{ours['visual']:7}  {name:22}{ours['tokens'] / step:9.0f}{ratio:>8}"
            f"{spread:>13}{ours['flops'] / step / peak:6.0%}{1e3 * answer:11.0f}{faster:>8}"
            f"{range_:>13}{facts[name]['compile_s']:11.1f}",
            flush=True,
        )
