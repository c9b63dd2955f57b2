"""CLIP on OpenMoji icons and their names: `configs/siglip/openmoji.py` with CLIP's model and
loss."""

from ml_collections import ConfigDict

from configs.openmoji import two_towers


def get_config(arg: str | None = None) -> ConfigDict:
    return two_towers("clip", arg)
