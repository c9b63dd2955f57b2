"""Gemma 1, 2 and 3 (text)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmjax.convert.families import _decoder
from mmjax.convert.family import FAMILIES, Source
from mmjax.models.lm import LMConfig

if TYPE_CHECKING:
    import transformers


def _fields(hf: Any, activation_field: str) -> dict[str, Any]:
    """What the three have in common."""
    return {
        **_decoder.fields(hf, activation_field),
        "norm": "rmsnorm_offset",
        "scale_embeddings": True,
        "qkv_bias": hf.attention_bias,
        "out_bias": hf.attention_bias,
    }


def _options(config: LMConfig, activation_field: str) -> dict[str, Any]:
    """The inverse of `_fields`."""
    return {**_decoder.options(config, activation_field), "attention_bias": config.out_bias}


def _new_fields(hf: Any) -> dict[str, Any]:
    """What Gemma 2 and 3 have in common."""
    return {
        **_fields(hf, "hidden_activation"),
        **_decoder.window_fields(hf),
        "norm_placement": "sandwich",
        "scale": hf.query_pre_attn_scalar**-0.5,
        "final_softcap": hf.final_logit_softcapping,
    }


def _new_options(config: LMConfig) -> dict[str, Any]:
    """The inverse of `_new_fields`."""
    scale = config.head_width**-0.5 if config.scale is None else config.scale
    return {
        **_options(config, "hidden_activation"),
        **_decoder.window_options(config),
        "query_pre_attn_scalar": round(scale**-2),
        "final_logit_softcapping": config.final_softcap,
    }


def gemma_from_hf(source: Source) -> LMConfig:
    hf = source.config
    return LMConfig(**_fields(hf, "hidden_act"), **_decoder.rope_fields(hf))


def gemma_to_hf(config: LMConfig) -> transformers.GemmaConfig:
    from transformers import GemmaConfig

    return GemmaConfig(**_options(config, "hidden_act"), **_decoder.rope_options(config))


def gemma2_from_hf(source: Source) -> LMConfig:
    hf = source.config
    return LMConfig(
        **_new_fields(hf), **_decoder.rope_fields(hf), softcap=hf.attn_logit_softcapping
    )


def gemma2_to_hf(config: LMConfig) -> transformers.Gemma2Config:
    from transformers import Gemma2Config

    return Gemma2Config(
        **_new_options(config),
        **_decoder.rope_options(config),
        attn_logit_softcapping=config.softcap,
    )


def gemma3_from_hf(source: Source) -> LMConfig:
    """Its `attn_logit_softcapping` is a field that transformers does not read."""
    hf = source.config
    full, sliding = (
        _decoder.rope_from_hf(hf.rope_parameters.get(kind), hf.max_position_embeddings)
        for kind in ("full_attention", "sliding_attention")
    )
    given = _new_fields(hf)
    window_rope = sliding if "window" in given else None
    return LMConfig(**given, rope=full, window_rope=window_rope, qk_norm=True)


def gemma3_to_hf(config: LMConfig) -> transformers.Gemma3TextConfig:
    from transformers import Gemma3TextConfig

    full = _decoder.rope_to_hf(config.rope, config.max_len)
    sliding = full
    if config.window_rope is not None:
        sliding = _decoder.rope_to_hf(config.window_rope, config.max_len)
    return Gemma3TextConfig(
        **_new_options(config),
        rope_parameters={"full_attention": full, "sliding_attention": dict(sliding)},
    )


FAMILIES.register("GemmaForCausalLM")(_decoder.family("Gemma", "gemma", gemma_from_hf, gemma_to_hf))
FAMILIES.register("Gemma2ForCausalLM")(
    _decoder.family("Gemma2", "gemma2", gemma2_from_hf, gemma2_to_hf, _decoder.SANDWICH_NORMS)
)
FAMILIES.register("Gemma3ForCausalLM")(
    _decoder.family(
        "Gemma3Text", "gemma3_text", gemma3_from_hf, gemma3_to_hf, _decoder.SANDWICH_NORMS
    )
)
