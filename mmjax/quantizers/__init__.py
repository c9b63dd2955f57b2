"""Quantisers: vectors become codes, whole numbers, and codes become vectors."""

from mmjax.quantizers.base import (
    QUANTIZERS,
    Quantized,
    Quantizer,
    QuantizerConfig,
    make_quantizer,
)
from mmjax.quantizers.codebook import Codebook, CodebookConfig
from mmjax.quantizers.fsq import FSQ, FSQConfig
from mmjax.quantizers.lfq import LFQ, LFQConfig
from mmjax.quantizers.residual import Residual, ResidualConfig

__all__ = [
    "FSQ",
    "LFQ",
    "QUANTIZERS",
    "Codebook",
    "CodebookConfig",
    "FSQConfig",
    "LFQConfig",
    "Quantized",
    "Quantizer",
    "QuantizerConfig",
    "Residual",
    "ResidualConfig",
    "make_quantizer",
]
