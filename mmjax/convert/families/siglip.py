"""SigLIP, and SigLIP 2 of a fixed resolution: both towers, each alone, and a classifier."""

from __future__ import annotations

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
from mmjax.convert.kinds import EMBEDDING, IN_PROJ, LINEAR, NORM, array, patch
from mmjax.convert.table import Row
from mmjax.models import SigLIP, SigLIPConfig, TextConfig, TextTransformer, ViT, ViTConfig
from mmjax.models.projection import ProjectionConfig

SCALAR = array((1,), ())


def head_fields(hf: Any) -> dict[str, str]:
    return {"pooling": "map" if hf.vision_use_head else "none"}


def head_options(config: Any) -> dict[str, bool]:
    """The inverse of `head_fields`."""
    return {"vision_use_head": config.pooling == "map"}


def vision_from_hf(hf: Any, **fields: Any) -> ViTConfig:
    """`SiglipVisionConfig` -> our image tower; `fields` come on top."""
    return ViTConfig(
        **block_fields(hf),
        **image_fields(hf),
        **head_fields(hf),
        mlp_width=hf.intermediate_size,
        **fields,
    )


def vision_to_hf(config: ViTConfig) -> dict[str, Any]:
    """Fields of a `SiglipVisionConfig`."""
    return {
        **block_options(config),
        **image_options(config),
        **head_options(config),
        "intermediate_size": config.mlp_width,
    }


def text_from_hf(hf: Any, **fields: Any) -> TextConfig:
    """`SiglipTextConfig` -> our text tower; `fields` come on top.

    It attends to padding, as in training: the published tokenizers give no mask. transformers
    would hide padding from a text if it were given one.
    """
    return TextConfig(
        **text_fields(hf), attention="bidirectional", padding="attend", pooling="last", **fields
    )


def pool_rows(theirs: str, ours: str) -> tuple[Row, ...]:
    """Attention pooling; prefixes as in `block_rows`."""
    attention = ours + "pool/attention/"
    parts = tuple(attention + part for part in ("query", "key", "value"))
    return (
        Row(theirs + "head.probe", ours + "pool/probe", array((1, 1, -1), (1, -1))),
        Row(theirs + "head.attention.in_proj", parts, IN_PROJ),
        Row(theirs + "head.attention.out_proj", attention + "out", LINEAR),
        Row(theirs + "head.layernorm", ours + "pool/norm", NORM),
        Row(theirs + "head.mlp.fc1", ours + "pool/mlp/up", LINEAR),
        Row(theirs + "head.mlp.fc2", ours + "pool/mlp/down", LINEAR),
    )


def vision_rows(config: ViTConfig, theirs: str, ours: str) -> tuple[Row, ...]:
    """The image tower; prefixes as in `block_rows`."""
    projection = patch(config.patch_size, config.channels)
    return (
        Row(theirs + "embeddings.patch_embedding", ours + "patch/projection", projection),
        Row(theirs + "embeddings.position_embedding", ours + "position", EMBEDDING),
        *block_rows(theirs, ours),
        Row(theirs + "post_layernorm", ours + "final_norm", NORM),
        *pool_rows(theirs, ours),
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


def register(
    prefix: str,
    model_type: str,
    pair: tuple[type, type],
    tower: type,
    vision_from_hf: Any,
    vision_to_hf: Any,
    vision_rows: Any,
    classifier: dict[str, Any],
) -> None:
    """The four classes of SigLIP, or of a model with another image tower.

    Args:
      prefix: of the classes, "Siglip".
      model_type: of the pair, "siglip"; that of its towers is "siglip_vision_model" and so on.
      pair: config and model of both towers.
      tower: model of the image tower.
      vision_from_hf, vision_to_hf, vision_rows: as those above.
      classifier: fields of an image tower that has a classification head.
    """

    def hf_config(part: str, **options: Any) -> Any:
        import transformers

        return getattr(transformers, f"{prefix}{part}Config")(**options)

    def pair_from_hf(source: Source) -> Any:
        vision, text = source.config.vision_config, source.config.text_config
        if text.projection_size != vision.hidden_size:
            raise ValueError(
                f"text_config.projection_size={text.projection_size} and "
                f"vision_config.hidden_size={vision.hidden_size} must be equal: images and texts "
                "are compared with each other."
            )
        return pair[0](image=vision_from_hf(vision), text=text_from_hf(text))

    def pair_to_hf(config: Any) -> Any:
        return hf_config(
            "",
            vision_config=vision_to_hf(config.image),
            text_config=text_options(config.text) | {"projection_size": config.embed_dim},
        )

    def text_alone_to_hf(config: TextConfig) -> Any:
        width = projection_width(config, ProjectionConfig(width=0))
        return hf_config("Text", **text_options(config), projection_size=width)

    add = FAMILIES.register
    add(f"{prefix}Model")(
        family(
            model_type,
            pair[1],
            pair_from_hf,
            pair_to_hf,
            lambda config: (
                *vision_rows(config.image, "vision_model.", "image/"),
                *text_rows("text_model.", "text/"),
                Row("text_model.head", "text_projection", LINEAR),
                Row("logit_scale", "logit_scale", SCALAR),
                Row("logit_bias", "logit_bias", SCALAR),
            ),
        )
    )
    add(f"{prefix}VisionModel")(
        family(
            f"{model_type}_vision_model",
            tower,
            lambda source: vision_from_hf(source.config),
            lambda config: hf_config("Vision", **vision_to_hf(config)),
            lambda config: vision_rows(config, "", ""),
            renames=((r"^vision_model\.", ""),),
        )
    )
    add(f"{prefix}TextModel")(
        family(
            f"{model_type}_text_model",
            TextTransformer,
            lambda source: text_from_hf(
                source.config, projection=ProjectionConfig(source.config.projection_size)
            ),
            text_alone_to_hf,
            lambda config: (*text_rows("", ""), Row("head", "projection", LINEAR)),
            renames=((r"^text_model\.", ""),),
        )
    )
    add(f"{prefix}ForImageClassification")(
        family(
            model_type,
            tower,
            lambda source: vision_from_hf(
                source.config.vision_config, num_classes=source.config.num_labels, **classifier
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


register(
    "Siglip",
    "siglip",
    (SigLIPConfig, SigLIP),
    ViT,
    vision_from_hf,
    vision_to_hf,
    vision_rows,
    {"head_input": "patches"},
)
