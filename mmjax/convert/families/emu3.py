"""Emu3: its image tokenizer, its language model, and both over one vocabulary."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from mmjax.convert.families import _decoder, llama
from mmjax.convert.families._codes import check_marks, code_ids, id_of
from mmjax.convert.families._vlm import Part
from mmjax.convert.family import FAMILIES, Family, Source
from mmjax.convert.kinds import BATCH_NORM, CONV, CONV3D, EMBEDDING, LINEAR, NORM, POINTWISE
from mmjax.convert.table import Row
from mmjax.models import LM, Emu3VQ, Emu3VQConfig, LMConfig, Unified, UnifiedConfig
from mmjax.models.unified import CodesConfig
from mmjax.quantizers import CodebookConfig

TOKENIZER = Part("vq_config", Emu3VQ, "tokenizer/", "vqmodel.", types=("emu3_vqgan",))
TEXT = Part("text_config", LM, "lm/", "text_model.", types=("emu3_text_model",))
# transformers writes the names it had before its version 4.52, but reads and keeps others.
RENAMES = (
    (r"^model\.(text_model|vqmodel)\.", r"\1."),
    (r"^lm_head\.", "text_model.lm_head."),
    (r"^text_model\.(?!model\.|lm_head\.)", "text_model.model."),
)
# And back: where its modules are.
MODULE_NAMES = (
    (r"^text_model\.lm_head\.", "lm_head."),
    (r"^text_model\.model\.", "model.text_model."),
    (r"^vqmodel\.", "model.vqmodel."),
)
# Tokens by name: what holds the places of an image, what stands before its codes, after a row of
# them, and after all.
IMAGE, BEGIN, ROW, END = "<image>", "<|image token|>", "<|extra_200|>", "<|extra_201|>"
CODE = r"<\|visual token (\d{6})\|>"
# What transformers has no entry for, and keeps: pixels along the side of images that are generated.
IMAGE_SIZE = "image_size"

Rows = tuple[Row, ...]
# theirs, ours -> the rows of a norm.
Norm = Callable[[str, str], Rows]


def tokenizer_from_hf(source: Source) -> Emu3VQConfig:
    """`Emu3VQVAEConfig` -> our config.

    Raises:
      ValueError: if the encoder ends in means and variances, images come out with other channels
        than they go in, or attention has another width than the grid that it is over.
    """
    hf = source.config
    if hf.double_latent:
        raise ValueError("double_latent=True: only encoders that end in vectors are supported.")
    if hf.out_channels != hf.in_channels:
        raise ValueError(
            f"out_channels={hf.out_channels} and in_channels={hf.in_channels}: images that come "
            "out must be like those that go in."
        )
    config = Emu3VQConfig(
        image_size=hf.to_dict().get(IMAGE_SIZE, Emu3VQConfig.image_size),
        quantizer=CodebookConfig(size=hf.codebook_size, width=hf.embed_dim),
        width=hf.base_channels,
        multipliers=tuple(hf.channel_multiplier),
        depth=hf.num_res_blocks,
        latent=hf.latent_channels,
        attends=tuple(hf.attn_resolutions),
        channels=hf.in_channels,
        heads=hf.num_attention_heads,
        frames=hf.temporal_downsample_factor,
    )
    widths = {config.widths[level] for level in (*config.attends, -1)}
    if widths != {hf.hidden_size}:
        raise ValueError(
            f"hidden_size={hf.hidden_size}, the width of attention, but there is attention over "
            f"grids of {sorted(widths)} channels."
        )
    return config


def tokenizer_to_hf(config: Emu3VQConfig) -> Any:
    """The inverse of `tokenizer_from_hf`.

    Raises:
      ValueError: if codes are made in another way.
    """
    from transformers import Emu3VQVAEConfig

    if not isinstance(config.quantizer, CodebookConfig):
        raise ValueError(f"quantizer={config.quantizer.name!r}: the format has a codebook.")
    return Emu3VQVAEConfig(
        codebook_size=config.quantizer.size,
        embed_dim=config.quantizer.width,
        latent_channels=config.latent,
        in_channels=config.channels,
        out_channels=config.channels,
        temporal_downsample_factor=config.frames,
        base_channels=config.width,
        channel_multiplier=list(config.multipliers),
        num_res_blocks=config.depth,
        attn_resolutions=list(config.attends),
        hidden_size=config.widths[-1],
        num_attention_heads=config.heads,
        **{IMAGE_SIZE: config.image_size},
    )


def _group_norm(theirs: str, ours: str) -> Rows:
    return (Row(theirs, ours, NORM),)


def _spatial_norm(theirs: str, ours: str) -> Rows:
    return (
        Row(f"{theirs}.norm_layer", f"{ours}/norm", NORM),
        Row(f"{theirs}.conv_y", f"{ours}/scale", POINTWISE),
        Row(f"{theirs}.conv_b", f"{ours}/shift", POINTWISE),
    )


def _block(theirs: str, ours: str, norm: Norm) -> Rows:
    return (
        *norm(f"{theirs}.norm1", f"{ours}/first_norm"),
        Row(f"{theirs}.conv1", f"{ours}/first", CONV),
        *norm(f"{theirs}.norm2", f"{ours}/second_norm"),
        Row(f"{theirs}.conv2", f"{ours}/second", CONV),
        Row(f"{theirs}.nin_shortcut", f"{ours}/shortcut", POINTWISE),
    )


def _attention(theirs: str, their_norm: str, ours: str, norm: Norm) -> Rows:
    return (
        *norm(their_norm, f"{ours}/norm"),
        Row(f"{theirs}.q_proj", f"{ours}/query", LINEAR),
        Row(f"{theirs}.k_proj", f"{ours}/key", LINEAR),
        Row(f"{theirs}.v_proj", f"{ours}/value", LINEAR),
        Row(f"{theirs}.out_proj", f"{ours}/out", LINEAR),
    )


def _frame(theirs: str, sample: str, levels: Sequence[str], depth: int, norm: Norm) -> Rows:
    """What encoder or decoder does to each frame.

    Args:
      theirs: its prefix.
      sample: what they call that which follows a level.
      levels: their prefixes, in our order.
      depth: blocks of each level.
      norm: what norms are.
    """
    ours, middle = f"{theirs}/frame", f"{theirs}.middle_block"
    rows = [
        Row(f"{theirs}.conv_in", f"{ours}/first", CONV),
        *norm(f"{theirs}.norm_out", f"{ours}/norm"),
        Row(f"{theirs}.conv_out", f"{ours}/last", CONV),
        *_block(f"{middle}.block_1", f"{ours}/middle/first", norm),
        *_attention(f"{middle}.attn_1", f"{middle}.attn_norm", f"{ours}/middle/attention", norm),
        *_block(f"{middle}.block_2", f"{ours}/middle/second", norm),
    ]
    for number, level in enumerate(levels):
        mine = f"{ours}/levels/{number}"
        rows.append(Row(f"{theirs}.{level}.{sample}.conv", f"{mine}/sample", CONV))
        for block in range(depth):
            name = f"{theirs}.{level}"
            attention = f"{name}.attn.{block}", f"{name}.attn_norms.{block}"
            rows += _block(f"{name}.block.{block}", f"{mine}/blocks/{block}", norm)
            rows += _attention(*attention, f"{mine}/attentions/{block}", norm)
    return tuple(rows)


def _time(name: str, sample: str, config: Emu3VQConfig) -> Rows:
    """The convolutions over time of encoder or decoder; `sample`: of those that change its
    length."""
    rows = [
        Row(f"{name}.time_conv.{number}.conv.conv", f"{name}/{sample}/{number}", CONV3D)
        for number in range(config.halvings)
    ]
    for number in range(config.depth):
        theirs, ours = f"{name}.time_res_stack.{number}", f"{name}/blocks/{number}"
        rows += [
            Row(f"{theirs}.norm1", f"{ours}/first_norm", BATCH_NORM),
            Row(f"{theirs}.conv1.conv", f"{ours}/first", CONV3D),
            Row(f"{theirs}.norm2", f"{ours}/second_norm", BATCH_NORM),
            Row(f"{theirs}.conv2.conv", f"{ours}/second", CONV3D),
        ]
    return tuple(rows)


def tokenizer_rows(config: Emu3VQConfig) -> Rows:
    down = [f"down_block.down.{level}" for level in range(config.levels)]
    up = [f"up_block.up.{level}" for level in reversed(range(config.levels))]
    return (
        *_frame("encoder", "downsample", down, config.depth, _group_norm),
        *_time("encoder", "halve", config),
        Row("quant_conv.conv", "encoder/last", CONV3D),
        Row("quantize.embedding", "quantizer", EMBEDDING),
        Row("post_quant_conv.conv", "decoder/first", CONV3D),
        *_time("decoder", "double", config),
        *_frame("decoder", "upsample", up, config.depth + 1, _spatial_norm),
    )


FAMILIES.register("Emu3VQVAE")(
    Family("emu3_vqgan", Emu3VQ, tokenizer_from_hf, tokenizer_to_hf, tokenizer_rows)
)


def text_to_hf(config: LMConfig) -> Any:
    from transformers import Emu3TextConfig

    # Two of the special tokens have types that exclude None.
    tokens = {"bos_token_id": 0, "pad_token_id": 0}
    return Emu3TextConfig(
        **_decoder.options(config) | _decoder.rope_options(config) | tokens,
        attention_bias=config.out_bias,
        mlp_bias=config.mlp_bias,
    )


FAMILIES.register("Emu3ForCausalLM")(
    # What Llama computes; that family, which comes first, is what others are saved as.
    _decoder.family("Emu3Text", "emu3_text_model", llama.from_hf, text_to_hf)
)


def from_hf(source: Source) -> UnifiedConfig:
    """Raises ValueError if `vocabulary_map` lacks tokens."""
    hf, names = source.config, source.config.vocabulary_map
    tokenizer = TOKENIZER.from_hf(source)
    return UnifiedConfig(
        # The head is the whole's: that says whether it is the token table.
        lm=dataclasses.replace(TEXT.from_hf(source), tied=hf.tie_word_embeddings),
        image=CodesConfig(
            tokenizer=tokenizer,
            ids=code_ids(names, CODE, int, tokenizer.quantizer.size),
            begin=id_of(names, BEGIN),
            end=id_of(names, END),
            row=id_of(names, ROW),
        ),
        image_token=id_of(names, IMAGE),
        follow="any",
    )


def to_hf(config: UnifiedConfig) -> Any:
    """The inverse of `from_hf`; `vocabulary_map` has the names that it reads, and no others.

    Raises:
      ValueError: if images or their rows have no end; see `Part.to_hf` as well.
    """
    from transformers import Emu3Config

    image = config.image
    check_marks(image, "end", "row")
    names = {IMAGE: config.image_token, BEGIN: image.begin, ROW: image.row, END: image.end}
    for code, number in enumerate(image.all_ids.tolist()):
        names[f"<|visual token {code:06d}|>"] = number
    return Emu3Config(
        vq_config=TOKENIZER.to_hf(image.tokenizer),
        text_config=TEXT.to_hf(config.lm),
        vocabulary_map=names,
        tie_word_embeddings=config.lm.tied,
    )


def rows(config: UnifiedConfig) -> Sequence[Row]:
    return (*TOKENIZER.rows(config.image.tokenizer), *TEXT.rows(config.lm))


FAMILIES.register("Emu3ForConditionalGeneration")(
    Family(
        model_type="emu3",
        model=Unified,
        from_hf=from_hf,
        to_hf=to_hf,
        rows=rows,
        renames=RENAMES,
        module_names=MODULE_NAMES,
        ignored=lambda config: TEXT.ignored(config.lm),
    )
)
