"""SigLIP of transformers, and SigLIP 2 of a fixed resolution, both ways."""

import hf
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from towers import (
    SMALL,
    TOKENS,
    blocks,
    channels_first,
    check,
    long,
    pixels,
    quick,
    refused,
    remember,
    rewrite,
    same_parameters,
)

import mmjax.convert
from mmjax import models

transformers = hf.transformers()
pytestmark = pytest.mark.torch

VISION = {**SMALL, "image_size": 24, "patch_size": 8, "intermediate_size": 48}
TEXT = {**SMALL, **TOKENS, "intermediate_size": 48}
CONFIGS = {
    "as published": {"vision_config": VISION, "text_config": TEXT},
    "So400m: patches that do not fit": {
        "vision_config": {**VISION, "image_size": 27, "patch_size": 7, "intermediate_size": 43},
        "text_config": {**TEXT, "hidden_act": "gelu", "layer_norm_eps": 1e-3},
    },
    "giant: a wider image tower": {
        "vision_config": {
            **VISION,
            **{"num_hidden_layers": 3, "hidden_size": 36, "num_attention_heads": 3},
            **{"hidden_act": "gelu", "layer_norm_eps": 1e-2},
        },
        "text_config": {
            **TEXT,
            **{"num_hidden_layers": 1, "hidden_size": 20, "num_attention_heads": 2},
            **{"projection_size": 36, "vocab_size": 61, "max_position_embeddings": 9},
        },
    },
    "other activations": {
        "vision_config": {**VISION, "num_channels": 1, "hidden_act": "quick_gelu"},
        "text_config": {**TEXT, "hidden_act": "relu", "num_attention_heads": 1},
    },
}


def tokens_of(text):
    """Texts that fill all places, as SigLIP was trained."""
    shape = (4, text.max_position_embeddings)
    return jnp.asarray(np.random.default_rng(3).integers(0, text.vocab_size, shape), jnp.int32)


def images(vision):
    return pixels(3, vision.image_size, vision.image_size, vision.num_channels)


@pytest.mark.parametrize("name", CONFIGS)
def test_both_towers(name, tmp_path):
    config = transformers.SiglipConfig(**CONFIGS[name])
    vision, text = config.vision_config, config.text_config

    def ours(model, images, tokens):
        image = model.image(images, features=range(vision.num_hidden_layers))
        words = model.text(tokens, features=range(text.num_hidden_layers))
        remember(model, "image", image)
        remember(model, "text", words)
        return {
            "logits": model(images, tokens),
            "image embeddings": model.encode_image(images),
            "text embeddings": model.encode_text(tokens),
            "image tokens": image.tokens,
            "image blocks": image.features,
            "text blocks": words.features,
        }

    def theirs(reference, images, tokens):
        out = reference(long(tokens), channels_first(images), output_hidden_states=True)
        image, words = out.vision_model_output, out.text_model_output
        return {
            "logits": out.logits_per_image,
            "image embeddings": out.image_embeds,
            "text embeddings": out.text_embeds,
            "image tokens": image.last_hidden_state,
            "image blocks": blocks(image.hidden_states),
            "text blocks": blocks(words.hidden_states),
        }

    inputs = (images(vision), tokens_of(text))
    check("SiglipModel", transformers.SiglipModel(config), tmp_path, inputs, ours, theirs)


@pytest.mark.parametrize("head", [True, False])
def test_images_only(head, tmp_path):
    config = transformers.SiglipVisionConfig(**VISION, vision_use_head=head)

    def ours(model, images):
        out = model(images)
        return {"tokens": out.tokens} | ({"pooled": out.pooled} if head else {})

    def theirs(reference, images):
        out = reference(channels_first(images))
        pooled = {"pooled": out.pooler_output} if head else {}
        return {"tokens": out.last_hidden_state} | pooled

    reference = transformers.SiglipVisionModel(config)
    check("SiglipVisionModel", reference, tmp_path, (images(config),), ours, theirs, None, False)


def test_texts_only(tmp_path):
    config = transformers.SiglipTextConfig(**TEXT, projection_size=20)

    def ours(model, tokens):
        out = model(tokens)
        return {"tokens": out.tokens, "pooled": out.pooled}

    def theirs(reference, tokens):
        out = reference(long(tokens))
        return {"tokens": out.last_hidden_state, "pooled": out.pooler_output}

    reference = transformers.SiglipTextModel(config)
    inputs = (tokens_of(config),)
    check("SiglipTextModel", reference, tmp_path, inputs, ours, theirs, None, False)


@pytest.mark.parametrize("head", [True, False])
def test_classifier(head, tmp_path):
    """Its attention pooling, if it has one, is kept but not used."""
    config = transformers.SiglipConfig(
        vision_config={**VISION, "vision_use_head": head}, text_config=TEXT, num_labels=5
    )

    def ours(model, images):
        return {"logits": model(images).logits}

    def theirs(reference, images):
        return {"logits": reference(channels_first(images)).logits}

    reference = transformers.SiglipForImageClassification(config)
    inputs = (images(config.vision_config),)
    check("SiglipForImageClassification", reference, tmp_path, inputs, ours, theirs, None, False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    reference = transformers.SiglipModel(transformers.SiglipConfig(**CONFIGS["as published"]))
    return reference, parity.save_hf(reference, tmp_path_factory.mktemp("siglip") / "source")


def test_another_resolution(saved):
    import torch

    reference, directory = saved
    batch = pixels(2, 16, 40, 3)
    with torch.no_grad():
        expected = reference.get_image_features(
            channels_first(batch), interpolate_pos_encoding=True
        ).pooler_output.numpy()
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    for options in ({}, {"image_size": (16, 40)}):
        model = mmjax.convert.from_pretrained(directory, **options)
        actual = quick(model, batch, function=models.SigLIP.encode_image)
        parity.close("SiglipModel", "resized", actual, expected)


def test_prefixes_of_older_checkpoints(saved, tmp_path):
    _, directory = saved
    model = mmjax.convert.from_pretrained(directory)
    for part, tower in (("vision", model.image), ("text", model.text)):
        alone = rewrite(
            directory,
            tmp_path / part,
            lambda tensors, part=part: {
                name: value for name, value in tensors.items() if name.startswith(part)
            },
            **{"vision": VISION, "text": TEXT}[part],
            architectures=[f"Siglip{part.capitalize()}Model"],
            model_type=f"siglip_{part}_model",
        )
        loaded = mmjax.convert.from_pretrained(alone)
        if part == "text":  # the pair keeps the projection beside its tower
            loaded.projection = None
        same_parameters(tower, loaded)


@pytest.mark.parametrize(
    ("part", "options", "message"),
    [
        ("text_config", {"projection_size": 20}, "projection_size=20 and .*hidden_size=32"),
        ("vision_config", {"vision_use_head": False}, "one vector per image"),
        ("vision_config", {"hidden_act": "mish"}, "hidden_act='mish'"),
    ],
)
def test_what_cannot_be_computed_is_refused(part, options, message):
    config = dict(CONFIGS["as published"])
    config[part] = config[part] | options
    with pytest.raises(ValueError, match=message):
        refused("SiglipModel", transformers.SiglipConfig(**config))
