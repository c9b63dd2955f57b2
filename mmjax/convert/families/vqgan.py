"""The image tokenizers of Chameleon and Janus, which are VQGANs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmjax.convert.family import FAMILIES, Family, Source
from mmjax.convert.kinds import CONV, EMBEDDING, NORM, POINTWISE
from mmjax.convert.table import Row
from mmjax.models import VQGAN, VQGANConfig
from mmjax.quantizers import CodebookConfig


def _fields(hf: Any, unit: bool) -> dict[str, Any]:
    """What both configs say alike.

    Raises:
      ValueError: if the encoder ends in means and variances.
    """
    if hf.double_latent:
        raise ValueError("double_latent=True: only encoders that end in vectors are supported.")
    return {
        "quantizer": CodebookConfig(
            size=hf.num_embeddings,
            width=hf.embed_dim,
            unit=unit,
            commitment=hf.to_dict().get("beta", 0.25),
        ),
        "width": hf.base_channels,
        "multipliers": tuple(hf.channel_multiplier),
        "depth": hf.num_res_blocks,
        "latent": hf.latent_channels,
        "channels": hf.in_channels,
    }


def _options(config: VQGANConfig) -> dict[str, Any]:
    """The inverse of `_fields`.

    Raises:
      ValueError: if codes are made in another way.
    """
    if not isinstance(config.quantizer, CodebookConfig):
        raise ValueError(f"quantizer={config.quantizer.name!r}: the format has a codebook.")
    return {
        "num_embeddings": config.quantizer.size,
        "embed_dim": config.quantizer.width,
        "beta": config.quantizer.commitment,
        "base_channels": config.width,
        "channel_multiplier": list(config.multipliers),
        "num_res_blocks": config.depth,
        "latent_channels": config.latent,
        "in_channels": config.channels,
    }


def _chameleon_from_hf(source: Source) -> VQGANConfig:
    hf = source.config
    attends: tuple[int, ...] = ()
    if hf.attn_type == "vanilla":
        attends = tuple(
            level
            for level in range(len(hf.channel_multiplier))
            if hf.resolution // 2**level in (hf.attn_resolutions or ())
        )
    return VQGANConfig(
        image_size=hf.resolution,
        attends=attends,
        middle_attends=hf.attn_type == "vanilla",
        decodes=False,
        **_fields(hf, unit=False),
    )


def _chameleon_to_hf(config: VQGANConfig) -> Any:
    from transformers import ChameleonVQVAEConfig

    return ChameleonVQVAEConfig(
        resolution=config.image_size,
        attn_resolutions=[config.image_size // 2**level for level in config.attends] or None,
        attn_type="vanilla" if config.middle_attends else "none",
        **_options(config),
    )


def _janus_from_hf(source: Source) -> VQGANConfig:
    hf = source.config
    if hf.out_channels != hf.in_channels:
        raise ValueError(
            f"out_channels={hf.out_channels} and in_channels={hf.in_channels}: images that come "
            "out must be like those that go in."
        )
    last = len(hf.channel_multiplier) - 1
    fields = _fields(hf, unit=True)
    return VQGANConfig(image_size=hf.num_patches * 2**last, attends=(last,), **fields)


def _janus_to_hf(config: VQGANConfig) -> Any:
    from transformers import JanusVQVAEConfig

    return JanusVQVAEConfig(
        num_patches=config.image_size // config.factor,
        out_channels=config.channels,
        **_options(config),
    )


def _block(theirs: str, ours: str) -> tuple[Row, ...]:
    return (
        Row(f"{theirs}.norm1", f"{ours}/first_norm", NORM),
        Row(f"{theirs}.conv1", f"{ours}/first", CONV),
        Row(f"{theirs}.norm2", f"{ours}/second_norm", NORM),
        Row(f"{theirs}.conv2", f"{ours}/second", CONV),
        Row(f"{theirs}.nin_shortcut", f"{ours}/shortcut", POINTWISE),
    )


def _attention(theirs: str, ours: str) -> tuple[Row, ...]:
    return (
        Row(f"{theirs}.norm", f"{ours}/norm", NORM),
        Row(f"{theirs}.q", f"{ours}/query", POINTWISE),
        Row(f"{theirs}.k", f"{ours}/key", POINTWISE),
        Row(f"{theirs}.v", f"{ours}/value", POINTWISE),
        Row(f"{theirs}.proj_out", f"{ours}/out", POINTWISE),
    )


def _side(name: str, levels: str, sample: str, count: int, depth: int) -> tuple[Row, ...]:
    """Encoder or decoder, of so many levels with so many blocks."""
    rows = [
        Row(f"{name}.conv_in", f"{name}/first", CONV),
        Row(f"{name}.norm_out", f"{name}/norm", NORM),
        Row(f"{name}.conv_out", f"{name}/last", CONV),
        *_block(f"{name}.mid.block_1", f"{name}/middle/first"),
        *_attention(f"{name}.mid.attn_1", f"{name}/middle/attention"),
        *_block(f"{name}.mid.block_2", f"{name}/middle/second"),
    ]
    for level in range(count):
        theirs, ours = f"{name}.{levels}.{level}", f"{name}/levels/{level}"
        rows.append(Row(f"{theirs}.{sample}.conv", f"{ours}/sample", CONV))
        for block in range(depth):
            rows += _block(f"{theirs}.block.{block}", f"{ours}/blocks/{block}")
            rows += _attention(f"{theirs}.attn.{block}", f"{ours}/attentions/{block}")
    return tuple(rows)


def _rows(config: VQGANConfig) -> Sequence[Row]:
    return (
        Row("quant_conv", "before", POINTWISE),
        Row("quantize.embedding", "quantizer", EMBEDDING),
        Row("post_quant_conv", "after", POINTWISE),
        *_side("encoder", "down", "downsample", config.levels, config.depth),
        *_side("decoder", "up", "upsample", config.levels, config.depth + 1),
    )


FAMILIES.register("ChameleonVQVAE")(
    Family("chameleon_vqgan", VQGAN, _chameleon_from_hf, _chameleon_to_hf, _rows)
)
FAMILIES.register("JanusVQVAE")(Family("janus_vqgan", VQGAN, _janus_from_hf, _janus_to_hf, _rows))
