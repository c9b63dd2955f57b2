"""ViT on scikit-learn's handwritten digits (1,797 of 8 x 8 pixels): classification in a minute.

python -m experiments.train --config configs/vit/digits.py --workdir runs/digits
"""

from ml_collections import ConfigDict

from mmjax.config import parse_arg
from mmjax.train.experiment import base_config


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, width=64, depth=4, steps=600, batch=128, lr=2e-3)

    def data(split: str, augment: tuple = ()) -> dict:
        return dict(
            sources=[dict(name="digits", split=split)],
            image=dict(preset="vit", size=8, augment=augment),
            label=dict(),
        )

    every = max(arg.steps // 4, 1)
    return base_config(
        task=dict(name="classification", label_smoothing=0.1),
        model=dict(
            name="vit",
            image_size=8,
            patch_size=2,
            width=arg.width,
            depth=arg.depth,
            heads=max(arg.width // 32, 1),
            mlp_width=4 * arg.width,
            activation="gelu_tanh",
            norm_eps=1e-6,
            pooling="mean",
            position="learned",
            num_classes=10,
        ),
        data=dict(
            tokenizer=None,
            train=data(
                "train", (dict(name="random_resized_crop", scale=(0.7, 1.0), ratio=(0.9, 1.1)),)
            ),
            workers=0,
            threads=2,
            prefetch=4,
            max_bad_share=0.01,
        ),
        optimizer=dict(
            name="adamw",
            learning_rate=arg.lr,
            schedule=dict(name="cosine", warmup=arg.steps // 10),
            weight_decay=0.05,
        ),
        train=dict(steps=arg.steps, batch_size=arg.batch, log_every=20),
        checkpoint=dict(every=every),
        evals=dict(
            test=dict(name="classification", every=every, data=data("test")),
            knn=dict(
                name="knn",
                every=arg.steps,
                train=data("train"),
                test=data("test"),
                features="pooled",
            ),
            probe=dict(
                name="linear_probe",
                every=arg.steps,
                train=data("train"),
                test=data("test"),
                features="pooled",
            ),
        ),
    )
