"""DINOv2, with and without registers, plain and with a classification head."""

from __future__ import annotations

from typing import Any

from mmjax.convert.families._towers import (
    block_fields,
    block_options,
    image_fields,
    image_options,
)
from mmjax.convert.family import FAMILIES, Family, Source
from mmjax.convert.kinds import ARRAY, LINEAR, NORM, array, fused, patch
from mmjax.convert.table import Row
from mmjax.models import ViT, ViTConfig

# Names within transformers 5 -> those it writes to files. (It keeps the two halves of the gated
# MLP's `weights_in` apart within; files have them in one.)
RENAMES = (
    (r"layer\.(\d+)\.attention\.o_proj\.", r"layer.\1.attention.output.dense."),
    (r"layer\.(\d+)\.attention\.q_proj\.", r"layer.\1.attention.attention.query."),
    (r"layer\.(\d+)\.attention\.k_proj\.", r"layer.\1.attention.attention.key."),
    (r"layer\.(\d+)\.attention\.v_proj\.", r"layer.\1.attention.attention.value."),
    (r"layer\.(\d+)\.mlp\.down_proj\.", r"layer.\1.mlp.weights_out."),
)
GATE_AND_UP = fused(1, 1)


def mlp_width(width: int, ratio: float, gated: bool) -> int:
    """Width of the MLP; a gated one has about two thirds of it, a multiple of 8."""
    hidden = int(width * ratio)
    return (int(hidden * 2 / 3) + 7) // 8 * 8 if gated else hidden


def mlp_ratio(width: int, hidden: int, gated: bool) -> int:
    """The inverse of `mlp_width`.

    Raises:
      ValueError: if there is none: the format knows whole numbers only.
    """
    for ratio in range(1, 65):
        if mlp_width(width, ratio, gated) == hidden:
            return ratio
    raise ValueError(f"mlp_width={hidden} is none that a whole mlp_ratio gives for width={width}.")


def from_hf(hf: Any, **fields: Any) -> ViTConfig:
    """`Dinov2Config` or `Dinov2WithRegistersConfig` -> ours; `fields` come on top."""
    gated = hf.use_swiglu_ffn
    common = block_fields(hf)
    if gated:
        common["activation"] = "silu"  # whatever hidden_act says
    return ViTConfig(
        **common,
        **image_fields(hf),
        mlp_width=mlp_width(hf.hidden_size, hf.mlp_ratio, gated),
        gated=gated,
        pooling="cls",
        qkv_bias=hf.qkv_bias,
        layer_scale=True,
        **fields,
    )


def to_hf(config: ViTConfig) -> dict[str, Any]:
    """The fields that both configs of transformers have."""
    return {
        **block_options(config),
        **image_options(config),
        "mlp_ratio": mlp_ratio(config.width, config.mlp_width, config.gated),
        "use_swiglu_ffn": config.gated,
        "qkv_bias": config.qkv_bias,
    }


def bare_from_hf(hf: Any, **fields: Any) -> ViTConfig:
    return from_hf(hf, mask_token=hf.use_mask_token, **fields)


def bare_to_hf(config: ViTConfig, **options: Any) -> Any:
    import transformers

    return transformers.Dinov2Config(**to_hf(config), use_mask_token=config.mask_token, **options)


def registers_from_hf(hf: Any, **fields: Any) -> ViTConfig:
    return from_hf(
        hf,
        mask_token=True,
        registers=hf.num_register_tokens,
        interpolation="bicubic_antialias",
        **fields,
    )


def registers_to_hf(config: ViTConfig, **options: Any) -> Any:
    import transformers

    return transformers.Dinov2WithRegistersConfig(
        **to_hf(config), num_register_tokens=config.registers, **options
    )


def rows(config: ViTConfig, prefix: str) -> tuple[Row, ...]:
    """All but heads; `prefix` is "dinov2." or ""."""
    table = array((1, -1, config.width), (-1, config.width))
    layer, block = prefix + "encoder.layer.*.", "encoder/layers/"
    projection = patch(config.patch_size, config.channels)
    mlp = (
        (
            Row(layer + "mlp.weights_in", (block + "mlp/gate", block + "mlp/up"), GATE_AND_UP),
            Row(layer + "mlp.weights_out", block + "mlp/down", LINEAR),
        )
        if config.gated
        else (
            Row(layer + "mlp.fc1", block + "mlp/up", LINEAR),
            Row(layer + "mlp.fc2", block + "mlp/down", LINEAR),
        )
    )
    return (
        Row(prefix + "embeddings.cls_token", "class_token", table),
        Row(prefix + "embeddings.mask_token", "mask_token", ARRAY),
        Row(prefix + "embeddings.register_tokens", "registers", table),
        Row(prefix + "embeddings.position_embeddings", "position/embedding", table),
        Row(prefix + "embeddings.patch_embeddings.projection", "patch/projection", projection),
        Row(layer + "norm1", block + "attention_norm", NORM),
        Row(layer + "attention.attention.query", block + "attention/query", LINEAR),
        Row(layer + "attention.attention.key", block + "attention/key", LINEAR),
        Row(layer + "attention.attention.value", block + "attention/value", LINEAR),
        Row(layer + "attention.output.dense", block + "attention/out", LINEAR),
        Row(layer + "layer_scale1.lambda1", block + "attention_scale", ARRAY),
        Row(layer + "norm2", block + "mlp_norm", NORM),
        *mlp,
        Row(layer + "layer_scale2.lambda1", block + "mlp_scale", ARRAY),
        Row(prefix + "layernorm", "final_norm", NORM),
    )


def register(name: str, model_type: str, from_hf: Any, to_hf: Any) -> None:
    """The plain class and the classifier.

    Args:
      name: what the classes' names begin with, "Dinov2".
      model_type: of both; also the prefix of the classifier's tensors.
    """

    def classifier_from_hf(source: Source) -> ViTConfig:
        return from_hf(
            source.config, num_classes=source.config.num_labels, head_input="cls_and_patches"
        )

    FAMILIES.register(f"{name}Model")(
        Family(
            model_type=model_type,
            model=ViT,
            from_hf=lambda source: from_hf(source.config),
            to_hf=to_hf,
            rows=lambda config: rows(config, ""),
            renames=RENAMES,
            aliases=(f"{name}Backbone",),
        )
    )
    FAMILIES.register(f"{name}ForImageClassification")(
        Family(
            model_type=model_type,
            model=ViT,
            from_hf=classifier_from_hf,
            to_hf=lambda config: to_hf(config, num_labels=config.num_classes),
            rows=lambda config: (
                *rows(config, f"{model_type}."),
                Row("classifier", "head", LINEAR),
            ),
            renames=RENAMES,
        )
    )


register("Dinov2", "dinov2", bare_from_hf, bare_to_hf)
register("Dinov2WithRegisters", "dinov2_with_registers", registers_from_hf, registers_to_hf)
