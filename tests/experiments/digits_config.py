"""The smallest experiments on handwritten digits: a classifier, SigLIP and CLIP."""

from ml_collections import ConfigDict

from mmjax.config import parse_arg
from mmjax.train.experiment import base_config

TOWER = dict(width=32, depth=1, heads=2, mlp_width=64, activation="gelu_tanh", norm_eps=1e-6)
IMAGE = dict(image_size=8, patch_size=4, position="learned", **TOWER)
TEXT = dict(vocab_size=64, max_len=4, padding="attend", **TOWER)


def get_config(arg: str | None = None) -> ConfigDict:
    """`task`: vit, siglip or clip; `source` and `path`: other data than digits."""
    arg = parse_arg(
        arg,
        task="vit",
        steps=60,
        batch=32,
        every=10,
        lr=2e-3,
        source="digits",
        path="",
        crop=True,
        evals=True,
    )
    task, model = {
        "vit": (
            dict(name="classification"),
            dict(name="vit", **IMAGE, pooling="map", num_classes=10),
        ),
        "siglip": (
            dict(name="contrastive", loss="sigmoid", chunked=True),
            dict(
                name="siglip",
                image=dict(**IMAGE, pooling="map"),
                text=dict(**TEXT, attention="bidirectional", pooling="last"),
            ),
        ),
        "clip": (
            dict(name="contrastive", loss="softmax", chunked=True),
            dict(
                name="clip",
                image=dict(**IMAGE, pooling="cls"),
                text=dict(**TEXT, attention="causal", pooling="eos", eos_id=3),
                embed_dim=32,
            ),
        ),
    }[arg.task]
    contrastive = arg.task != "vit"

    def data(split: str, augment: tuple = ()) -> dict:
        source = {
            "digits": dict(name="digits", split=split),
            "folder": dict(name="folder", root=arg.path),
            "table": dict(name="table", path=arg.path),
        }[arg.source]
        return dict(
            sources=[source],
            image=dict(field="image", preset="vit", size=8, augment=augment),
            label=dict(field="label"),
            **(dict(text=dict(max_len=4)) if contrastive else {}),
        )

    evaluation = dict(
        name="loss" if contrastive else "classification", every=2 * arg.every, data=data("test")
    )
    return base_config(
        task=task,
        model=model,
        data=dict(
            tokenizer=dict(name="wordlevel", vocab_size=64) if contrastive else None,
            train=data("train", (dict(name="random_crop", padding=1),) if arg.crop else ()),
            workers=0,
            threads=2,
            prefetch=2,
            max_bad_share=0.01,
        ),
        optimizer=dict(
            name="adamw",
            learning_rate=arg.lr,
            schedule=dict(name="cosine", warmup=5),
            weight_decay=0.05,
            ema=0.9,
        ),
        train=dict(steps=arg.steps, batch_size=arg.batch, log_every=1),
        checkpoint=dict(every=arg.every),
        evals=dict(test=evaluation) if arg.evals else {},
    )
