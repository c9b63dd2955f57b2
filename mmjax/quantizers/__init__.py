"""Quantisers: vectors become codes, whole numbers, and codes become vectors."""

from mmjax.quantizers.base import (
    QUANTIZERS,
    Quantized,
    Quantizer,
    QuantizerConfig,
    Statistics,
    make_quantizer,
)
from mmjax.quantizers.codebook import Codebook, CodebookConfig
from mmjax.quantizers.ema import EMACodebook, EMACodebookConfig
from mmjax.quantizers.fsq import FSQ, FSQConfig
from mmjax.quantizers.lfq import LFQ, LFQConfig
from mmjax.quantizers.residual import Residual, ResidualConfig
from mmjax.quantizers.usage import counts, perplexity, usage

__all__ = [
    "FSQ",
    "LFQ",
    "QUANTIZERS",
    "Codebook",
    "CodebookConfig",
    "EMACodebook",
    "EMACodebookConfig",
    "FSQConfig",
    "LFQConfig",
    "Quantized",
    "Quantizer",
    "QuantizerConfig",
    "Residual",
    "ResidualConfig",
    "Statistics",
    "counts",
    "make_quantizer",
    "perplexity",
    "usage",
]
