"""Mistral: Llama with a window in all layers, or in none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmjax.convert.families import _decoder
from mmjax.convert.family import FAMILIES, Source
from mmjax.models.lm import LMConfig

if TYPE_CHECKING:
    import transformers


def from_hf(source: Source) -> LMConfig:
    hf = source.config
    return LMConfig(**_decoder.fields(hf), **_decoder.rope_fields(hf), window=hf.sliding_window)


def to_hf(config: LMConfig) -> transformers.MistralConfig:
    from transformers import MistralConfig

    return MistralConfig(
        **_decoder.options(config),
        **_decoder.rope_options(config),
        sliding_window=config.window,
    )


FAMILIES.register("MistralForCausalLM")(_decoder.family("Mistral", "mistral", from_hf, to_hf))
