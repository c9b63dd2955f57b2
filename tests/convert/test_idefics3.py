"""Idefics3 and SmolVLM of transformers, both ways."""

import hf
import numpy as np
import pytest
from towers import refused
from vlms import IMAGE_TOKEN, LANGUAGE, VISION, check

from mmjax.convert.families.idefics3 import regular_positions

transformers = hf.transformers()
pytestmark = pytest.mark.torch

DEPENDS_ON_THE_CPU = (19, 36, 37, 38, 40, 54, 59)
# name -> (prefix of the classes, options of the tower, of the language model and of the whole)
CASES = {
    "idefics3, every second patch": (
        "Idefics3",
        {"image_size": 32, "num_channels": 1, "hidden_act": "quick_gelu"},
        {"num_key_value_heads": 1},
        {"scale_factor": 2},
    ),
    "idefics3, pixels that fill no patch": (
        "Idefics3",
        {"image_size": 28, "layer_norm_eps": 1e-3},
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
            "num_key_value_heads": 4,
        },
        {"scale_factor": 3, "tie_word_embeddings": True},
    ),
    "smolvlm, one token an image": (
        "SmolVLM",
        {"hidden_size": 24, "num_attention_heads": 3},
        {"hidden_size": 48, "head_dim": 10},
        {"scale_factor": 3},
    ),
    "smolvlm, tied": (
        "SmolVLM",
        {"image_size": 48, "num_hidden_layers": 1},
        {"attention_bias": True},
        {"scale_factor": 2, "tie_word_embeddings": True},
    ),
}


def config_for(name):
    prefix, vision, text, options = CASES[name]
    return getattr(transformers, f"{prefix}Config")(
        vision_config=VISION | vision,
        text_config=transformers.LlamaConfig(**LANGUAGE | text),
        image_token_id=IMAGE_TOKEN,
        **options,
    )


def theirs(stream):
    """Pictures by row; those of zeros are left out by the models."""
    import torch

    pixels = stream.images.transpose(0, 1, 4, 2, 3)
    return {**stream.theirs, "pixel_values": torch.tensor(pixels)}


@pytest.mark.parametrize("name", CASES)
def test_equals_transformers(name, tmp_path):
    prefix = CASES[name][0]
    reference = getattr(transformers, f"{prefix}ForConditionalGeneration")(config_for(name))
    check(reference, tmp_path, theirs=theirs, origin=not name.startswith("smolvlm, tied"))


def test_positions_of_patches():
    """Sides with a place for each patch are those of transformers, on CPUs of any vectors."""
    import torch
    from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionEmbeddings

    for side in range(1, 65):
        config = transformers.Idefics3VisionConfig(
            image_size=side, patch_size=1, hidden_size=1, num_channels=1, num_attention_heads=1
        )
        embeddings = Idefics3VisionEmbeddings(config)
        with torch.no_grad():
            embeddings.position_embedding.weight.copy_(torch.arange(side**2)[:, None])
            embeddings.patch_embedding.weight.zero_()
            embeddings.patch_embedding.bias.zero_()
            pixels = torch.zeros(1, 1, side, side)
            found = embeddings(pixels, torch.ones(1, side, side, dtype=torch.bool))
        regular = np.array_equal(found[0, :, 0].numpy(), np.arange(side**2))
        refused = not regular_positions(side)
        assert refused == (not regular) or (refused and side in DEPENDS_ON_THE_CPU), side
    # Those of published checkpoints: SmolVLM of 256 million and 2.2 billion parameters, Idefics3.
    assert regular_positions(32) and regular_positions(27) and regular_positions(26)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda hf: setattr(hf.vision_config, "image_size", 200), "25 patches a side"),
        (lambda hf: setattr(hf, "scale_factor", 5), "factor=4 is the nearest"),
        (lambda hf: setattr(hf.text_config, "model_type", "t5"), "model_type='t5'"),
    ],
)
def test_refused(change, message):
    config = config_for("idefics3, every second patch")
    change(config)
    with pytest.raises(ValueError, match=message):
        refused("Idefics3ForConditionalGeneration", config)
