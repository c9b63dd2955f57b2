"""Time to trace and compile the training step of a ViT of 24 layers, beside one of 4."""

from __future__ import annotations

import argparse
import statistics
import time

DEPTHS = (4, 24)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.bench compile", description=__doc__
    )
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    import jax

    from mmjax.models.sizes import vit_size
    from mmjax.train.experiment import base_config, prepare

    def compile_seconds(depth: int) -> float:
        config = base_config(
            task=dict(name="classification"),
            model=dict(
                name="vit",
                **{**vit_size("S/16"), "depth": depth},
                image_size=224,
                activation="gelu_tanh",
                norm_eps=1e-6,
                pooling="mean",
                position="learned",
                num_classes=1000,
            ),
            data=dict(train=dict(image=dict(size=224), label=dict())),
            optimizer=dict(name="adamw", learning_rate=1e-3, schedule=dict(name="constant")),
            train=dict(steps=10, batch_size=jax.device_count()),
            checkpoint=dict(every=10),
        )
        jax.clear_caches()
        began = time.perf_counter()
        experiment = prepare(config)
        experiment.lower_step(experiment.batch_shapes()).compile()
        return time.perf_counter() - began

    compile_seconds(DEPTHS[0])  # imports and first-time work
    times = [[compile_seconds(depth) for depth in DEPTHS] for _ in range(args.rounds)]
    for depth, column in zip(DEPTHS, zip(*times, strict=True), strict=True):
        print(
            f"{depth:3d} layers: {statistics.median(column):6.2f} s to trace and compile (median)"
        )
    ratios = sorted(deep / shallow for shallow, deep in times)
    print(
        f"ratio {statistics.median(ratios):.2f} (median of {args.rounds} pairs, "
        f"{ratios[0]:.2f}-{ratios[-1]:.2f})"
    )
    return 0
