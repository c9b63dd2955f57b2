"""CLIP: both towers, each alone, each with its projection, and with a classification head.

MetaCLIP (1) is published in this format as well.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from mmjax.convert.families._towers import (
    POSITION_IDS,
    block_fields,
    block_options,
    block_rows,
    image_fields,
    image_options,
    projection_width,
    text_fields,
    text_options,
    text_rows,
)
from mmjax.convert.family import FAMILIES, Family, Source
from mmjax.convert.kinds import (
    ARRAY,
    EMBEDDING,
    LINEAR,
    NORM,
    Kind,
    Leaf,
    Transform,
    array,
    patch,
)
from mmjax.convert.table import Row
from mmjax.models import CLIP, CLIPConfig, TextConfig, TextTransformer, ViT, ViTConfig
from mmjax.models.projection import ProjectionConfig

# Of CLIP's projections: linear maps without a bias.
PLAIN = ProjectionConfig(width=0, bias=False)
# Configs written before transformers PR 24773 have this id, and mean the largest id of a text.
LEGACY_EOS = 2


def vision_from_hf(hf: Any, **fields: Any) -> ViTConfig:
    """`CLIPVisionConfig` -> our image tower; `fields` come on top."""
    return ViTConfig(
        **block_fields(hf),
        **image_fields(hf),
        mlp_width=hf.intermediate_size,
        pooling="cls",
        pre_norm=True,
        patch_bias=False,
        **fields,
    )


def vision_to_hf(config: ViTConfig) -> dict[str, Any]:
    """Fields of a `CLIPVisionConfig`."""
    return {
        **block_options(config),
        **image_options(config),
        "intermediate_size": config.mlp_width,
    }


def text_from_hf(hf: Any, legacy: int | None = LEGACY_EOS, **fields: Any) -> TextConfig:
    """`CLIPTextConfig` -> our text tower; `fields` come on top.

    Args:
      legacy: the eos_token_id that means "the largest id".

    Raises:
      ValueError: if there is no eos_token_id, or there are several.
    """
    eos = hf.eos_token_id
    if not isinstance(eos, int):
        raise ValueError(f"eos_token_id={eos}: texts are pooled at one token, so give one id.")
    pooling = {"pooling": "argmax"} if eos == legacy else {"pooling": "eos", "eos_id": eos}
    return TextConfig(**text_fields(hf), attention="causal", padding="mask", **pooling, **fields)


def text_to_hf(config: TextConfig, legacy: int | None = LEGACY_EOS) -> dict[str, Any]:
    """Fields of a `CLIPTextConfig`."""
    eos = legacy if config.pooling == "argmax" else config.eos_id
    return {**text_options(config), "eos_token_id": eos}


def vision_rows(config: ViTConfig, theirs: str, ours: str) -> tuple[Row, ...]:
    """The image tower; prefixes as in `block_rows`."""
    projection = patch(config.patch_size, config.channels)
    class_token = array((-1,), (1, -1))
    return (
        Row(theirs + "embeddings.class_embedding", ours + "class_token", class_token),
        Row(theirs + "embeddings.patch_embedding", ours + "patch/projection", projection),
        Row(theirs + "embeddings.position_embedding", ours + "position", EMBEDDING),
        Row(theirs + "pre_layrnorm", ours + "pre_norm", NORM),
        *block_rows(theirs, ours),
        Row(theirs + "post_layernorm", ours + "final_norm", NORM),
    )


def log_scale(limit: float | None) -> Kind:
    """The temperature; transformers has no limit, so one that is beyond ours is saved at it."""
    if limit is None:
        return ARRAY
    top = math.log(limit)
    return (Leaf("", "", Transform(lambda x: (x,), lambda x: x.clip(max=top))),)


def register(prefix: str, model_type: str, legacy: int | None) -> None:
    """The six classes of CLIP, or of a model that differs in names and in pooling only.

    Args:
      prefix: of the classes, "CLIP".
      model_type: of the pair, "clip"; that of its towers is "clip_vision_model" and so on.
      legacy: see `text_from_hf`.
    """

    def hf_config(part: str, **options: Any) -> Any:
        import transformers

        return getattr(transformers, f"{prefix}{part}Config")(**options)

    def pair_from_hf(source: Source) -> CLIPConfig:
        hf = source.config
        return CLIPConfig(
            image=vision_from_hf(hf.vision_config),
            text=text_from_hf(hf.text_config, legacy),
            embed_dim=hf.projection_dim,
            init_scale=math.exp(hf.logit_scale_init_value),
            max_scale=None,
        )

    def pair_to_hf(config: CLIPConfig) -> Any:
        width = {"projection_dim": config.embed_dim}
        return hf_config(
            "",
            vision_config=vision_to_hf(config.image) | width,
            text_config=text_to_hf(config.text, legacy) | width,
            logit_scale_init_value=math.log(config.init_scale),
            **width,
        )

    def pair_rows(config: CLIPConfig) -> Sequence[Row]:
        return (
            *vision_rows(config.image, "vision_model.", "image/"),
            *text_rows("text_model.", "text/"),
            Row("visual_projection", "image_projection", LINEAR),
            Row("text_projection", "text_projection", LINEAR),
            Row("logit_scale", "logit_scale", log_scale(config.max_scale)),
        )

    def family(model_type: str, model: type, from_hf: Any, to_hf: Any, rows: Any, **rest: Any):
        return Family(
            model_type=model_type,
            model=model,
            from_hf=from_hf,
            to_hf=to_hf,
            rows=rows,
            ignored=lambda config: (POSITION_IDS,),
            **rest,
        )

    add = FAMILIES.register
    add(f"{prefix}Model")(family(model_type, CLIP, pair_from_hf, pair_to_hf, pair_rows))

    vision, text = f"{model_type}_vision_model", f"{model_type}_text_model"
    add(f"{prefix}VisionModel")(
        family(
            vision,
            ViT,
            lambda source: vision_from_hf(source.config),
            lambda config: hf_config("Vision", **vision_to_hf(config)),
            lambda config: vision_rows(config, "", ""),
            renames=((r"^vision_model\.", ""),),
        )
    )
    add(f"{prefix}TextModel")(
        family(
            text,
            TextTransformer,
            lambda source: text_from_hf(source.config, legacy),
            lambda config: hf_config("Text", **text_to_hf(config, legacy)),
            lambda config: text_rows("", ""),
            renames=((r"^text_model\.", ""),),
        )
    )

    def projection(hf: Any) -> ProjectionConfig:
        return dataclasses.replace(PLAIN, width=hf.projection_dim)

    def projected(part: str, options: dict[str, Any], config: Any) -> Any:
        return hf_config(part, projection_dim=projection_width(config, PLAIN), **options)

    add(f"{prefix}VisionModelWithProjection")(
        family(
            vision,
            ViT,
            lambda source: vision_from_hf(source.config, projection=projection(source.config)),
            lambda config: projected("Vision", vision_to_hf(config), config),
            lambda config: (
                *vision_rows(config, "vision_model.", ""),
                Row("visual_projection", "projection", LINEAR),
            ),
        )
    )
    add(f"{prefix}TextModelWithProjection")(
        family(
            text,
            TextTransformer,
            lambda source: text_from_hf(
                source.config, legacy, projection=projection(source.config)
            ),
            lambda config: projected("Text", text_to_hf(config, legacy), config),
            lambda config: (
                *text_rows("text_model.", ""),
                Row("text_projection", "projection", LINEAR),
            ),
        )
    )
    add(f"{prefix}ForImageClassification")(
        family(
            model_type,
            ViT,
            lambda source: vision_from_hf(
                source.config.vision_config,
                num_classes=source.config.num_labels,
                head_input="raw_patches",
            ),
            lambda config: hf_config(
                "", vision_config=vision_to_hf(config), num_labels=config.num_classes
            ),
            lambda config: (
                *vision_rows(config, "vision_model.", ""),
                Row("classifier", "head", LINEAR),
            ),
        )
    )


register("CLIP", "clip", LEGACY_EOS)
