"""SigLIP 2 NaFlex, whose images have any shape. Those of a fixed resolution are in `siglip`."""

from __future__ import annotations

from typing import Any

from mmjax.convert.families._towers import block_fields, block_options, block_rows, square
from mmjax.convert.families.siglip import head_fields, head_options, pool_rows, register
from mmjax.convert.kinds import LINEAR, NORM, SAME, Leaf
from mmjax.convert.table import Row
from mmjax.models import NaFlexConfig, NaFlexSigLIP, NaFlexSigLIPConfig, NaFlexViT

# An embedding whose table is the parameter itself here.
TABLE = (Leaf(".weight", "", SAME),)


def vision_from_hf(hf: Any, **fields: Any) -> NaFlexConfig:
    """`Siglip2VisionConfig` -> our image tower; `fields` come on top."""
    return NaFlexConfig(
        **block_fields(hf),
        **head_fields(hf),
        mlp_width=hf.intermediate_size,
        patch_size=square(hf.patch_size, "patch_size"),
        channels=hf.num_channels,
        num_patches=hf.num_patches,
        **fields,
    )


def vision_to_hf(config: NaFlexConfig) -> dict[str, Any]:
    """Fields of a `Siglip2VisionConfig`."""
    return {
        **block_options(config),
        **head_options(config),
        "intermediate_size": config.mlp_width,
        "patch_size": config.patch_size,
        "num_channels": config.channels,
        "num_patches": config.num_patches,
    }


def vision_rows(config: NaFlexConfig, theirs: str, ours: str) -> tuple[Row, ...]:
    """The image tower; prefixes as in `block_rows`."""
    return (
        Row(theirs + "embeddings.patch_embedding", ours + "patch", LINEAR),
        Row(theirs + "embeddings.position_embedding", ours + "position", TABLE),
        *block_rows(theirs, ours),
        Row(theirs + "post_layernorm", ours + "final_norm", NORM),
        *pool_rows(theirs, ours),
    )


register(
    "Siglip2",
    "siglip2",
    (NaFlexSigLIPConfig, NaFlexSigLIP),
    NaFlexViT,
    vision_from_hf,
    vision_to_hf,
    vision_rows,
    {},
)
