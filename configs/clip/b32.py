"""CLIP ViT-B/32, the published recipe; `configs.recipes.clip` names its sources and our choices.

    python -m experiments.train --workdir DIR \
        --config 'configs/clip/b32.py:data=/data/{00000..41454}.tar,tokenizer=/models/clip'
"""

from ml_collections import ConfigDict

from configs.recipes import clip


def get_config(arg: str | None = None) -> ConfigDict:
    return clip("B/32", arg, text="M", embed_dim=512, lr=5e-4)
