"""What the families of decoder-only language models with Llama's layout have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmjax.convert.activations import NAMES, activation
from mmjax.convert.family import Family
from mmjax.convert.kinds import EMBEDDING, LINEAR, NORM
from mmjax.convert.table import Row
from mmjax.models.lm import LM, LMConfig
from mmjax.nn.rope import Rope
from mmjax.registry import nearest

# transformers cannot know from a config of ours which tokens are special.
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def fields(hf: Any, activation_field: str = "hidden_act") -> dict[str, Any]:
    """What the configs of all these families say alike, as fields of an `LMConfig`.

    Raises:
      ValueError: if the activation is unknown, or attention is not causal.
    """
    check_causal(hf)
    return {
        "vocab_size": hf.vocab_size,
        "max_len": hf.max_position_embeddings,
        "width": hf.hidden_size,
        "depth": hf.num_hidden_layers,
        "heads": hf.num_attention_heads,
        "kv_heads": hf.num_key_value_heads,
        # Not every class has the field, but the models of all read it where it is set.
        "head_dim": hf.to_dict().get("head_dim"),
        "mlp_width": hf.intermediate_size,
        "activation": activation(getattr(hf, activation_field), activation_field),
        "norm_eps": hf.rms_norm_eps,
        "tied": hf.tie_word_embeddings,
    }


def options(config: LMConfig, activation_field: str = "hidden_act") -> dict[str, Any]:
    """The inverse of `fields`."""
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_len,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.heads if config.kv_heads is None else config.kv_heads,
        "head_dim": config.head_width,
        "intermediate_size": config.mlp_width,
        activation_field: NAMES[config.activation],
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        **NO_TOKENS,
    }


def check_causal(hf: Any) -> None:
    """Raises ValueError if a config asks for attention to what comes later."""
    given = hf.to_dict()
    for name, causal in (("is_causal", True), ("use_bidirectional_attention", False)):
        value = given.get(name)
        if value is not None and value != causal:
            raise ValueError(f"{name}={value} is not supported: these models are causal.")


def window_fields(hf: Any) -> dict[str, Any]:
    """Which layers look back a few tokens only, from `layer_types` and `sliding_window`.

    Raises:
      ValueError: if there are layers of another type, or the window is not said.
    """
    kinds = hf.layer_types
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown:
        raise ValueError(f"layer_types has {unknown}; full and sliding attention are supported.")
    sliding = tuple(layer for layer, kind in enumerate(kinds) if kind == "sliding_attention")
    if not sliding:
        return {}
    if hf.sliding_window is None:
        raise ValueError("layer_types has sliding_attention, but sliding_window is not given.")
    return {"window": hf.sliding_window, "window_layers": sliding}


def window_options(config: LMConfig) -> dict[str, Any]:
    """The inverse of `window_fields`."""
    names = {True: "sliding_attention", False: "full_attention"}
    result: dict[str, Any] = {"layer_types": [names[windowed] for windowed in config.windowed]}
    return result if config.window is None else result | {"sliding_window": config.window}


def rope_from_hf(given: Mapping[str, Any] | None, max_len: int, *, truncate: bool = True) -> Rope:
    """One of transformers' `rope_parameters` -> ours.

    Args:
      max_len: `max_position_embeddings` of the config.
      truncate: that of yarn, which is not read where each kind of layer has its own parameters.

    Raises:
      ValueError: if its type is unknown, or part of each head only is rotated.
    """
    given = dict(given or {})
    kind = given.get("rope_type")
    if kind not in _SCALINGS:
        raise ValueError(f"rope_type={kind!r} is not supported; {nearest(str(kind), _SCALINGS)}")
    partial = given.get("partial_rotary_factor")
    if partial is not None and partial != 1:
        raise ValueError(f"partial_rotary_factor={partial} is not supported by these models.")
    theta = float(given["rope_theta"])
    return Rope(theta, scaling=kind, **_SCALINGS[kind](given, max_len, truncate))


def rope_to_hf(rope: Rope | None, max_len: int) -> dict[str, Any]:
    """The inverse of `rope_from_hf`.

    Raises:
      ValueError: if there is no rotary embedding, or it has no counterpart.
    """
    if rope is None:
        raise ValueError("it has rotary positions only, and this model learned ones")
    result: dict[str, Any] = {"rope_type": rope.scaling, "rope_theta": rope.theta}
    if rope.scaling != "default":
        result["factor"] = rope.factor
    if rope.scaling in ("llama3", "yarn"):
        result["original_max_position_embeddings"] = rope.original_length
    if rope.scaling == "llama3":
        result["low_freq_factor"] = rope.low_frequency_factor
        result["high_freq_factor"] = rope.high_frequency_factor
    if rope.scaling == "yarn":
        result["beta_fast"], result["beta_slow"] = rope.beta_fast, rope.beta_slow
        result["truncate"], result["attention_factor"] = rope.truncate, rope.amplitude
    if rope_from_hf(result, max_len, truncate=rope.truncate) != rope:
        raise ValueError(f"it cannot say {rope}")
    return result


def _linear(given: Mapping[str, Any], max_len: int, truncate: bool) -> dict[str, Any]:
    return {"factor": float(given["factor"])}


def _dynamic(given: Mapping[str, Any], max_len: int, truncate: bool) -> dict[str, Any]:
    return {"factor": float(given["factor"]), "original_length": max_len}


def _llama3(given: Mapping[str, Any], max_len: int, truncate: bool) -> dict[str, Any]:
    return {
        "factor": float(given["factor"]),
        "original_length": given["original_max_position_embeddings"],
        "low_frequency_factor": float(given["low_freq_factor"]),
        "high_frequency_factor": float(given["high_freq_factor"]),
    }


def _yarn(given: Mapping[str, Any], max_len: int, truncate: bool) -> dict[str, Any]:
    original = given["original_max_position_embeddings"]
    factor = max_len / original if given["factor"] is None else float(given["factor"])

    def amplitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    scale, all_dims = given.get("mscale"), given.get("mscale_all_dim")
    attention = given.get("attention_factor")
    if attention is None and scale and all_dims:
        attention = amplitude(scale) / amplitude(all_dims)
    return {
        "factor": factor,
        "original_length": original,
        "beta_fast": float(given.get("beta_fast") or 32),
        "beta_slow": float(given.get("beta_slow") or 1),
        "truncate": truncate,
        "amplitude": amplitude(1.0) if attention is None else float(attention),
    }


_SCALINGS: dict[str, Callable[[Mapping[str, Any], int, bool], dict[str, Any]]] = {
    "default": lambda given, max_len, truncate: {},
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
}


def rope_fields(hf: Any) -> dict[str, Rope]:
    """The rotary embedding of a config that has one for all layers."""
    given = hf.rope_parameters
    truncate = given.get("truncate", True)
    return {"rope": rope_from_hf(given, hf.max_position_embeddings, truncate=truncate)}


def rope_options(config: LMConfig) -> dict[str, Any]:
    """The inverse of `rope_fields`."""
    return {"rope_parameters": rope_to_hf(config.rope, config.max_len)}


LAYER, OURS = "model.layers.*.", "decoder/layers/"
# Norms of a layer: before attention and MLP, and around both.
PRE_NORMS = (
    Row(LAYER + "input_layernorm", OURS + "attention_norm", NORM),
    Row(LAYER + "post_attention_layernorm", OURS + "mlp_norm", NORM),
)
SANDWICH_NORMS = (
    Row(LAYER + "input_layernorm", OURS + "attention_norm", NORM),
    Row(LAYER + "post_attention_layernorm", OURS + "attention_post_norm", NORM),
    Row(LAYER + "pre_feedforward_layernorm", OURS + "mlp_norm", NORM),
    Row(LAYER + "post_feedforward_layernorm", OURS + "mlp_post_norm", NORM),
)


def rows(norms: Sequence[Row]) -> tuple[Row, ...]:
    return (
        Row("model.embed_tokens", "token", EMBEDDING),
        *norms,
        Row(LAYER + "self_attn.q_proj", OURS + "attention/query", LINEAR),
        Row(LAYER + "self_attn.k_proj", OURS + "attention/key", LINEAR),
        Row(LAYER + "self_attn.v_proj", OURS + "attention/value", LINEAR),
        Row(LAYER + "self_attn.o_proj", OURS + "attention/out", LINEAR),
        Row(LAYER + "self_attn.q_norm", OURS + "attention/query_norm", NORM),
        Row(LAYER + "self_attn.k_norm", OURS + "attention/key_norm", NORM),
        Row(LAYER + "mlp.gate_proj", OURS + "mlp/gate", LINEAR),
        Row(LAYER + "mlp.up_proj", OURS + "mlp/up", LINEAR),
        Row(LAYER + "mlp.down_proj", OURS + "mlp/down", LINEAR),
        Row("model.norm", "final_norm", NORM),
        Row("lm_head", "head", LINEAR),
    )


def tied_head(config: LMConfig) -> tuple[str, ...]:
    """Some checkpoints hold the token table a second time."""
    return (r"lm_head\.weight",) if config.tied else ()


def family(
    name: str,
    model_type: str,
    from_hf: Callable[..., LMConfig],
    to_hf: Callable[[LMConfig], Any],
    norms: Sequence[Row] = PRE_NORMS,
) -> Family:
    """A family with Llama's names of tensors.

    Args:
      name: of its classes: `{name}ForCausalLM`, `{name}Model`.
      norms: of a layer.
    """
    table = rows(norms)
    return Family(
        model_type=model_type,
        model=LM,
        from_hf=from_hf,
        to_hf=to_hf,
        rows=lambda config: table,
        # A model without its head.
        renames=((r"^(embed_tokens|layers|norm)\.", r"model.\1."),),
        # Old versions saved the frequencies of the rotary embedding.
        ignored=lambda config: (r".*rotary_emb\.inv_freq", *tied_head(config)),
        aliases=(f"{name}Model",),
    )
