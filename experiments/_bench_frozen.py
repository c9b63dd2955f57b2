"""What freezing a tower saves in the compiled training step: FLOPs and temporary memory."""

from __future__ import annotations

import argparse


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.bench frozen", description=__doc__)
    parser.add_argument("--size", default="S/16", help="image tower; the text tower has its size")
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args(argv)
    print(f"SigLIP {args.size}, batch {args.batch}, compiled for this machine")
    print(f"{'trained':24}{'TFLOP (matmul)':>16}{'TFLOP (compiler)':>18}{'temporary GiB':>15}")
    for name, table in {
        "both towers": ((".*", True),),
        "image tower frozen": (("image/.*", False), (".*", True)),
        "text tower frozen": (("text/.*", False), (".*", True)),
    }.items():
        matmul, total, temporary = measure(args.size, args.batch, table)
        print(f"{name:24}{matmul / 1e12:16.4f}{total / 1e12:18.4f}{temporary / 2**30:15.3f}")
    return 0


def measure(size: str, batch_size: int, trainable: tuple) -> tuple[float, float, float]:
    """(matmul FLOPs counted on the traced step, the compiler's FLOPs, bytes of temporaries)."""
    from mmjax.models.sizes import text_size, vit_size
    from mmjax.train.experiment import base_config, prepare

    # One scan iteration holds all layers: the compiler's count takes a loop's body once.
    common = dict(activation="gelu_tanh", norm_eps=1e-6)
    image, text = vit_size(size), text_size(size.split("/")[0])
    config = base_config(
        task=dict(name="contrastive", loss="sigmoid", chunked=False),
        model=dict(
            name="siglip",
            image=dict(
                image_size=224,
                **image,
                pooling="map",
                position="learned",
                unroll=image["depth"],
                **common,
            ),
            text=dict(
                vocab_size=32000,
                max_len=64,
                **text,
                attention="bidirectional",
                pooling="last",
                padding="attend",
                unroll=text["depth"],
                **common,
            ),
        ),
        data=dict(train=dict(image=dict(size=224), text=dict(max_len=64))),
        rules=dict(trainable=trainable),
        optimizer=dict(name="adamw", learning_rate=1e-3, schedule=dict(name="constant")),
        train=dict(steps=10, batch_size=batch_size),
        checkpoint=dict(every=10),
    )
    experiment = prepare(config)
    batch = experiment.batch_shapes()
    compiled = experiment.lower_step(batch).compile()
    return (
        experiment.step_flops(batch),
        compiled.cost_analysis()["flops"],
        compiled.memory_analysis().temp_size_in_bytes,
    )
