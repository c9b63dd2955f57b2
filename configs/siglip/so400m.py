"""SigLIP So400m/14 at 224 pixels, from scratch, the published recipe; `configs.recipes.siglip`
names its sources and our choices. `res=384` has the shape of the released model of 384 pixels.

    python -m experiments.train --workdir DIR --config \
        'configs/siglip/so400m.py:data=/data/{00000..41454}.tar,tokenizer=/models/siglip,fsdp=8'
"""

from ml_collections import ConfigDict

from configs.recipes import siglip


def get_config(arg: str | None = None) -> ConfigDict:
    return siglip("So400m/14", arg, res=224, remat="full")
