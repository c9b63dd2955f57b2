"""PaliGemma of transformers, both ways: Gemma 1 and 2, whose prefixes see themselves."""

import hf
import pytest
import torch
from vlms import IMAGE_TOKEN, LANGUAGE, VISION, Stream, check

transformers = hf.transformers()
pytestmark = pytest.mark.torch

# name -> class of the language model's config, and options as in `test_llava`
CASES = {
    "gemma": ("GemmaConfig", {}, {"head_dim": 10, "num_key_value_heads": 1}, {}),
    "gemma, not tied": (
        "GemmaConfig",
        {"hidden_size": 24, "num_attention_heads": 3, "image_size": 20},
        {"head_dim": 6, "vocab_size": IMAGE_TOKEN - 2},  # the placeholder has no vector
        {"tie_word_embeddings": False},
    ),
    "gemma 2": (
        "Gemma2Config",
        {"num_hidden_layers": 3},
        {"head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 2.0}
        | {"attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 12},
        {},
    ),
}


def reference(name):
    text, vision_options, text_options, options = CASES[name]
    vision = VISION | {"vision_use_head": False} | vision_options
    language = LANGUAGE | text_options
    config = transformers.PaliGemmaConfig(
        vision_config=transformers.SiglipVisionConfig(**vision),
        text_config=getattr(transformers, text)(**language),
        image_token_index=IMAGE_TOKEN,
        projection_dim=language["hidden_size"],
        **options,
    )
    return transformers.PaliGemmaForConditionalGeneration._from_config(
        config, attn_implementation="eager"
    )


def prefix(stream: Stream):
    """With what says that all is prefix, as the processor does."""
    inputs = stream.theirs
    return inputs | {"token_type_ids": torch.zeros_like(inputs["input_ids"])}


@pytest.mark.parametrize("name", CASES)
def test_equals_transformers(name, tmp_path):
    check(reference(name), tmp_path, theirs=prefix, origin=name != "gemma 2")
