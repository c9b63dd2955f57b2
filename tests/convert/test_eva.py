"""EVA-CLIP's image tower as BLIP-2 has it, both ways."""

import hf
import parity
import pytest
from towers import SMALL, blocks, channels_first, check, pixels, quick

import mmjax.convert

transformers = hf.transformers()
pytestmark = pytest.mark.torch

BASE = {**SMALL, "image_size": 24, "patch_size": 8, "intermediate_size": 48}
CONFIGS = {
    "as published": ("Blip2", BASE),
    "no biases": ("Blip2", {**BASE, "qkv_bias": False, "hidden_act": "quick_gelu"}),
    "three heads, partial patches": (
        "Blip2",
        {
            **{**BASE, "hidden_size": 36, "num_attention_heads": 3, "num_hidden_layers": 3},
            **{"image_size": 29, "patch_size": 7, "layer_norm_eps": 1e-3},
        },
    ),
    "InstructBLIP": ("InstructBlip", {**BASE, "num_attention_heads": 1, "hidden_act": "relu"}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens(name, tmp_path):
    prefix, options = CONFIGS[name]
    config = getattr(transformers, f"{prefix}VisionConfig")(**options)
    depth = config.num_hidden_layers

    def ours(model, images):
        out = model(images, features=range(depth))
        return {"tokens": out.tokens, "blocks": out.features}

    def theirs(reference, images):
        out = reference(channels_first(images), output_hidden_states=True)
        return {"tokens": out.last_hidden_state, "blocks": blocks(out.hidden_states[: depth + 1])}

    reference = getattr(transformers, f"{prefix}VisionModel")(config)
    inputs = (pixels(2, config.image_size, config.image_size, 3),)
    check(f"{prefix}VisionModel", reference, tmp_path, inputs, ours, theirs)


def test_another_resolution(tmp_path):
    import torch

    config = transformers.Blip2VisionConfig(**BASE)
    reference = transformers.Blip2VisionModel(config)
    directory = parity.save_hf(reference, tmp_path / "source")
    batch = pixels(2, 16, 40, 3)
    with torch.no_grad():
        expected = reference(channels_first(batch), interpolate_pos_encoding=True)
    model = mmjax.convert.from_pretrained(directory, image_size=(16, 40))
    parity.close("Blip2VisionModel", "resized", quick(model, batch).tokens, expected[0])
