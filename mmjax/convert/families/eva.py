"""EVA-CLIP's image tower, in the form in which transformers has it: that of BLIP-2.

(EVA-CLIP itself is published for other libraries; transformers has no class for it.)
"""

from __future__ import annotations

from typing import Any

from mmjax.convert.families._towers import (
    block_fields,
    block_options,
    image_fields,
    image_options,
)
from mmjax.convert.family import FAMILIES, Family
from mmjax.convert.kinds import LINEAR, NORM, array, fused, patch
from mmjax.convert.table import Row
from mmjax.models import ViT, ViTConfig

CHANNELS = 3  # which their config does not say


def from_hf(hf: Any) -> ViTConfig:
    """`Blip2VisionConfig` -> our ViT.

    Its `pooled` is the class token after the final norm, as in EVA-CLIP. transformers returns one
    that has been through that norm twice, which BLIP-2 does not use.
    """
    return ViTConfig(
        **block_fields(hf),
        **image_fields(hf, channels=CHANNELS),
        mlp_width=hf.intermediate_size,
        qkv_bias=hf.qkv_bias,
        pooling="cls",
    )


def options(config: ViTConfig) -> dict[str, Any]:
    """The inverse of `from_hf`."""
    size = image_options(config)
    if size.pop("num_channels") != CHANNELS:
        raise ValueError(f"channels={config.channels}: the format has {CHANNELS}.")
    return {
        **block_options(config),
        **size,
        "intermediate_size": config.mlp_width,
        "qkv_bias": config.qkv_bias,
    }


def rows(config: ViTConfig) -> tuple[Row, ...]:
    table = array((1, -1, config.width), (-1, config.width))
    layer, block = "encoder.layers.*.", "encoder/layers/"
    parts = tuple(f"{block}attention/{part}" for part in ("query", "key", "value"))
    projection = patch(config.patch_size, config.channels)
    return (
        Row("embeddings.class_embedding", "class_token", table),
        Row("embeddings.position_embedding", "position/embedding", table),
        Row("embeddings.patch_embedding", "patch/projection", projection),
        Row(layer + "layer_norm1", block + "attention_norm", NORM),
        Row(layer + "self_attn.qkv", parts, fused(1, 1, 1)),
        Row(layer + "self_attn.projection", block + "attention/out", LINEAR),
        Row(layer + "layer_norm2", block + "mlp_norm", NORM),
        Row(layer + "mlp.fc1", block + "mlp/up", LINEAR),
        Row(layer + "mlp.fc2", block + "mlp/down", LINEAR),
        Row("post_layernorm", "final_norm", NORM),
    )


def register(prefix: str, model_type: str) -> None:
    """`prefix`: of the class, "Blip2"; `model_type`: of the tower."""

    def to_hf(config: ViTConfig) -> Any:
        import transformers

        return getattr(transformers, f"{prefix}VisionConfig")(**options(config))

    FAMILIES.register(f"{prefix}VisionModel")(
        Family(
            model_type=model_type,
            model=ViT,
            from_hf=lambda source: from_hf(source.config),
            to_hf=to_hf,
            rows=rows,
            renames=((r"^vision_model\.", ""),),
        )
    )


register("Blip2", "blip_2_vision_model")
register("InstructBlip", "instructblip_vision_model")
