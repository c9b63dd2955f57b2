"""GPT-2."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmjax.convert.activations import NAMES, activation
from mmjax.convert.families._decoder import NO_TOKENS, check_causal, tied_head
from mmjax.convert.family import FAMILIES, Family, Source
from mmjax.convert.kinds import CONV1D, CONV1D_QKV, EMBEDDING, LINEAR, NORM
from mmjax.convert.table import Row
from mmjax.models.lm import LM, LMConfig

if TYPE_CHECKING:
    import transformers

LAYER, OURS = "transformer.h.*.", "decoder/layers/"
ROWS = (
    Row("transformer.wte", "token", EMBEDDING),
    Row("transformer.wpe", "position", EMBEDDING),
    Row(LAYER + "ln_1", OURS + "attention_norm", NORM),
    Row(
        LAYER + "attn.c_attn",
        tuple(OURS + f"attention/{part}" for part in ("query", "key", "value")),
        CONV1D_QKV,
    ),
    Row(LAYER + "attn.c_proj", OURS + "attention/out", CONV1D),
    Row(LAYER + "ln_2", OURS + "mlp_norm", NORM),
    Row(LAYER + "mlp.c_fc", OURS + "mlp/up", CONV1D),
    Row(LAYER + "mlp.c_proj", OURS + "mlp/down", CONV1D),
    Row("transformer.ln_f", "final_norm", NORM),
    Row("lm_head", "head", LINEAR),
)


def from_hf(source: Source) -> LMConfig:
    """`reorder_and_upcast_attn` is about rounding only: logits are in float32 here anyway."""
    hf = source.config
    check_causal(hf)
    if hf.add_cross_attention:
        raise ValueError("add_cross_attention=True is not supported: this is a decoder alone.")
    return LMConfig(
        vocab_size=hf.vocab_size,
        max_len=hf.n_positions,
        width=hf.n_embd,
        depth=hf.n_layer,
        heads=hf.n_head,
        mlp_width=4 * hf.n_embd if hf.n_inner is None else hf.n_inner,
        activation=activation(hf.activation_function, "activation_function"),
        norm_eps=hf.layer_norm_epsilon,
        tied=hf.tie_word_embeddings,
        rope=None,
        norm="layernorm",
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        scale=None if hf.scale_attn_weights else 1.0,
        scale_by_depth=hf.scale_attn_by_inverse_layer_idx,
    )


def to_hf(config: LMConfig) -> transformers.GPT2Config:
    from transformers import GPT2Config

    return GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.max_len,
        n_embd=config.width,
        n_layer=config.depth,
        n_head=config.heads,
        n_inner=config.mlp_width,
        activation_function=NAMES[config.activation],
        layer_norm_epsilon=config.norm_eps,
        tie_word_embeddings=config.tied,
        scale_attn_weights=config.scale is None,
        scale_attn_by_inverse_layer_idx=config.scale_by_depth,
        **NO_TOKENS,
    )


FAMILIES.register("GPT2LMHeadModel")(
    Family(
        model_type="gpt2",
        model=LM,
        from_hf=from_hf,
        to_hf=to_hf,
        rows=lambda config: ROWS,
        # A model without its head, as OpenAI's own checkpoints are.
        renames=((r"^(wte|wpe|h|ln_f)\.", r"transformer.\1."),),
        # Old versions saved the causal mask.
        ignored=lambda config: (
            r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",
            *tied_head(config),
        ),
        aliases=("GPT2Model",),
    )
)
