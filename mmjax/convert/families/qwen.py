"""Qwen 2, 2.5 and 3."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmjax.convert.families import _decoder
from mmjax.convert.family import FAMILIES, Source
from mmjax.models.lm import LMConfig

if TYPE_CHECKING:
    import transformers


def _fields(hf: Any) -> dict[str, Any]:
    return _decoder.fields(hf) | _decoder.rope_fields(hf) | _decoder.window_fields(hf)


def _options(config: LMConfig) -> dict[str, Any]:
    """The inverse of `_fields`."""
    return {
        **_decoder.options(config),
        **_decoder.rope_options(config),
        **_decoder.window_options(config),
        "use_sliding_window": config.window is not None,
    }


def qwen2_from_hf(source: Source) -> LMConfig:
    return LMConfig(**_fields(source.config), qkv_bias=True)


def qwen2_to_hf(config: LMConfig) -> transformers.Qwen2Config:
    from transformers import Qwen2Config

    return Qwen2Config(**_options(config))


def qwen3_from_hf(source: Source) -> LMConfig:
    bias = source.config.attention_bias
    return LMConfig(**_fields(source.config), qkv_bias=bias, out_bias=bias, qk_norm=True)


def qwen3_to_hf(config: LMConfig) -> transformers.Qwen3Config:
    from transformers import Qwen3Config

    return Qwen3Config(**_options(config), attention_bias=config.out_bias)


FAMILIES.register("Qwen2ForCausalLM")(_decoder.family("Qwen2", "qwen2", qwen2_from_hf, qwen2_to_hf))
FAMILIES.register("Qwen3ForCausalLM")(_decoder.family("Qwen3", "qwen3", qwen3_from_hf, qwen3_to_hf))
