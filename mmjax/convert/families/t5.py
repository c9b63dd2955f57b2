"""T5 1.0, T5 1.1 and Flan-T5, and their encoder alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmjax.convert.activations import NAMES, activation
from mmjax.convert.family import FAMILIES, Family, Source
from mmjax.convert.kinds import EMBEDDING, LINEAR, NORM
from mmjax.convert.table import Row
from mmjax.models import T5, T5Config, T5Encoder, T5EncoderConfig

# What `shared` is called in the two stacks, and a table that cross-attention once had and never
# used.
_IGNORED = (
    r"(en|de)coder\.embed_tokens\.weight",
    r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
)
# In a gated MLP transformers reads "gelu" as the tanh approximation.
_GATED = NAMES | {"gelu_tanh": "gelu", "gelu": "gelu_python"}


def _fields(hf: Any) -> dict[str, Any]:
    return {
        "vocab_size": hf.vocab_size,
        "width": hf.d_model,
        "depth": hf.num_layers,
        "heads": hf.num_heads,
        "head_dim": hf.d_kv,
        "mlp_width": hf.d_ff,
        "activation": activation(hf.dense_act_fn, "feed_forward_proj"),
        "gated": hf.is_gated_act,
        "norm_eps": hf.layer_norm_epsilon,
        "buckets": hf.relative_attention_num_buckets,
        "max_distance": hf.relative_attention_max_distance,
    }


def _options(config: T5EncoderConfig) -> dict[str, Any]:
    """The inverse of `_fields`."""
    names = _GATED if config.gated else NAMES
    return {
        "vocab_size": config.vocab_size,
        "d_model": config.width,
        "num_layers": config.depth,
        "num_heads": config.heads,
        "d_kv": config.head_dim,
        "d_ff": config.mlp_width,
        "feed_forward_proj": ("gated-" if config.gated else "") + names[config.activation],
        "layer_norm_epsilon": config.norm_eps,
        "relative_attention_num_buckets": config.buckets,
        "relative_attention_max_distance": config.max_distance,
    }


def _stack_rows(theirs: str, cross: bool, gated: bool) -> tuple[Row, ...]:
    layer, block = f"{theirs}.block.*.layer.", f"{theirs}/blocks/layers/"

    def attention(place: str, name: str, ours: str) -> tuple[Row, ...]:
        parts = {"q": "query", "k": "key", "v": "value", "o": "out"}
        return (
            *(Row(f"{place}.{name}.{a}", f"{block}{ours}/{b}", LINEAR) for a, b in parts.items()),
            Row(f"{place}.layer_norm", f"{block}{ours}_norm", NORM),
        )

    mlp = f"{layer}{2 if cross else 1}"
    # The gate is what goes through the activation.
    inputs = {"wi_0": "gate", "wi_1": "up"} if gated else {"wi": "up"}
    return (
        Row(
            f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias",
            f"{theirs}/relative",
            EMBEDDING,
        ),
        *attention(f"{layer}0", "SelfAttention", "attention"),
        *(attention(f"{layer}1", "EncDecAttention", "cross") if cross else ()),
        *(
            Row(f"{mlp}.DenseReluDense.{a}", f"{block}mlp/{b}", LINEAR)
            for a, b in {**inputs, "wo": "down"}.items()
        ),
        Row(f"{mlp}.layer_norm", f"{block}mlp_norm", NORM),
        Row(f"{theirs}.final_layer_norm", f"{theirs}/final_norm", NORM),
    )


def _from_hf(source: Source) -> T5Config:
    hf = source.config
    start = hf.to_dict().get("decoder_start_token_id")
    if start is None:
        raise ValueError("decoder_start_token_id is not given: the decoder has no first token.")
    return T5Config(
        **_fields(hf),
        decoder_depth=hf.num_decoder_layers,
        # transformers 5 says of all T5 that they are tied; which are, only the tensors show.
        tied="lm_head.weight" not in source.names,
        scale_logits=hf.scale_decoder_outputs,
        decoder_start_id=start,
    )


def _to_hf(config: T5Config) -> Any:
    from transformers import T5Config as HFConfig

    return HFConfig(
        **_options(config),
        num_decoder_layers=config.decoder_depth,
        # Its one effect on a config of T5: whether outputs are scaled.
        tie_word_embeddings=config.scale_logits,
        decoder_start_token_id=config.decoder_start_id,
    )


def _rows(config: T5Config) -> Sequence[Row]:
    return (
        Row("shared", "token", EMBEDDING),
        *_stack_rows("encoder", False, config.gated),
        *_stack_rows("decoder", True, config.gated),
        Row("lm_head", "head", LINEAR),
    )


def _encoder_to_hf(config: T5EncoderConfig) -> Any:
    from transformers import T5Config as HFConfig

    return HFConfig(**_options(config), is_encoder_decoder=False, use_cache=False)


FAMILIES.register("T5ForConditionalGeneration")(
    Family(
        model_type="t5",
        model=T5,
        from_hf=_from_hf,
        to_hf=_to_hf,
        rows=_rows,
        ignored=lambda config: _IGNORED,
    )
)
FAMILIES.register("T5EncoderModel")(
    Family(
        model_type="t5",
        model=T5Encoder,
        from_hf=lambda source: T5EncoderConfig(**_fields(source.config)),
        to_hf=_encoder_to_hf,
        rows=lambda config: (
            Row("shared", "token", EMBEDDING),
            *_stack_rows("encoder", False, config.gated),
        ),
        # Transformers, too, reads the encoder of a whole T5.
        ignored=lambda config: (*_IGNORED, r"decoder\..*", r"lm_head\.weight"),
    )
)
