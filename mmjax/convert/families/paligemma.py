"""PaliGemma 1 and 2: SigLIP's image tower, one linear map, Gemma.

Its prefix (images and prompt) sees itself; `prefix` of `VLM.run` says where it ends.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

from mmjax.connectors import LinearConfig
from mmjax.convert.families._vlm import expect_connector, language_model, tower
from mmjax.convert.families.llava import MODULE_NAMES, RENAMES
from mmjax.convert.family import FAMILIES, Family, Source
from mmjax.convert.kinds import LINEAR
from mmjax.convert.table import Row
from mmjax.models import VLM, VLMConfig

ENCODER = tower("vision_tower.", ("siglip_vision_model",))
TEXT = language_model("language_model.")


def from_hf(source: Source) -> VLMConfig:
    """`PaliGemmaConfig` -> our config.

    Raises:
      ValueError: if the projection is not of the language model's width.
    """
    hf = source.config
    # It says so of the prefix, which is said by the attention of the whole here.
    text = copy.deepcopy(hf.text_config)
    text.use_bidirectional_attention = None
    if hf.projection_dim != text.hidden_size:
        raise ValueError(
            f"projection_dim={hf.projection_dim} must be the width of the language model, "
            f"text_config.hidden_size={text.hidden_size}."
        )
    encoder, lm = ENCODER.from_hf(source), TEXT.from_hf(source, text)
    return VLMConfig(
        encoder=encoder,
        connector=LinearConfig(),
        lm=dataclasses.replace(lm, tied=hf.tie_word_embeddings),
        image_token=hf.image_token_index,
        features=(-1,),
        features_norm=True,
        attention="prefix",
    )


def to_hf(config: VLMConfig) -> Any:
    from transformers import PaliGemmaConfig

    return PaliGemmaConfig(
        vision_config=ENCODER.to_hf(config.encoder),
        text_config=TEXT.to_hf(config.lm),
        tie_word_embeddings=config.lm.tied,
        image_token_index=config.image_token,
        vocab_size=config.lm.vocab_size,
        hidden_size=config.lm.width,
        projection_dim=config.lm.width,
    )


def rows(config: VLMConfig) -> Sequence[Row]:
    expect_connector(config.connector, LinearConfig)
    return (
        *ENCODER.rows(config.encoder),
        Row("multi_modal_projector.linear", "connector/projection", LINEAR),
        *TEXT.rows(config.lm),
    )


def ignored(config: VLMConfig) -> Sequence[str]:
    return (*ENCODER.ignored(config.encoder), *TEXT.ignored(config.lm))


FAMILIES.register("PaliGemmaForConditionalGeneration")(
    Family(
        model_type="paligemma",
        model=VLM,
        from_hf=from_hf,
        to_hf=to_hf,
        rows=rows,
        renames=RENAMES,
        module_names=MODULE_NAMES,
        ignored=ignored,
    )
)
