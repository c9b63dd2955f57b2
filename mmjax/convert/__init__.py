"""Checkpoints of Hugging Face format, both ways."""

from mmjax.convert.family import FAMILIES, Family, Origin, Source
from mmjax.convert.load import (
    CONFIG,
    from_pretrained,
    load_params,
    model_config,
    open_checkpoint,
)
from mmjax.convert.openflamingo import load_openflamingo, save_openflamingo
from mmjax.convert.peft import load_adapter, save_adapter
from mmjax.convert.save import save_pretrained
from mmjax.convert.table import ConversionError, Row

__all__ = [
    "CONFIG",
    "FAMILIES",
    "ConversionError",
    "Family",
    "Origin",
    "Row",
    "Source",
    "from_pretrained",
    "load_adapter",
    "load_openflamingo",
    "load_params",
    "model_config",
    "open_checkpoint",
    "save_adapter",
    "save_openflamingo",
    "save_pretrained",
]
