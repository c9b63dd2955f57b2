"""LiT: a text tower that learns to read the locked image tower of configs/vit/s16_imagenet.py, the
published recipe; `configs.recipes.lit` names its sources and our choices.

    python -m experiments.train --workdir DIR --config \
        'configs/lit/s16_imagenet.py:init=runs/s16,data=/data/{000..999}.tar,tokenizer=/models/siglip'
"""

from ml_collections import ConfigDict

from configs.recipes import lit


def get_config(arg: str | None = None) -> ConfigDict:
    return lit(arg)
