"""An image tokenizer on OpenMoji icons: 8 x 8 codes of 64 pixels, minutes on two CPU cores.

python -m experiments.train --config configs/vq/openmoji.py --workdir runs/vq
... --config configs/vq/openmoji.py:quantizer=fsq
... --config configs/vq/openmoji.py:perceptual=runs/demo,judge=runs/judge

The unified model of configs/unified/openmoji.py draws with it. A discriminator joins in a second
stage, which starts from the first:

... --config configs/vq/openmoji.py:adversarial=0.02,lr=1e-3,start=runs/vq
"""

import json
from pathlib import Path

from ml_collections import ConfigDict

from mmjax.config import ConfigError, parse_arg
from mmjax.evaluate.sheets import ICONS_NOTE
from mmjax.registry import check_choice
from mmjax.train.experiment import base_config


def fsq(codes: int) -> dict:
    levels = {256: (8, 8, 4), 512: (8, 8, 8), 1024: (8, 8, 4, 4), 4096: (8, 8, 8, 8)}
    if codes not in levels:
        raise ConfigError(f"codes={codes} are no product of levels here. Valid: {list(levels)}.")
    return dict(name="fsq", levels=levels[codes])


def lfq(codes: int) -> dict:
    if codes & (codes - 1):
        raise ConfigError(f"codes={codes} is no power of two.")
    return dict(name="lfq", bits=codes.bit_length() - 1)


def ema(codes: int) -> dict:
    return dict(name="ema", size=codes, width=16, decay=0.98, revive=0.1, kmeans=10)


def codebook(codes: int) -> dict:
    return dict(name="codebook", size=codes, width=16)


def cosine(codes: int) -> dict:
    return dict(name="codebook", size=codes, width=16, compare="cosine", unit=True)


def residual(codes: int) -> dict:
    return dict(name="residual", each=ema(codes), depth=2)


QUANTIZERS = {
    "ema": ema,
    "codebook": codebook,
    "cosine": cosine,
    "fsq": fsq,
    "lfq": lfq,
    "residual": residual,
}


def get_config(arg: str | None = None) -> ConfigDict:
    """See the module.

    Args:
      arg: quantizer, a name in `QUANTIZERS`; codes, the number of different ones; res (pixels),
        width, depth; steps, batch, lr; perceptual, a run of configs/siglip/openmoji.py whose image
        tower compares images; adversarial, the weight of a discriminator; start, the run that a
        second stage continues; judge, a run of that config in whose features the Frechet distance
        is told.
    """
    arg = parse_arg(
        arg,
        quantizer="ema",
        codes=512,
        res=64,
        width=64,
        depth=1,
        steps=2000,
        batch=16,
        lr=4e-3,
        perceptual="",
        adversarial=0.0,
        start="",
        judge="",
    )
    check_choice("quantizer", arg.quantizer, QUANTIZERS)
    tokenizer = dict(
        image_size=arg.res,
        quantizer=QUANTIZERS[arg.quantizer](arg.codes),
        # A place of the largest grid is 4 x 4 pixels: it trains in a fraction of the time.
        patch=4,
        width=arg.width,
        multipliers=(1, 1),
        depth=arg.depth,
        latent=64,
        groups=8,
    )
    model = dict(name="tokenizer_trainer", tokenizer=tokenizer)
    task = dict(name="vq", error="l1", adversarial=arg.adversarial)
    init, frozen = (), ()
    if arg.quantizer in ("ema", "residual"):
        frozen += (("tokenizer/quantizer/.*", False),)
    if arg.start:
        init += (("tokenizer/(.*)", arg.start, r"tokenizer/\1"),)
    if arg.adversarial:
        model |= dict(discriminator=dict(width=32, halvings=2))
    if arg.perceptual:
        tower = json.loads((Path(arg.perceptual) / "config.json").read_text())["model"]["image"]
        model |= dict(perceptual=tower, blocks=tuple(range(tower["depth"])))
        task |= dict(perceptual=0.1)
        init += (("perceptual/(.*)", arg.perceptual, r"image/\1"),)
        frozen += (("perceptual/.*", False),)

    def source(dataset: str, split: str, weight: float = 1.0, **view) -> dict:
        found = dict(name="tfds", dataset=dataset, split=split, weight=weight)
        return found | dict(augment=(dict(name="icon_view", **view),)) if view else found

    def data(*sources: dict) -> dict:
        return dict(sources=list(sources), image=dict(preset="siglip", size=arg.res))

    # Icons as the demo sees them, and as the unified model draws them: upright, of one size.
    upright = dict(rotate=4.0, zoom=(0.92, 0.98), shift=0.02, ground=235)
    train = data(
        source("openmoji", "train", 2.0, **upright),
        source("openmoji", "train", 1.0, rotate=15.0),
        source("tinted", "train", 1.0, **upright, tint=0.0, brightness=0.0),
        source("tinted", "train", 0.5, tint=0.0, brightness=0.0),
    )
    every = max(arg.steps // 4, 1)
    shown = dict(name="reconstruction", encoder=arg.judge or None, note=ICONS_NOTE)
    return base_config(
        task=task,
        model=model,
        init=init,
        data=dict(
            tokenizer=None,
            train=train,
            workers=0,
            threads=2,
            prefetch=4,
            max_bad_share=0.01,
        ),
        optimizer=dict(
            # In 150 steps it had two thirds of the error of AdamW (FSQ, one seed).
            name="muon",
            learning_rate=arg.lr,
            schedule=dict(name="cosine", warmup=arg.steps // 20),
            weight_decay=0.01,
            options=dict(convolutions=True, b2=0.95),
        ),
        rules=dict(trainable=(*frozen, (".*", True))),
        train=dict(steps=arg.steps, batch_size=arg.batch, log_every=20),
        checkpoint=dict(every=every),
        evals=dict(
            heldout=shown
            | dict(
                every=every,
                data=data(source("openmoji", "heldout")),
                sheet="heldout.png",
                title="OpenMoji, held-out concepts",
            ),
            seen=shown
            | dict(
                every=arg.steps,
                data=data(source("tinted", "seen_views")),
                sheet="tinted.png",
                title="Icons in colours",
            ),
        ),
    )
