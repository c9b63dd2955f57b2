"""GPT-NeoX, and what has its architecture: Pythia, RedPajama-INCITE, StableLM Alpha, Dolly 2."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mmjax.convert.activations import NAMES, activation
from mmjax.convert.families import _decoder
from mmjax.convert.family import FAMILIES, Family, Source
from mmjax.convert.kinds import EMBEDDING, LINEAR, NORM, fused_by_head
from mmjax.convert.table import Row
from mmjax.models.lm import LM, LMConfig
from mmjax.nn.rope import Rope

if TYPE_CHECKING:
    import transformers

LAYER, OURS = "gpt_neox.layers.*.", "decoder/layers/"
PARTIAL = "partial_rotary_factor"


def rope_from_hf(hf: transformers.GPTNeoXConfig) -> Rope:
    """A part of each head is rotated."""
    given = dict(hf.rope_parameters)
    head_dim = hf.hidden_size // hf.num_attention_heads
    dims = int(head_dim * given.pop(PARTIAL))
    rope = _decoder.rope_from_hf(
        given, hf.max_position_embeddings, truncate=given.get("truncate", True)
    )
    return dataclasses.replace(rope, dims=None if dims == head_dim else dims)


def rope_to_hf(config: LMConfig) -> dict[str, object]:
    """The inverse of `rope_from_hf`."""
    rope, dims = config.rope, config.head_width
    if rope is not None and rope.dims is not None:
        rope, dims = dataclasses.replace(rope, dims=None), rope.dims
    factor = dims / config.head_width
    if int(factor * config.head_width) < dims:  # which is what transformers takes of it
        factor = math.nextafter(factor, 1)
    return {**_decoder.rope_to_hf(rope, config.max_len), PARTIAL: factor}


def from_hf(source: Source) -> LMConfig:
    hf = source.config
    _decoder.check_causal(hf)
    return LMConfig(
        vocab_size=hf.vocab_size,
        max_len=hf.max_position_embeddings,
        width=hf.hidden_size,
        depth=hf.num_hidden_layers,
        heads=hf.num_attention_heads,
        mlp_width=hf.intermediate_size,
        activation=activation(hf.hidden_act, "hidden_act"),
        norm_eps=hf.layer_norm_eps,
        tied=hf.tie_word_embeddings,
        rope=rope_from_hf(hf),
        norm="layernorm",
        norm_placement="parallel" if hf.use_parallel_residual else "pre",
        gated=False,
        qkv_bias=hf.attention_bias,
        out_bias=hf.attention_bias,
        mlp_bias=True,
    )


def to_hf(config: LMConfig) -> transformers.GPTNeoXConfig:
    from transformers import GPTNeoXConfig

    return GPTNeoXConfig(
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_len,
        hidden_size=config.width,
        num_hidden_layers=config.depth,
        num_attention_heads=config.heads,
        intermediate_size=config.mlp_width,
        hidden_act=NAMES[config.activation],
        layer_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tied,
        rope_parameters=rope_to_hf(config),
        use_parallel_residual=config.norm_placement == "parallel",
        attention_bias=config.out_bias,
        **_decoder.NO_TOKENS,
    )


def rows(config: LMConfig) -> Sequence[Row]:
    """Raises ValueError if heads share keys: queries, keys and values stand head by head."""
    if config.kv_heads is not None:
        raise ValueError(f"it cannot say kv_heads={config.kv_heads}")
    parts = tuple(OURS + f"attention/{part}" for part in ("query", "key", "value"))
    return (
        Row("gpt_neox.embed_in", "token", EMBEDDING),
        Row(LAYER + "input_layernorm", OURS + "attention_norm", NORM),
        Row(LAYER + "post_attention_layernorm", OURS + "mlp_norm", NORM),
        Row(LAYER + "attention.query_key_value", parts, fused_by_head(config.heads)),
        Row(LAYER + "attention.dense", OURS + "attention/out", LINEAR),
        Row(LAYER + "mlp.dense_h_to_4h", OURS + "mlp/up", LINEAR),
        Row(LAYER + "mlp.dense_4h_to_h", OURS + "mlp/down", LINEAR),
        Row("gpt_neox.final_layer_norm", "final_norm", NORM),
        Row("embed_out", "head", LINEAR),
    )


FAMILIES.register("GPTNeoXForCausalLM")(
    Family(
        model_type="gpt_neox",
        model=LM,
        from_hf=from_hf,
        to_hf=to_hf,
        rows=rows,
        renames=(
            (r"^lm_head\.", "embed_out."),
            # A model without its head.
            (r"^(embed_in|layers|final_layer_norm)\.", r"gpt_neox.\1."),
        ),
        # Files have the head by its first name.
        module_names=((r"^embed_out\.", "lm_head."),),
        # Old versions saved the causal mask, and the frequencies of the rotary embedding.
        ignored=lambda config: (
            r".*attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
            *((r"embed_out\.weight",) if config.tied else ()),
        ),
        aliases=("GPTNeoXModel",),
    )
)
