"""LLaVA of transformers, both ways: towers, language models and options of both."""

import hf
import pytest
from vlms import IMAGE_TOKEN, LANGUAGE, VISION, check

transformers = hf.transformers()
pytestmark = pytest.mark.torch

# name -> (class of the tower's config, of the language model's, options of each and of the whole)
CASES = {
    "as published": ("CLIPVisionConfig", "LlamaConfig", {}, {}, {}),
    "last block and class token, qwen2": (
        "CLIPVisionConfig",
        "Qwen2Config",
        {"hidden_act": "gelu"},
        {"tie_word_embeddings": True, "num_key_value_heads": 1},
        {
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "projector_hidden_act": "gelu_pytorch_tanh",
        },
    ),
    "several blocks, mistral": (
        "CLIPVisionConfig",
        "MistralConfig",
        {"num_hidden_layers": 3, "hidden_size": 24, "num_attention_heads": 3},
        {"sliding_window": 7},
        {"vision_feature_layer": [1, -1, -3], "multimodal_projector_bias": False},
    ),
    "siglip, gemma": (
        "SiglipVisionConfig",
        "GemmaConfig",
        {"image_size": 20},
        {"head_dim": 10},
        {"vision_feature_layer": 2, "vision_feature_select_strategy": "full"},
    ),
}


def reference(name):
    vision, text, vision_options, text_options, options = CASES[name]
    config = transformers.LlavaConfig(
        vision_config=getattr(transformers, vision)(**VISION | vision_options),
        text_config=getattr(transformers, text)(**LANGUAGE | text_options),
        image_token_index=IMAGE_TOKEN,
        **options,
    )
    return transformers.LlavaForConditionalGeneration(config)


@pytest.mark.parametrize("name", CASES)
def test_equals_transformers(name, tmp_path):
    check(reference(name), tmp_path, origin=name != "siglip, gemma")
