"""ViT: plain, with or without its pooler, and with a classification head."""

from __future__ import annotations

from typing import Any

from mmjax.convert.activations import NAMES, activation
from mmjax.convert.families._towers import block_fields, block_options, square
from mmjax.convert.family import FAMILIES, Family, Source
from mmjax.convert.kinds import LINEAR, NORM, array, patch
from mmjax.convert.table import Row
from mmjax.models import ViT, ViTConfig
from mmjax.models.projection import ProjectionConfig

# Names within transformers 5 -> those it writes to files, as all versions before did.
RENAMES = (
    (r"(^|\.)layers\.(\d+)\.attention\.o_proj\.", r"\1layers.\2.attention.output.dense."),
    (r"(^|\.)layers\.(\d+)\.attention\.q_proj\.", r"\1layers.\2.attention.attention.query."),
    (r"(^|\.)layers\.(\d+)\.attention\.k_proj\.", r"\1layers.\2.attention.attention.key."),
    (r"(^|\.)layers\.(\d+)\.attention\.v_proj\.", r"\1layers.\2.attention.attention.value."),
    (r"(^|\.)layers\.(\d+)\.mlp\.fc1\.", r"\1layers.\2.intermediate.dense."),
    (r"(^|\.)layers\.(\d+)\.mlp\.fc2\.", r"\1layers.\2.output.dense."),
    (r"(^|\.)layers\.(\d+)\.", r"\1encoder.layer.\2."),
)


def from_hf(hf: Any, **fields: Any) -> ViTConfig:
    """transformers' `ViTConfig` -> ours; `fields` come on top."""
    size, patch_size = hf.image_size, square(hf.patch_size, "patch_size")
    sides = (size, size) if isinstance(size, int) else tuple(size)
    return ViTConfig(
        **block_fields(hf),
        image_size=sides,
        patch_size=patch_size,
        channels=hf.num_channels,
        partial_patches="crop" if any(side % patch_size for side in sides) else "error",
        position="learned",
        pooling="cls",
        mlp_width=hf.intermediate_size,
        qkv_bias=hf.qkv_bias,
        **fields,
    )


def to_hf(config: ViTConfig, **options: Any) -> Any:
    """The inverse of `from_hf`; `options` come on top."""
    import transformers

    size = config.image_size
    return transformers.ViTConfig(
        **block_options(config),
        image_size=size if isinstance(size, int) else list(size),
        patch_size=config.patch_size,
        num_channels=config.channels,
        intermediate_size=config.mlp_width,
        qkv_bias=config.qkv_bias,
        **options,
    )


def plain_from_hf(source: Source) -> ViTConfig:
    """Whether there is a pooler shows in the tensors only."""
    if "pooler.dense.weight" not in source.names:
        return from_hf(source.config)
    act = activation(source.config.pooler_act, "pooler_act")
    return from_hf(
        source.config, projection=ProjectionConfig(source.config.pooler_output_size, act)
    )


def plain_to_hf(config: ViTConfig) -> Any:
    pooler = config.projection
    if pooler is None:
        return to_hf(config)
    if pooler.activation is None:
        raise ValueError(f"projection={pooler}: the pooler of the format has an activation.")
    return to_hf(config, pooler_output_size=pooler.width, pooler_act=NAMES[pooler.activation])


def rows(config: ViTConfig, prefix: str) -> tuple[Row, ...]:
    """All but poolers and heads; `prefix` is "vit." or ""."""
    table = array((1, -1, config.width), (-1, config.width))
    layer, block = prefix + "encoder.layer.*.", "encoder/layers/"
    projection = patch(config.patch_size, config.channels)
    return (
        Row(prefix + "embeddings.cls_token", "class_token", table),
        Row(prefix + "embeddings.position_embeddings", "position/embedding", table),
        Row(prefix + "embeddings.patch_embeddings.projection", "patch/projection", projection),
        Row(layer + "layernorm_before", block + "attention_norm", NORM),
        Row(layer + "attention.attention.query", block + "attention/query", LINEAR),
        Row(layer + "attention.attention.key", block + "attention/key", LINEAR),
        Row(layer + "attention.attention.value", block + "attention/value", LINEAR),
        Row(layer + "attention.output.dense", block + "attention/out", LINEAR),
        Row(layer + "layernorm_after", block + "mlp_norm", NORM),
        Row(layer + "intermediate.dense", block + "mlp/up", LINEAR),
        Row(layer + "output.dense", block + "mlp/down", LINEAR),
        Row(prefix + "layernorm", "final_norm", NORM),
    )


FAMILIES.register("ViTModel")(
    Family(
        model_type="vit",
        model=ViT,
        from_hf=plain_from_hf,
        to_hf=plain_to_hf,
        rows=lambda config: (*rows(config, ""), Row("pooler.dense", "projection", LINEAR)),
        renames=((r"^vit\.", ""), *RENAMES),
        # What masked image modelling leaves behind.
        ignored=lambda config: (r"embeddings\.mask_token", r"decoder\..*"),
        aliases=("ViTForMaskedImageModeling",),
    )
)

FAMILIES.register("ViTForImageClassification")(
    Family(
        model_type="vit",
        model=ViT,
        from_hf=lambda source: from_hf(source.config, num_classes=source.config.num_labels),
        to_hf=lambda config: to_hf(config, num_labels=config.num_classes),
        rows=lambda config: (*rows(config, "vit."), Row("classifier", "head", LINEAR)),
        renames=RENAMES,
        # A pooler that the head does not use, in checkpoints made from a plain model.
        ignored=lambda config: (r"vit\.pooler\..*",),
    )
)
