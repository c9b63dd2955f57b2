"""MPT: ALiBi, and no biases.

The class of transformers, which reads the checkpoints of 7B and 30B. MPT-1B has code of its own
("mosaic_gpt", with norms of queries and keys over their whole width), and is `REFUSED`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmjax.convert.families._decoder import NO_TOKENS, check_causal, tied_head
from mmjax.convert.family import FAMILIES, REFUSED, Family, Source
from mmjax.convert.kinds import EMBEDDING, LINEAR, NORM, fused
from mmjax.convert.table import Row
from mmjax.models.lm import LM, LMConfig

if TYPE_CHECKING:
    import transformers

LAYER, OURS = "transformer.blocks.*.", "decoder/layers/"
ROWS = (
    Row("transformer.wte", "token", EMBEDDING),
    Row(LAYER + "norm_1", OURS + "attention_norm", NORM),
    Row(
        LAYER + "attn.Wqkv",
        tuple(OURS + f"attention/{part}" for part in ("query", "key", "value")),
        fused(1, 1, 1),
    ),
    Row(LAYER + "attn.out_proj", OURS + "attention/out", LINEAR),
    Row(LAYER + "norm_2", OURS + "mlp_norm", NORM),
    Row(LAYER + "ffn.up_proj", OURS + "mlp/up", LINEAR),
    Row(LAYER + "ffn.down_proj", OURS + "mlp/down", LINEAR),
    Row("transformer.norm_f", "final_norm", NORM),
    Row("lm_head", "head", LINEAR),
)
# What transformers computes whatever a config says, and is not what MPT's own code then would.
ONLY = {"expansion_ratio": 4, "no_bias": True, "logit_scale": None}
ONLY_OF_ATTENTION = {
    "attn_type": "multihead_attention",
    "clip_qkv": None,
    "prefix_lm": False,
    "qk_ln": False,
    "alibi": True,
    "alibi_bias_max": 8,
}


def _check(hf: Any, only: dict[str, Any]) -> None:
    for name, value in only.items():
        given = getattr(hf, name)
        if given != value:
            raise ValueError(f"{name}={given!r} is not supported, only {value!r} is.")


def from_hf(source: Source) -> LMConfig:
    """
    Raises:
      ValueError: if an option of MPT is set that ours does not have.
    """
    hf = source.config
    check_causal(hf)
    _check(hf, ONLY)
    _check(hf.attn_config, ONLY_OF_ATTENTION)
    return LMConfig(
        vocab_size=hf.vocab_size,
        max_len=hf.max_seq_len,
        width=hf.d_model,
        depth=hf.n_layers,
        heads=hf.n_heads,
        mlp_width=4 * hf.d_model,
        activation="gelu",
        norm_eps=hf.layer_norm_epsilon,
        tied=hf.tie_word_embeddings,
        rope=None,
        alibi=8.0,
        norm="layernorm_unbiased",
        gated=False,
        scale=hf.attn_config.softmax_scale,
    )


def to_hf(config: LMConfig) -> transformers.MptConfig:
    from transformers import MptConfig

    return MptConfig(
        vocab_size=config.vocab_size,
        max_seq_len=config.max_len,
        d_model=config.width,
        n_layers=config.depth,
        n_heads=config.heads,
        layer_norm_epsilon=config.norm_eps,
        tie_word_embeddings=config.tied,
        attn_config={"softmax_scale": config.scale},
        **NO_TOKENS,
    )


FAMILIES.register("MptForCausalLM")(
    Family(
        model_type="mpt",
        model=LM,
        from_hf=from_hf,
        to_hf=to_hf,
        rows=lambda config: ROWS,
        # A model without its head.
        renames=((r"^(wte|blocks|norm_f)\.", r"transformer.\1."),),
        ignored=tied_head,
        aliases=("MptModel", "MPTForCausalLM"),
    )
)

REFUSED["mosaic_gpt"] = (
    "MPT-1B, the language model of OpenFlamingo-3B, is not converted. It normalises queries and "
    "keys over their whole width, which our MPT does not, and transformers has no class to compare "
    "it with, or to save it as. Take OpenFlamingo-4B (of RedPajama-INCITE, a GPT-NeoX) or -9B (of "
    "MPT-7B)."
)
