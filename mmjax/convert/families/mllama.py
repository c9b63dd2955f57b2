"""Mllama (Llama 3.2 Vision): a ViT for tiles, and Llama with gated blocks among its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from mmjax.connectors import LinearConfig
from mmjax.convert.activations import NAMES, activation
from mmjax.convert.families import _decoder
from mmjax.convert.families._towers import square
from mmjax.convert.families._vlm import expect_connector
from mmjax.convert.family import FAMILIES, Family, Source
from mmjax.convert.kinds import ARRAY, EMBEDDING, LINEAR, NORM, array, mixed, patch, table
from mmjax.convert.table import Row
from mmjax.models import LMConfig, Mllama, MllamaConfig, TiledViTConfig

# Rows of the token table that the head has not.
NEW_TOKENS = 8
VISION, TEXT = "vision_model.", "language_model."
# transformers writes the names it had before its version 4.52, but reads and keeps others.
RENAMES = (
    (r"^model\.(vision_model|multi_modal_projector|language_model)\.", r"\1."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^language_model\.(?!model\.|lm_head\.)", "language_model.model."),
)
# And back: where its modules are.
MODULE_NAMES = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^(vision_model|multi_modal_projector)\.", r"model.\1."),
)
GATE = array((1,), ())


def vision_from_hf(hf: Any) -> TiledViTConfig:
    """`MllamaVisionConfig` -> our config, without `intermediate_layers_indices`.

    Raises:
      ValueError: if images are not square, or the output has another width than its parts.
    """
    width = hf.hidden_size * (1 + len(hf.intermediate_layers_indices))
    if hf.vision_output_dim != width:
        raise ValueError(
            f"vision_output_dim={hf.vision_output_dim}, but {hf.hidden_size} numbers of each of "
            f"intermediate_layers_indices={hf.intermediate_layers_indices} and of the last layer "
            f"are {width}."
        )
    return TiledViTConfig(
        image_size=square(hf.image_size, "image_size"),
        patch_size=square(hf.patch_size, "patch_size"),
        width=hf.hidden_size,
        depth=hf.num_hidden_layers,
        global_depth=hf.num_global_layers,
        heads=hf.attention_heads,
        mlp_width=hf.intermediate_size,
        activation=activation(hf.hidden_act, "hidden_act"),
        norm_eps=hf.norm_eps,
        tiles=hf.max_num_tiles,
        shapes=tuple(map(tuple, hf.supported_aspect_ratios)),
        channels=hf.num_channels,
    )


def text_from_hf(hf: Any, looks: Sequence[int]) -> LMConfig:
    """`MllamaTextConfig` -> our config of what is left without the gated blocks.

    Raises:
      ValueError: as `_decoder.fields`; if heads are not as wide as the model reads them.
    """
    lm = LMConfig(**_decoder.fields(hf), **_decoder.rope_fields(hf))
    if lm.head_width * lm.heads != lm.width:
        raise ValueError(
            f"head_dim={lm.head_width} with {lm.heads} heads does not make hidden_size={lm.width}."
        )
    # A token table of more rows than the head has cannot be the head.
    return dataclasses.replace(lm, depth=lm.depth - len(looks), tied=False)


def from_hf(source: Source) -> MllamaConfig:
    hf = source.config
    vision, text = hf.vision_config, hf.text_config
    looks = [layer for layer in text.cross_attention_layers if layer < text.num_hidden_layers]
    return MllamaConfig(
        encoder=vision_from_hf(vision),
        connector=LinearConfig(),
        lm=text_from_hf(text, looks),
        image_token=hf.image_token_index,
        features=tuple(vision.intermediate_layers_indices),
        looks=tuple(looks),
        new_tokens=NEW_TOKENS,
        early="all",
    )


def to_hf(config: MllamaConfig) -> Any:
    from transformers import MllamaConfig as Whole
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

    expect_connector(config.connector, LinearConfig)
    encoder, lm = config.encoder, config.lm
    vision = MllamaVisionConfig(
        image_size=encoder.image_size,
        patch_size=encoder.patch_size,
        hidden_size=encoder.width,
        num_hidden_layers=encoder.depth,
        num_global_layers=encoder.global_depth,
        attention_heads=encoder.heads,
        intermediate_size=encoder.mlp_width,
        hidden_act=NAMES[encoder.activation],
        norm_eps=encoder.norm_eps,
        max_num_tiles=encoder.tiles,
        supported_aspect_ratios=[list(shape) for shape in encoder.shapes],
        num_channels=encoder.channels,
        intermediate_layers_indices=list(config.features),
        vision_output_dim=config.feature_width,
    )
    text = _decoder.options(lm) | _decoder.rope_options(lm)
    text["num_hidden_layers"] += len(config.looks)
    # They have types that exclude None.
    text = {name: value for name, value in text.items() if name not in _decoder.NO_TOKENS}
    text |= {"pad_token_id": None, "eos_token_id": None, "bos_token_id": 0}
    text["cross_attention_layers"] = list(config.looks)
    return Whole(
        vision_config=vision,
        text_config=MllamaTextConfig(**text),
        image_token_index=config.image_token,
        tie_word_embeddings=False,
    )


def block_rows(theirs: str, ours: str) -> tuple[Row, ...]:
    """Of one of the encoder's transformers; only the second has gates."""
    theirs, ours = VISION + theirs + ".layers.*.", f"encoder/{ours}/layers/"
    return (
        Row(theirs + "input_layernorm", ours + "attention_norm", NORM),
        Row(theirs + "self_attn.q_proj", ours + "attention/query", LINEAR),
        Row(theirs + "self_attn.k_proj", ours + "attention/key", LINEAR),
        Row(theirs + "self_attn.v_proj", ours + "attention/value", LINEAR),
        Row(theirs + "self_attn.o_proj", ours + "attention/out", LINEAR),
        Row(theirs + "gate_attn", ours + "attention_gate", GATE),
        Row(theirs + "post_attention_layernorm", ours + "mlp_norm", NORM),
        Row(theirs + "mlp.fc1", ours + "mlp/up", LINEAR),
        Row(theirs + "mlp.fc2", ours + "mlp/down", LINEAR),
        Row(theirs + "gate_ffn", ours + "mlp_gate", GATE),
    )


def vision_rows(config: TiledViTConfig) -> tuple[Row, ...]:
    position = VISION + "gated_positional_embedding."
    before, after = (
        VISION + "pre_tile_positional_embedding.",
        VISION + "post_tile_positional_embedding.",
    )
    pixels = patch(config.patch_size, config.channels)
    return (
        Row(VISION + "class_embedding", "encoder/class_token", array((-1,), (1, -1))),
        Row(VISION + "patch_embedding", "encoder/patch/projection", pixels),
        Row(position + "embedding", "encoder/position", ARRAY),
        Row(position + "gate", "encoder/position_gate", GATE),
        Row(position + "tile_embedding", "encoder/tile_position", EMBEDDING),
        Row(before + "embedding", "encoder/pre_tile", EMBEDDING),
        Row(before + "gate", "encoder/pre_tile_gate", GATE),
        Row(after + "embedding", "encoder/post_tile", EMBEDDING),
        Row(after + "gate", "encoder/post_tile_gate", GATE),
        Row(VISION + "layernorm_pre", "encoder/pre_norm", NORM),
        Row(VISION + "layernorm_post", "encoder/post_norm", NORM),
        *block_rows("transformer", "encoder"),
        *block_rows("global_transformer", "global_encoder"),
    )


def gated_rows(looks: tuple[int, ...]) -> tuple[Row, ...]:
    theirs, ours = TEXT + "model.layers.*.", "gated/layers/"
    rows = (
        Row(theirs + "input_layernorm", ours + "attention_norm", NORM),
        Row(theirs + "cross_attn.q_proj", ours + "attention/query", LINEAR),
        Row(theirs + "cross_attn.k_proj", ours + "attention/key", LINEAR),
        Row(theirs + "cross_attn.v_proj", ours + "attention/value", LINEAR),
        Row(theirs + "cross_attn.o_proj", ours + "attention/out", LINEAR),
        Row(theirs + "cross_attn.q_norm", ours + "attention/query_norm", NORM),
        Row(theirs + "cross_attn.k_norm", ours + "attention/key_norm", NORM),
        Row(theirs + "cross_attn_attn_gate", ours + "attention_gate", GATE),
        Row(theirs + "post_attention_layernorm", ours + "mlp_norm", NORM),
        Row(theirs + "mlp.gate_proj", ours + "mlp/gate", LINEAR),
        Row(theirs + "mlp.up_proj", ours + "mlp/up", LINEAR),
        Row(theirs + "mlp.down_proj", ours + "mlp/down", LINEAR),
        Row(theirs + "cross_attn_mlp_gate", ours + "mlp_gate", GATE),
    )
    return tuple(row._replace(layers=looks) for row in rows)


def rows(config: MllamaConfig) -> Sequence[Row]:
    depth = config.lm.depth + len(config.looks)
    own = tuple(layer for layer in range(depth) if layer not in config.looks)
    language = (
        row._replace(theirs=TEXT + row.theirs, ours=f"lm/{row.ours}", layers=own)
        for row in _decoder.rows(_decoder.PRE_NORMS)
        if row.ours != "token"
    )
    words = ("lm/token", "new_token")
    return (
        *vision_rows(config.encoder),
        Row("multi_modal_projector", "connector/projection", mixed(config.encoder.width)),
        Row(TEXT + "model.embed_tokens", words, table(config.lm.vocab_size)),
        *language,
        *gated_rows(config.looks),
    )


FAMILIES.register("MllamaForConditionalGeneration")(
    Family(
        model_type="mllama",
        model=Mllama,
        from_hf=from_hf,
        to_hf=to_hf,
        rows=rows,
        renames=RENAMES,
        module_names=MODULE_NAMES,
        ignored=lambda config: (r".*rotary_emb\.inv_freq",),
    )
)
