"""BLIP-2: EVA's image tower, a Q-Former, and a language model: OPT and its like, or Flan-T5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmjax.connectors import QFormerConfig
from mmjax.convert.families import _qformer
from mmjax.convert.families._vlm import Part, expect_connector, language_model, tower
from mmjax.convert.family import FAMILIES, Family, Source
from mmjax.convert.table import Row
from mmjax.models import T5, VLM, Seq2SeqVLM, Seq2SeqVLMConfig, VLMConfig

ENCODER = tower("vision_model.", ("blip_2_vision_model",))
# By the class of our config.
LANGUAGE = {
    VLMConfig: language_model("language_model."),
    Seq2SeqVLMConfig: Part("text_config", T5, "lm/", "language_model."),
}


def from_hf(source: Source) -> VLMConfig:
    """
    Raises:
      ValueError: if the image token is not said, or the Q-Former reads text.
    """
    hf = source.config
    if hf.image_token_index is None:
        raise ValueError(
            "image_token_index is not given, as in files before transformers 4.46: add the id of "
            "'<image>' to config.json (50265 in Salesforce's with OPT, 32100 with Flan-T5)."
        )
    if hf.qformer_config.use_qformer_text_input:
        raise ValueError(
            "qformer_config.use_qformer_text_input=True belongs to BLIP-2's retrieval models, "
            "which generate no text."
        )
    kind = VLMConfig if hf.use_decoder_only_language_model else Seq2SeqVLMConfig
    return kind(
        encoder=ENCODER.from_hf(source),
        connector=_qformer.fields(hf.qformer_config, hf.num_query_tokens, reads_text=False),
        lm=LANGUAGE[kind].from_hf(source),
        image_token=hf.image_token_index,
        features=(-1,),
        features_norm=True,
        class_token=True,
    )


def to_hf(config: VLMConfig) -> Any:
    from transformers import Blip2Config, Blip2QFormerConfig

    expect_connector(config.connector, QFormerConfig)
    return Blip2Config(
        vision_config=ENCODER.to_hf(config.encoder),
        qformer_config=Blip2QFormerConfig(**_qformer.options(config.connector, reads_text=False)),
        text_config=LANGUAGE[type(config)].to_hf(config.lm),
        num_query_tokens=config.connector.queries,
        image_token_index=config.image_token,
    )


def rows(config: VLMConfig) -> Sequence[Row]:
    return (
        *ENCODER.rows(config.encoder),
        *_qformer.rows(config.connector, "qformer.", "connector/", "layernorm"),
        *_qformer.ends(config.connector, "connector/"),
        *LANGUAGE[type(config)].rows(config.lm),
    )


def ignored(config: VLMConfig) -> Sequence[str]:
    return (
        *ENCODER.ignored(config.encoder),
        *LANGUAGE[type(config)].ignored(config.lm),
        r"qformer\.embeddings\.position_ids",
    )


FAMILIES.register("Blip2ForConditionalGeneration")(
    Family(
        model_type="blip-2",
        model=VLM,
        from_hf=from_hf,
        to_hf=to_hf,
        rows=rows,
        ignored=ignored,
        variants={Seq2SeqVLMConfig: Seq2SeqVLM},
    )
)
