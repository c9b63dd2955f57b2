"""Janus and Janus-Pro, and their image tower."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from mmjax.connectors import ConnectorConfig, LinearConfig, MLPConfig
from mmjax.convert.activations import NAMES, activation
from mmjax.convert.families import siglip
from mmjax.convert.families._towers import (
    block_fields,
    block_options,
    image_fields,
    image_options,
)
from mmjax.convert.families._vlm import Part, language_model, tower
from mmjax.convert.family import FAMILIES, Family, Source
from mmjax.convert.kinds import EMBEDDING, LINEAR, NORM
from mmjax.convert.table import Row
from mmjax.models import VQGAN, Janus, JanusConfig, ViT, ViTConfig
from mmjax.models.unified import ApartConfig, CodesConfig

ENCODER = tower("model.vision_model.", types=("janus_vision_model",))
TOKENIZER = Part("vq_config", VQGAN, "tokenizer/", "model.vqmodel.", types=("janus_vqgan",))
TEXT = language_model("", "model.language_model.")
# Whatever `layer_norm_eps` says.
QK_NORM_EPS = 1e-5
# Of `generation_config.json`: {"boi_token_id": the token before an image that is drawn}.
GENERATION = "generation_kwargs"


def vision_from_hf(source: Source) -> ViTConfig:
    """
    Raises:
      ValueError: if queries and keys are normalised and there are several heads, for which norms of
        transformers have the wrong width.
    """
    hf = source.config
    if hf.use_qk_norm and hf.num_attention_heads > 1:
        raise ValueError(
            f"use_qk_norm=True with num_attention_heads={hf.num_attention_heads}: such norms have "
            "the width of all heads, but each head is normalised; with one head only they fit."
        )
    return ViTConfig(
        **block_fields(hf),
        **image_fields(hf),
        pooling="none",
        mlp_width=int(hf.hidden_size * hf.mlp_ratio),
        qkv_bias=hf.attention_bias,
        qk_norm_eps=QK_NORM_EPS if hf.use_qk_norm else None,
    )


def vision_to_hf(config: ViTConfig) -> Any:
    from transformers import JanusVisionConfig

    ratio = config.mlp_width / config.width
    if int(config.width * ratio) != config.mlp_width:  # by rounding
        ratio = (config.mlp_width + 0.5) / config.width
    return JanusVisionConfig(
        **block_options(config),
        **image_options(config),
        mlp_ratio=ratio,
        attention_bias=config.qkv_bias,
        use_qk_norm=config.qk_norm_eps is not None,
    )


def vision_rows(config: ViTConfig) -> Sequence[Row]:
    theirs, ours = "encoder.layers.*.self_attn.", "encoder/layers/attention/"
    return (
        *(
            row._replace(
                theirs=row.theirs.replace("self_attn.out_proj", "self_attn.projection_layer")
            )
            for row in siglip.vision_rows(config, "", "")
        ),
        Row(theirs + "q_norm", ours + "query_norm", NORM),
        Row(theirs + "k_norm", ours + "key_norm", NORM),
    )


def _connector(hf: Any) -> ConnectorConfig:
    if hf.depth <= 1:
        return LinearConfig()
    return MLPConfig(layers=hf.depth, activation=activation(hf.hidden_act, "hidden_act"))


def _layers(config: ConnectorConfig) -> int:
    """The inverse of `_connector`.

    Raises:
      ValueError: if it is another connector than the format has.
    """
    if type(config) not in (LinearConfig, MLPConfig):
        raise ValueError(
            f"the connector is {config.name!r}; the format has 'mlp' and 'linear' only"
        )
    return config.layers if isinstance(config, MLPConfig) else 1


def from_hf(source: Source) -> JanusConfig:
    """
    Raises:
      ValueError: if parts do not fit each other; if nothing says which token begins an image.
    """
    hf = source.config
    encoder, tokenizer, lm = (part.from_hf(source) for part in (ENCODER, TOKENIZER, TEXT))
    vision, vq = hf.vision_config, hf.vq_config
    for name, value in (
        ("vision_config.projection_dim", vision.projection_dim),
        ("vq_config.projection_dim", vq.projection_dim),
        ("vq_config.image_token_embed_dim", vq.image_token_embed_dim),
    ):
        if value != lm.width:
            raise ValueError(
                f"{name}={value} is not the width of the language model, text_config.hidden_size="
                f"{lm.width}."
            )
    image = CodesConfig(tokenizer, ids=lm.vocab_size, begin=_begin(hf), end=None)
    if vision.num_image_tokens != image.length:
        raise ValueError(
            f"vision_config.num_image_tokens={vision.num_image_tokens}, but an image has "
            f"{image.length} codes."
        )
    return JanusConfig(
        encoder=encoder,
        connector=_connector(vision),
        # The head is the whole's: that says whether it is the token table, and caps no logits.
        lm=dataclasses.replace(lm, tied=hf.tie_word_embeddings, final_softcap=None),
        image=image,
        image_token=hf.image_token_id,
        apart=ApartConfig(
            embed_width=vq.embed_dim,
            depth=max(vq.num_hidden_layers, 1),
            head_hidden=lm.width,
            activation=activation(vq.hidden_act, "hidden_act"),
        ),
    )


def _begin(hf: Any) -> int:
    begin = hf.to_dict().get(GENERATION, {}).get("boi_token_id")
    if begin is None:
        raise ValueError(
            f"nothing says which token comes before an image: add {GENERATION!r}: "
            '{"boi_token_id": ...} to generation_config.json (the id of "<begin_of_image>").'
        )
    return begin


def to_hf(config: JanusConfig) -> Any:
    """The inverse of `from_hf`.

    Raises:
      ValueError: if codes have no tables of their own, or another connector reads images.
    """
    from transformers import JanusConfig as HFConfig

    width, apart = config.lm.width, config.apart
    if apart is None:
        raise ValueError("apart=None: the format has tables of their own for codes")
    vision = ENCODER.to_hf(config.encoder).to_dict() | {
        "depth": _layers(config.connector),
        "projection_dim": width,
        "num_image_tokens": config.image.length,
    }
    vq = TOKENIZER.to_hf(config.image.tokenizer).to_dict() | {
        "num_hidden_layers": apart.depth,
        "hidden_act": NAMES[apart.activation],
        "projection_dim": width,
        "image_token_embed_dim": width,
    }
    return HFConfig(
        vision_config=vision,
        vq_config=vq,
        text_config=TEXT.to_hf(config.lm),
        image_token_id=config.image_token,
        tie_word_embeddings=config.lm.tied,
        **{GENERATION: {"boi_token_id": config.image.begin}},
    )


def _mlp(theirs: str, ours: str, layers: int) -> tuple[Row, ...]:
    return (
        Row(f"{theirs}.fc1", f"{ours}/0", LINEAR),
        *(
            Row(f"{theirs}.hidden_layers.{layer}", f"{ours}/{layer + 1}", LINEAR)
            for layer in range(layers - 1)
        ),
    )


def rows(config: JanusConfig) -> Sequence[Row]:
    layers = _layers(config.connector)
    connector = _mlp("model.aligner", "connector/linears", layers)
    if layers == 1:
        connector = (Row("model.aligner.fc1", "connector/projection", LINEAR),)
    depth = 0 if config.apart is None else config.apart.depth
    return (
        *ENCODER.rows(config.encoder),
        *connector,
        *TOKENIZER.rows(config.image.tokenizer),
        Row("model.generation_embeddings", "apart/table", EMBEDDING),
        *_mlp("model.generation_aligner", "apart/maps", depth),
        Row("model.generation_head.proj_out", "apart/head_in", LINEAR),
        Row("model.generation_head.vision_head", "apart/head", LINEAR),
        *TEXT.rows(config.lm),
    )


def ignored(config: JanusConfig) -> Sequence[str]:
    return (*ENCODER.ignored(config.encoder), *TEXT.ignored(config.lm))


FAMILIES.register("JanusVisionModel")(
    siglip.family("janus_vision_model", ViT, vision_from_hf, vision_to_hf, vision_rows)
)
FAMILIES.register("JanusForConditionalGeneration")(
    Family(
        model_type="janus",
        model=Janus,
        from_hf=from_hf,
        to_hf=to_hf,
        rows=rows,
        ignored=ignored,
        generation=(GENERATION,),
    )
)
