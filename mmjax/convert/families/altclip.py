"""AltCLIP: both towers, and each alone."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from mmjax.convert.families import bert
from mmjax.convert.families._towers import POSITION_IDS
from mmjax.convert.families.clip import vision_from_hf, vision_rows, vision_to_hf
from mmjax.convert.family import FAMILIES, Family, Source
from mmjax.convert.kinds import ARRAY, LINEAR, NORM
from mmjax.convert.table import Row
from mmjax.models import AltCLIP, AltCLIPConfig, AltText, AltTextConfig, BertConfig, ViT

# transformers writes `layer` in the files of a pair and `layers` in those of a tower alone. The
# published ones have `layers` in the image tower and `layer` in the text tower.
_TO_LAYER = (r"encoder\.layers\.", "encoder.layer.")
_TO_LAYERS = (r"encoder\.layer\.", "encoder.layers.")


def _ignored(config: Any) -> Sequence[str]:
    return (POSITION_IDS, bert.BUFFERS)


def _text_from_hf(hf: Any) -> AltTextConfig:
    return AltTextConfig(
        bert=BertConfig(**bert.fields(hf, "offset"), pooler=False), pooled_width=hf.project_dim
    )


def _text_to_hf(config: AltTextConfig) -> dict[str, Any]:
    return {**bert.options(config.bert, "offset"), "project_dim": config.pooled_width}


def _text_rows(theirs: str, ours: str) -> tuple[Row, ...]:
    return (
        *bert.rows(f"{theirs}roberta.", f"{ours}bert/", "encoder.layers"),
        Row(f"{theirs}pre_LN", f"{ours}norm", NORM),
        Row(f"{theirs}transformation", f"{ours}projection", LINEAR),
    )


def _from_hf(source: Source) -> AltCLIPConfig:
    hf = source.config
    return AltCLIPConfig(
        image=vision_from_hf(hf.vision_config),
        text=_text_from_hf(hf.text_config),
        embed_dim=hf.projection_dim,
        init_scale=math.exp(hf.logit_scale_init_value),
        max_scale=None,
    )


def _to_hf(config: AltCLIPConfig) -> Any:
    from transformers import AltCLIPConfig as HFConfig

    return HFConfig(
        vision_config=vision_to_hf(config.image),
        text_config=_text_to_hf(config.text),
        projection_dim=config.embed_dim,
        logit_scale_init_value=math.log(config.init_scale),
    )


def _rows(config: AltCLIPConfig) -> Sequence[Row]:
    towers = (
        *vision_rows(config.image, "vision_model.", "image/"),
        *_text_rows("text_model.", "text/"),
    )
    return (
        *(row._replace(theirs=re.sub(*_TO_LAYER, row.theirs)) for row in towers),
        Row("visual_projection", "image_projection", LINEAR),
        Row("text_projection", "text_projection", LINEAR),
        Row("logit_scale", "logit_scale", ARRAY),
    )


def _vision_to_hf(config: Any) -> Any:
    from transformers import AltCLIPVisionConfig

    return AltCLIPVisionConfig(**vision_to_hf(config))


def _text_alone_to_hf(config: AltTextConfig) -> Any:
    from transformers import AltCLIPTextConfig

    return AltCLIPTextConfig(**_text_to_hf(config))


FAMILIES.register("AltCLIPModel")(
    Family(
        model_type="altclip",
        model=AltCLIP,
        from_hf=_from_hf,
        to_hf=_to_hf,
        rows=_rows,
        renames=(_TO_LAYER, *bert.TENSORFLOW),
        ignored=_ignored,
    )
)
FAMILIES.register("AltCLIPTextModel")(
    Family(
        model_type="altclip_text_model",
        model=AltText,
        from_hf=lambda source: _text_from_hf(source.config),
        to_hf=_text_alone_to_hf,
        rows=lambda config: _text_rows("", ""),
        renames=(_TO_LAYERS, *bert.TENSORFLOW),
        ignored=_ignored,
    )
)
FAMILIES.register("AltCLIPVisionModel")(
    Family(
        model_type="altclip_vision_model",
        model=ViT,
        from_hf=lambda source: vision_from_hf(source.config),
        to_hf=_vision_to_hf,
        rows=lambda config: vision_rows(config, "", ""),
        renames=((r"^vision_model\.", ""), _TO_LAYERS),
        ignored=_ignored,
    )
)
