"""What the families with CLIP's layout of modules have in common, towers alone or in pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmjax.convert.activations import NAMES, activation
from mmjax.convert.kinds import EMBEDDING, LINEAR, NORM
from mmjax.convert.table import Row
from mmjax.models.projection import ProjectionConfig

# Buffers that older versions saved.
POSITION_IDS = r"(.*\.)?position_ids"


def square(value: int | Sequence[int], name: str) -> int:
    """One number of what may stand in a config as a pair.

    Raises:
      ValueError: if height and width differ.
    """
    if isinstance(value, int):
        return value
    height, width = value
    if height != width:
        raise ValueError(f"{name}={tuple(value)}: only equal height and width are supported.")
    return height


def block_fields(hf: Any) -> dict[str, Any]:
    """What the configs of all towers say alike: hidden_size and so on."""
    return {
        "width": hf.hidden_size,
        "depth": hf.num_hidden_layers,
        "heads": hf.num_attention_heads,
        "activation": activation(hf.hidden_act, "hidden_act"),
        "norm_eps": hf.layer_norm_eps,
    }


def block_options(config: Any) -> dict[str, Any]:
    """The inverse of `block_fields`."""
    return {
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "hidden_act": NAMES[config.activation],
        "layer_norm_eps": config.norm_eps,
    }


def image_fields(hf: Any, channels: int | None = None) -> dict[str, Any]:
    """Size, patches and channels (if the config does not say them) of a ViT; square images only."""
    size, patch = square(hf.image_size, "image_size"), square(hf.patch_size, "patch_size")
    return {
        "image_size": size,
        "patch_size": patch,
        "channels": hf.num_channels if channels is None else channels,
        # Their convolutions leave out pixels that fill no patch; ours do where they have to.
        "partial_patches": "crop" if size % patch else "error",
        "position": "learned",
    }


def image_options(config: Any) -> dict[str, Any]:
    """The inverse of `image_fields`.

    Raises:
      ValueError: if images are not square.
    """
    return {
        "image_size": square(config.image_size, "image_size"),
        "patch_size": config.patch_size,
        "num_channels": config.channels,
    }


def text_fields(hf: Any) -> dict[str, Any]:
    return {
        **block_fields(hf),
        "mlp_width": hf.intermediate_size,
        "vocab_size": hf.vocab_size,
        "max_len": hf.max_position_embeddings,
    }


def text_options(config: Any) -> dict[str, Any]:
    """The inverse of `text_fields`."""
    return {
        **block_options(config),
        "intermediate_size": config.mlp_width,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_len,
    }


def projection_width(config: Any, what: ProjectionConfig) -> int:
    """The width of a tower's projection, if that is one like `what`.

    Raises:
      ValueError: if there is none, or of another kind.
    """
    found = config.projection
    if found is None or (found.activation, found.bias) != (what.activation, what.bias):
        raise ValueError(f"projection={found}, where the format has one like {what}.")
    return found.width


def block_rows(theirs: str, ours: str) -> tuple[Row, ...]:
    """The blocks of CLIP, SigLIP and AltCLIP's image tower.

    Args:
      theirs: prefix of a tower, "vision_model." or "".
      ours: prefix of its counterpart, "image/" or "".
    """
    layer, block = f"{theirs}encoder.layers.*.", f"{ours}encoder/layers/"
    return (
        Row(layer + "layer_norm1", block + "attention_norm", NORM),
        Row(layer + "self_attn.q_proj", block + "attention/query", LINEAR),
        Row(layer + "self_attn.k_proj", block + "attention/key", LINEAR),
        Row(layer + "self_attn.v_proj", block + "attention/value", LINEAR),
        Row(layer + "self_attn.out_proj", block + "attention/out", LINEAR),
        Row(layer + "layer_norm2", block + "mlp_norm", NORM),
        Row(layer + "mlp.fc1", block + "mlp/up", LINEAR),
        Row(layer + "mlp.fc2", block + "mlp/down", LINEAR),
    )


def text_rows(theirs: str, ours: str) -> tuple[Row, ...]:
    """The text tower of CLIP and SigLIP; prefixes as in `block_rows`."""
    return (
        Row(theirs + "embeddings.token_embedding", ours + "token", EMBEDDING),
        Row(theirs + "embeddings.position_embedding", ours + "position", EMBEDDING),
        *block_rows(theirs, ours),
        Row(theirs + "final_layer_norm", ours + "final_norm", NORM),
    )
