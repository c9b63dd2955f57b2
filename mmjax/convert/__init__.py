"""Checkpoints of Hugging Face format, both ways."""

from mmjax.convert.family import FAMILIES, Family, Origin, Source
from mmjax.convert.load import from_pretrained, open_checkpoint
from mmjax.convert.save import save_pretrained
from mmjax.convert.table import ConversionError, Row

__all__ = [
    "FAMILIES",
    "ConversionError",
    "Family",
    "Origin",
    "Row",
    "Source",
    "from_pretrained",
    "open_checkpoint",
    "save_pretrained",
]
