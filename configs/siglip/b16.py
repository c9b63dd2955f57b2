"""SigLIP B/16 at 256 pixels, from scratch, the published recipe; `configs.recipes.siglip` names its
sources and our choices.

    python -m experiments.train --workdir DIR \
        --config 'configs/siglip/b16.py:data=/data/{00000..41454}.tar,tokenizer=/models/siglip'
"""

from ml_collections import ConfigDict

from configs.recipes import siglip


def get_config(arg: str | None = None) -> ConfigDict:
    return siglip("B/16", arg, res=256)
