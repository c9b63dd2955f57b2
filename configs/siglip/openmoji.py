"""SigLIP on OpenMoji icons and their names: the demo, minutes on two CPU cores.

python -m experiments.train --config configs/siglip/openmoji.py --workdir runs/siglip
... --config configs/siglip/openmoji.py:size=S,res=96,batch=512
"""

from ml_collections import ConfigDict

from configs.openmoji import two_towers


def get_config(arg: str | None = None) -> ConfigDict:
    return two_towers("siglip", arg)
