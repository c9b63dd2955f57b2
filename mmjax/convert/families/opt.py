"""OPT."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmjax.convert.activations import NAMES, activation
from mmjax.convert.families._decoder import NO_TOKENS, check_causal, tied_head
from mmjax.convert.family import FAMILIES, Family, Source
from mmjax.convert.kinds import EMBEDDING, LINEAR, NORM
from mmjax.convert.table import Row
from mmjax.models.lm import LM, LMConfig

if TYPE_CHECKING:
    import transformers

DECODER, LAYER, OURS = "model.decoder.", "model.decoder.layers.*.", "decoder/layers/"
ROWS = (
    Row(DECODER + "embed_tokens", "token", EMBEDDING),
    Row(DECODER + "embed_positions", "position", EMBEDDING),
    Row(DECODER + "project_in", "embed_in", LINEAR),
    Row(DECODER + "project_out", "embed_out", LINEAR),
    Row(LAYER + "self_attn_layer_norm", OURS + "attention_norm", NORM),
    Row(LAYER + "self_attn.q_proj", OURS + "attention/query", LINEAR),
    Row(LAYER + "self_attn.k_proj", OURS + "attention/key", LINEAR),
    Row(LAYER + "self_attn.v_proj", OURS + "attention/value", LINEAR),
    Row(LAYER + "self_attn.out_proj", OURS + "attention/out", LINEAR),
    Row(LAYER + "final_layer_norm", OURS + "mlp_norm", NORM),
    Row(LAYER + "fc1", OURS + "mlp/up", LINEAR),
    Row(LAYER + "fc2", OURS + "mlp/down", LINEAR),
    Row(DECODER + "final_layer_norm", "final_norm", NORM),
    Row("lm_head", "head", LINEAR),
)


def from_hf(source: Source) -> LMConfig:
    hf = source.config
    check_causal(hf)
    before = hf.do_layer_norm_before
    return LMConfig(
        vocab_size=hf.vocab_size,
        max_len=hf.max_position_embeddings,
        width=hf.hidden_size,
        depth=hf.num_hidden_layers,
        heads=hf.num_attention_heads,
        mlp_width=hf.ffn_dim,
        activation=activation(hf.activation_function, "activation_function"),
        norm_eps=1e-5,
        tied=hf.tie_word_embeddings,
        rope=None,
        norm="layernorm" if hf.layer_norm_elementwise_affine else "layernorm_plain",
        norm_placement="pre" if before else "post",
        final_norm=before and not hf._remove_final_layer_norm,
        gated=False,
        qkv_bias=hf.enable_bias,
        out_bias=hf.enable_bias,
        mlp_bias=hf.enable_bias,
        embed_width=hf.word_embed_proj_dim,
        position_offset=2,
    )


def to_hf(config: LMConfig) -> transformers.OPTConfig:
    from transformers import OPTConfig

    before = config.norm_placement == "pre"
    return OPTConfig(
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_len,
        hidden_size=config.width,
        num_hidden_layers=config.depth,
        num_attention_heads=config.heads,
        ffn_dim=config.mlp_width,
        activation_function=NAMES[config.activation],
        tie_word_embeddings=config.tied,
        layer_norm_elementwise_affine=config.norm != "layernorm_plain",
        do_layer_norm_before=before,
        _remove_final_layer_norm=before and not config.final_norm,
        enable_bias=config.mlp_bias,
        word_embed_proj_dim=config.embed_width,
        **NO_TOKENS,
    )


FAMILIES.register("OPTForCausalLM")(
    Family(
        model_type="opt",
        model=LM,
        from_hf=from_hf,
        to_hf=to_hf,
        rows=lambda config: ROWS,
        # A model without its head, as the first checkpoints were saved.
        renames=((r"^decoder\.", "model.decoder."),),
        ignored=tied_head,
        aliases=("OPTModel",),
    )
)
