"""Llama, and what has its architecture: Vicuna, TinyLlama, SmolLM2."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmjax.convert.families import _decoder
from mmjax.convert.family import FAMILIES, Source
from mmjax.models.lm import LMConfig

if TYPE_CHECKING:
    import transformers


def from_hf(source: Source) -> LMConfig:
    hf = source.config
    return LMConfig(
        **_decoder.fields(hf),
        **_decoder.rope_fields(hf),
        qkv_bias=hf.attention_bias,
        out_bias=hf.attention_bias,
        mlp_bias=hf.mlp_bias,
    )


def to_hf(config: LMConfig) -> transformers.LlamaConfig:
    from transformers import LlamaConfig

    return LlamaConfig(
        **_decoder.options(config),
        **_decoder.rope_options(config),
        attention_bias=config.out_bias,
        mlp_bias=config.mlp_bias,
    )


FAMILIES.register("LlamaForCausalLM")(_decoder.family("Llama", "llama", from_hf, to_hf))
