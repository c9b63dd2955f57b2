"""LLaVA-NeXT of transformers, both ways: images of many shapes, unpadded, several in a text."""

import hf
import numpy as np
import pytest
from vlms import IMAGE_TOKEN, LANGUAGE, VISION, Stream, check, long

from mmjax.data.anyres import lay_out

transformers = hf.transformers()
pytestmark = pytest.mark.torch

# Pixels of the boards.
PINPOINTS = [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]
# name -> class of the language model's config, and options as in `test_llava`
CASES = {
    "as published": ("MistralConfig", {}, {"sliding_window": None}, {}),
    "several blocks, llama": (
        "LlamaConfig",
        {"hidden_size": 24, "num_attention_heads": 3},
        {"tie_word_embeddings": True},
        {"vision_feature_layer": [-2, 2], "tie_word_embeddings": True},
    ),
    # transformers reads only the whole's tie_word_embeddings
    "siglip, qwen2": (
        "Qwen2Config",
        {"vision_use_head": False},
        {"tie_word_embeddings": True, "num_key_value_heads": 4},
        {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
    ),
}
# (width, height); unpadded above and below, at the sides, not at all
SIZES = {"as published": [(50, 18), (19, 60), (40, 40)], "several blocks, llama": [(7, 90)] * 3}


def reference(name):
    text, vision_options, text_options, options = CASES[name]
    vision = "SiglipVisionConfig" if "siglip" in name else "CLIPVisionConfig"
    config = transformers.LlavaNextConfig(
        vision_config=getattr(transformers, vision)(**VISION | vision_options),
        text_config=getattr(transformers, text)(**LANGUAGE | text_options),
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=PINPOINTS,
        **options,
    )
    return transformers.LlavaNextForConditionalGeneration(config)


@pytest.mark.parametrize("name", CASES)
def test_equals_transformers(name, tmp_path):
    sizes = SIZES.get(name, [(30, 64), (64, 30), (24, 71)])
    plans = [lay_out(*size, PINPOINTS, 24, 3) for size in sizes]

    def theirs(stream: Stream):
        import torch

        most = max(map(len, stream.pictures))
        pixels = np.zeros((len(sizes), most, *stream.images.shape[2:]), np.float32)
        for row, pictures in zip(pixels, stream.pictures, strict=True):
            row[: len(pictures)] = pictures
        return stream.theirs | {
            "pixel_values": torch.tensor(pixels.transpose(0, 1, 4, 2, 3)),
            "image_sizes": long([(height, width) for width, height in sizes]),
        }

    rows = ([3, plans[0], 4], [plans[1], 2, plans[2], 5], [6])
    check(reference(name), tmp_path, rows, theirs, derived=False, origin=name != "siglip, qwen2")
