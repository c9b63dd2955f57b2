"""Idefics3 and SmolVLM: SigLIP's image tower, pixel shuffling, any language model (Llama's)."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmjax.connectors import PixelShuffleConfig
from mmjax.convert.families._towers import (
    POSITION_IDS,
    block_fields,
    block_options,
    image_fields,
    image_options,
)
from mmjax.convert.families._vlm import expect_connector, language_model, tower
from mmjax.convert.families.siglip import vision_rows
from mmjax.convert.family import FAMILIES, Family, Source
from mmjax.convert.kinds import LINEAR
from mmjax.convert.table import Row
from mmjax.models import VLM, ViT, ViTConfig, VLMConfig

ENCODER = tower("model.vision_model.", ("idefics3_vision", "smolvlm_vision"))
TEXT = language_model("", "model.text_model.")


def regular_positions(side: int) -> bool:
    """Whether patch n of a row of `side` has position n, wherever transformers runs.

    The towers compare the patch's share of the image, n / side, with bounds that are multiples of
    1 / side, all in float32: for some sides (19, 25, 29, ...; none of a published checkpoint) that
    puts two patches in one place. PyTorch computes multiples in vectors of 4, 8 or 16 numbers by
    CPU, the last ones singly; rounding differs with it.
    """
    step = 1 / side
    shares = np.arange(side, dtype=np.float32) * np.float32(step)
    shares = np.minimum(shares, np.float32(1 - 1e-6))
    index = np.arange(math.ceil((1 - step) / step))
    single = (step + step * index).astype(np.float32)
    for lanes in (4, 8, 16):
        vector = single[index // lanes * lanes] + step * (index % lanes)
        whole = len(index) // (2 * lanes) * (2 * lanes)
        bounds = np.where(index < whole, vector.astype(np.float32), single)
        if not np.array_equal(np.searchsorted(bounds, shares, side="right"), np.arange(side)):
            return False
    return True


def vision_from_hf(hf: Any) -> ViTConfig:
    """`Idefics3VisionConfig` or `SmolVLMVisionConfig` -> our ViT.

    Raises:
      ValueError: if patches are not where ours are.
    """
    config = ViTConfig(
        **block_fields(hf), **image_fields(hf), mlp_width=hf.intermediate_size, pooling="none"
    )
    side = config.grid[0]
    if not regular_positions(side):
        raise ValueError(
            f"image_size={hf.image_size} with patch_size={hf.patch_size} makes {side} patches a "
            "side, of which transformers may put two in one place by rounding: not supported."
        )
    return config


def vision_options(config: ViTConfig) -> dict[str, Any]:
    """The inverse of `vision_from_hf`."""
    return {
        **block_options(config),
        **image_options(config),
        "intermediate_size": config.mlp_width,
    }


def from_hf(source: Source) -> VLMConfig:
    hf = source.config
    vision = copy.copy(hf.vision_config)
    # In the first checkpoints it stands as that of the whole.
    vision.model_type = type(vision).model_type
    return VLMConfig(
        encoder=ENCODER.from_hf(source, vision),
        connector=PixelShuffleConfig(hf.scale_factor),
        # The whole has the head, so that it says whether there is one.
        lm=dataclasses.replace(TEXT.from_hf(source), tied=hf.tie_word_embeddings),
        image_token=hf.image_token_id,
        features=(-1,),
        features_norm=True,
    )


def options(config: VLMConfig) -> dict[str, Any]:
    """The inverse of `from_hf`, but for the tower's."""
    expect_connector(config.connector, PixelShuffleConfig)
    return {
        "text_config": TEXT.to_hf(config.lm),
        "tie_word_embeddings": config.lm.tied,
        "image_token_id": config.image_token,
        "scale_factor": config.connector.factor,
    }


def rows(config: VLMConfig) -> Sequence[Row]:
    return (
        *ENCODER.rows(config.encoder),
        Row("model.connector.modality_projection.proj", "connector/projection/projection", LINEAR),
        *TEXT.rows(config.lm),
    )


def ignored(config: VLMConfig) -> Sequence[str]:
    return (*ENCODER.ignored(config.encoder), *TEXT.ignored(config.lm))


def register(prefix: str, model_type: str) -> None:
    """Tower and whole; `prefix`: of the classes, "Idefics3"; `model_type`: of the whole."""

    def hf_config(part: str, **options: Any) -> Any:
        import transformers

        return getattr(transformers, f"{prefix}{part}Config")(**options)

    def vision_to_hf(config: ViTConfig) -> Any:
        return hf_config("Vision", **vision_options(config))

    def to_hf(config: VLMConfig) -> Any:
        vision = vision_to_hf(config.encoder)
        return hf_config("", vision_config=vision, **options(config))

    FAMILIES.register(f"{prefix}VisionTransformer")(
        Family(
            model_type=f"{model_type}_vision",
            model=ViT,
            from_hf=lambda source: vision_from_hf(source.config),
            to_hf=vision_to_hf,
            rows=lambda config: vision_rows(config, "", ""),
            ignored=lambda config: (POSITION_IDS,),
        )
    )
    FAMILIES.register(f"{prefix}ForConditionalGeneration")(
        Family(
            model_type=model_type,
            model=VLM,
            from_hf=from_hf,
            to_hf=to_hf,
            rows=rows,
            ignored=ignored,
        )
    )


register("Idefics3", "idefics3")
register("SmolVLM", "smolvlm")
