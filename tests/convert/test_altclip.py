"""AltCLIP of transformers, both ways: the pair, and each tower."""

import functools

import hf
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from towers import (
    SMALL,
    blocks,
    channels_first,
    check,
    long,
    pixels,
    quick,
    remember,
    rewrite,
    same_parameters,
)
from towers import texts as padded_texts

import mmjax.convert
from mmjax.models import CLIP, AltCLIP, AltText, ViT

transformers = hf.transformers()
pytestmark = pytest.mark.torch

TEXT = {"vocab_size": 50, "max_position_embeddings": 16, "intermediate_size": 40, "project_dim": 20}
VISION = {"image_size": 16, "patch_size": 8, "intermediate_size": 48}
CONFIGS = {
    "quick gelu, small space": ({}, {}, {"projection_dim": 12}),
    "towers of unlike widths": (
        {"hidden_size": 24, "num_attention_heads": 3, "hidden_act": "gelu_new"},
        {"hidden_size": 36, "num_attention_heads": 6, "hidden_act": "gelu", "patch_size": 4},
        {"projection_dim": 40, "logit_scale_init_value": 1.5},
    ),
    "two segments, another padding, partial patches": (
        {"type_vocab_size": 2, "pad_token_id": 0, "project_dim": 33, "layer_norm_eps": 1e-2},
        {"image_size": 23, "patch_size": 7, "num_channels": 1, "layer_norm_eps": 1e-3},
        {"projection_dim": 16},
    ),
    "unlike depths": (
        {"num_hidden_layers": 1, "num_attention_heads": 1, "hidden_act": "relu"},
        {"num_hidden_layers": 3, "num_attention_heads": 2, "hidden_act": "silu"},
        {"projection_dim": 8},
    ),
}


def config_for(name):
    text, vision, pair = CONFIGS[name]
    return transformers.AltCLIPConfig(
        text_config={**SMALL, **TEXT, **text}, vision_config={**SMALL, **VISION, **vision}, **pair
    )


def images_for(config):
    return pixels(2, config.image_size, config.image_size, config.num_channels)


def pair(model, images, tokens, mask):
    assert isinstance(model, AltCLIP)
    image = model.image(images, features=range(model.config.image.depth))
    text = model.text(tokens, mask, features=range(model.config.text.bert.depth))
    remember(model, "image", image)
    remember(model, "text", text)
    return {
        "logits": model(images, tokens, mask),
        "image": model.encode_image(images),
        "text": model.encode_text(tokens, mask),
        "image blocks": image.features,
        "text blocks": text.features,
        "text tokens": text.tokens,
    }


def their_pair(reference, images, tokens, mask):
    x, tokens, mask = channels_first(images), long(tokens), long(mask)
    out = reference(tokens, x, mask)
    image = reference.vision_model(x, output_hidden_states=True)
    text = reference.text_model(tokens, mask, output_hidden_states=True)
    return {
        "logits": out.logits_per_image,
        "image": out.image_embeds,
        "text": out.text_embeds,
        "image blocks": blocks(image.hidden_states),
        "text blocks": blocks(text.hidden_states),
        "text tokens": text.last_hidden_state,
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_pair(name, tmp_path):
    config = config_for(name)
    tokens, mask = padded_texts(6, 11, 3)
    valid = np.asarray(mask)
    where = {
        "text tokens": valid,
        "text blocks": np.stack([valid] * config.text_config.num_hidden_layers),
    }
    reference = transformers.AltCLIPModel(config)
    inputs = (images_for(config.vision_config), tokens, mask)
    check("AltCLIPModel", reference, tmp_path, inputs, pair, their_pair, where)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A pair as a checkpoint: (reference, directory)."""
    reference = transformers.AltCLIPModel(config_for("quick gelu, small space"))
    return reference, parity.save_hf(reference, tmp_path_factory.mktemp("altclip") / "source")


def test_names_of_published_checkpoints(saved, tmp_path):
    """`layers` in the image tower, `layer` in the text tower, and buffers."""
    _, source = saved
    model = mmjax.convert.from_pretrained(source)
    assert isinstance(model, CLIP)

    def published(tensors):
        renamed = {
            name.replace("encoder.layer.", "encoder.layers.")
            if name.startswith("vision_model")
            else name: tensor
            for name, tensor in tensors.items()
        }
        positions = "text_model.roberta.embeddings.position_ids"
        return renamed | {positions: np.arange(16)[None]}

    target = rewrite(source, tmp_path / "published", published)
    same_parameters(model, mmjax.convert.from_pretrained(target))
    parity.check_saving_without_origin(source, tmp_path / "no_origin")


def test_text_tower_alone(tmp_path):
    reference = transformers.AltCLIPTextModel(config_for("towers of unlike widths").text_config)
    tokens, mask = padded_texts(6, 11, 3)

    def ours(model, tokens, mask):
        assert isinstance(model, AltText)
        out = model(tokens, mask)
        return {"tokens": out.tokens, "pooled": out.pooled}

    def theirs(reference, tokens, mask):
        out = reference(long(tokens), long(mask))
        return {"tokens": out.last_hidden_state, "pooled": out.pooler_output}

    where = {"tokens": np.asarray(mask)}
    check("AltCLIPTextModel", reference, tmp_path, (tokens, mask), ours, theirs, where)
    old = rewrite(
        tmp_path / "source",
        tmp_path / "old",
        lambda tensors: {
            name.replace("encoder.layers.", "encoder.layer."): x for name, x in tensors.items()
        },
    )
    same_parameters(*map(mmjax.convert.from_pretrained, (tmp_path / "source", old)))


def test_image_tower_alone(tmp_path):
    config = config_for("unlike depths").vision_config
    reference = transformers.AltCLIPVisionModel(config)

    def ours(model, images):
        assert isinstance(model, ViT)
        out = model(images, features=range(config.num_hidden_layers))
        return {"pooled": out.pooled, "blocks": out.features}

    def theirs(reference, images):
        out = reference(channels_first(images), output_hidden_states=True)
        return {"pooled": out.pooler_output, "blocks": blocks(out.hidden_states)}

    check("AltCLIPVisionModel", reference, tmp_path, (images_for(config),), ours, theirs)


def test_padding_and_neighbours_do_not_matter(saved):
    model = mmjax.convert.from_pretrained(saved[1])
    tokens, mask = padded_texts(6, 11, 3)
    encode = functools.partial(quick, model, function=AltCLIP.encode_text)
    together = encode(tokens, mask)
    np.testing.assert_allclose(encode(tokens[2:, :4])[0], together[2], atol=1e-5)
    other = jnp.where(mask, tokens, 9)
    np.testing.assert_allclose(encode(other, mask), together, atol=1e-5)


def test_another_resolution(saved):
    """Positions are interpolated once, on loading."""
    reference, source = saved
    model = mmjax.convert.from_pretrained(source, image_size=32)
    images = pixels(2, 32, 32, 3)
    features = reference.get_image_features(channels_first(images), interpolate_pos_encoding=True)
    expected = features.pooler_output / features.pooler_output.norm(dim=1, keepdim=True)
    found = quick(model, images, function=AltCLIP.encode_image)
    parity.close("AltCLIPModel", "another resolution", found, expected)
