"""LLaVA and LLaVA-1.5: any image tower with blocks, two linear maps, any language model.

LLaVA-NeXT, in `llava_next`, has the same parts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from mmjax.connectors import MLPConfig
from mmjax.convert.activations import NAMES, activation
from mmjax.convert.families._vlm import (
    expect_connector,
    feature_blocks,
    feature_layers,
    language_model,
    tower,
)
from mmjax.convert.family import FAMILIES, Family, Source
from mmjax.convert.kinds import ARRAY, LINEAR
from mmjax.convert.table import Row
from mmjax.models import VLM, VLMConfig

ENCODER, TEXT = tower("vision_tower."), language_model("language_model.")
# transformers writes the names it had before its version 4.52, but reads and keeps others.
RENAMES = (
    (r"^model\.(vision_tower|multi_modal_projector|language_model|image_newline)", r"\1"),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^language_model\.(?!model\.|lm_head\.)", "language_model.model."),
    (r"^vision_tower\.vision_model\.", "vision_tower."),
)
# And back: where its modules are.
MODULE_NAMES = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
)
KEPT, TAKEN = "full", "default"  # what is done with the class token


def from_hf(source: Source, **fields: Any) -> VLMConfig:
    """`LlavaConfig` or `LlavaNextConfig` -> our config; `fields` come on top.

    Raises:
      ValueError: if a class token is to be taken from features that have none.
    """
    hf = source.config
    encoder, lm = ENCODER.from_hf(source), TEXT.from_hf(source)
    kept = hf.vision_feature_select_strategy == KEPT
    if not kept and not encoder.prefix:
        raise ValueError(
            f"vision_feature_select_strategy={hf.vision_feature_select_strategy!r} takes the class "
            f"token away, but a {hf.vision_config.model_type} has none: it would be a patch. Set "
            f"{KEPT!r}."
        )
    return VLMConfig(
        encoder=encoder,
        connector=MLPConfig(
            activation=activation(hf.projector_hidden_act, "projector_hidden_act"),
            bias=hf.multimodal_projector_bias,
        ),
        # The head is the whole's: that says whether it is the token table, and caps no logits.
        lm=dataclasses.replace(lm, tied=hf.tie_word_embeddings, final_softcap=None),
        image_token=hf.image_token_index,
        features=feature_blocks(hf.vision_feature_layer, encoder.depth),
        class_token=kept and encoder.prefix > 0,
        **fields,
    )


def options(config: VLMConfig) -> dict[str, Any]:
    """The inverse of `from_hf`."""
    connector = config.connector
    kept = config.class_token or not config.encoder.prefix
    return {
        "vision_config": ENCODER.to_hf(config.encoder),
        "text_config": TEXT.to_hf(config.lm),
        "tie_word_embeddings": config.lm.tied,
        "image_token_index": config.image_token,
        "image_seq_length": config.image_tokens,
        "projector_hidden_act": NAMES[connector.activation],
        "multimodal_projector_bias": connector.bias,
        "vision_feature_layer": feature_layers(config.features),
        "vision_feature_select_strategy": KEPT if kept else TAKEN,
    }


def to_hf(config: VLMConfig) -> Any:
    from transformers import LlavaConfig

    return LlavaConfig(**options(config))


def rows(config: VLMConfig) -> Sequence[Row]:
    expect_connector(config.connector, MLPConfig)
    return (
        *ENCODER.rows(config.encoder),
        *(
            Row(f"multi_modal_projector.linear_{layer + 1}", f"connector/linears/{layer}", LINEAR)
            for layer in range(config.connector.layers)
        ),
        Row("image_newline", "newline", ARRAY),  # of LLaVA-NeXT
        *TEXT.rows(config.lm),
    )


def ignored(config: VLMConfig) -> Sequence[str]:
    return (*ENCODER.ignored(config.encoder), *TEXT.ignored(config.lm))


FAMILIES.register("LlavaForConditionalGeneration")(
    Family(
        model_type="llava",
        model=VLM,
        from_hf=from_hf,
        to_hf=to_hf,
        rows=rows,
        renames=RENAMES,
        module_names=MODULE_NAMES,
        ignored=ignored,
    )
)
