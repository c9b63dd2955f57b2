"""Tokenizers: models that make codes of images, and images of codes, by the name of their config.

Each has `encode(images [B, H, W, C]) -> codes [B, h, w, *shape]` and `decode`, and its config
`image_size`, `channels`, `factor` (pixels along the side of a code) and `quantizer` (`size`, the
number of codes, and their `shape`).
"""

from __future__ import annotations

from flax import nnx

from mmjax.models.emu3_vq import Emu3VQ
from mmjax.models.vqgan import VQGAN, VQGANConfig
from mmjax.registry import Registry

# Configs that a model with a tokenizer may have.
TokenizerConfig = VQGANConfig

TOKENIZERS: Registry[type[nnx.Module]] = Registry("image tokenizer")
TOKENIZERS.register("vqgan")(VQGAN)
TOKENIZERS.register("emu3_vq")(Emu3VQ)


def make_tokenizer(config: TokenizerConfig, *, rngs: nnx.Rngs) -> nnx.Module:
    """The module of a config."""
    return TOKENIZERS[config.name](config, rngs=rngs)
