"""CLIP ViT-L/14, the published recipe; `configs.recipes.clip` names its sources and our choices.

    python -m experiments.train --workdir DIR \
        --config 'configs/clip/l14.py:data=/data/{00000..41454}.tar,tokenizer=/models/clip'
"""

from ml_collections import ConfigDict

from configs.recipes import clip


def get_config(arg: str | None = None) -> ConfigDict:
    # The paper checkpoints gradients as well.
    return clip("L/14", arg, text="B", embed_dim=768, lr=4e-4, remat="full")
