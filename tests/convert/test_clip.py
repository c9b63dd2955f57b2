"""CLIP of transformers, both ways; MetaCLIP 2 is in `test_metaclip2`."""

import math

import hf
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from clips import CONFIGS, TEXT, VISION, check_classifier, check_pair, check_text, check_vision
from towers import (
    channels_first,
    fresh,
    long,
    pixels,
    quick,
    refused,
    rewrite,
    same_parameters,
    texts,
)

import mmjax.convert
from mmjax import models

transformers = hf.transformers()
pytestmark = pytest.mark.torch


@pytest.mark.parametrize("name", CONFIGS)
def test_both_towers(name, tmp_path):
    check_pair("CLIP", CONFIGS[name], tmp_path)


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("tower", [check_vision, check_text])
def test_one_tower(tower, projected, tmp_path):
    tower("CLIP", projected, tmp_path)


def test_classifier(tmp_path):
    check_classifier("CLIP", tmp_path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(reference, directory) of a pair for images of 24 pixels with patches of 8."""
    reference = transformers.CLIPModel(transformers.CLIPConfig(**CONFIGS["as published"]))
    return reference, parity.save_hf(reference, tmp_path_factory.mktemp("clip") / "source")


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
        actual = quick(model, batch, function=models.CLIP.encode_image)
        parity.close("CLIPModel", "resized", actual, expected)


def test_names_of_older_checkpoints(saved, tmp_path):
    """Buffers in them, and prefixes of towers that were saved alone."""
    _, directory = saved
    model = mmjax.convert.from_pretrained(directory)
    places = np.arange(12)[None]

    def buffers(tensors):
        return tensors | {
            "text_model.embeddings.position_ids": places,
            "vision_model.embeddings.position_ids": places,
        }

    same_parameters(
        model, mmjax.convert.from_pretrained(rewrite(directory, tmp_path / "ids", buffers))
    )
    for part, tower, config in (
        ("vision_model.", model.image, VISION),
        ("text_model.", model.text, TEXT),
    ):
        kind = part.split("_")[0].capitalize()
        alone = rewrite(
            directory,
            tmp_path / part,
            lambda tensors, part=part: {k: v for k, v in tensors.items() if k.startswith(part)},
            **config,
            architectures=[f"CLIP{kind}Model"],
            model_type=f"clip_{part}model".replace("_model.", "_"),
        )
        same_parameters(tower, mmjax.convert.from_pretrained(alone))


def test_a_trained_model_is_saved_with_the_limit_of_its_scale(tmp_path):
    """It was never read from a checkpoint; its temperature has gone beyond what is used."""
    import torch

    tower = {"width": 32, "depth": 2, "heads": 4, "mlp_width": 48, "activation": "gelu"}
    config = models.CLIPConfig(
        image=models.ViTConfig(
            **tower,
            **{"image_size": 16, "patch_size": 8, "norm_eps": 1e-5, "pooling": "cls"},
            **{"position": "learned", "pre_norm": True, "patch_bias": False, "drop_path": 0.1},
        ),
        text=models.TextConfig(
            **tower,
            **{"vocab_size": 50, "max_len": 12, "norm_eps": 1e-5, "attention": "causal"},
            **{"pooling": "eos", "eos_id": 40, "padding": "attend"},
        ),
        embed_dim=24,
    )
    model = fresh(models.CLIP, config)
    model.logit_scale.set_value(jnp.asarray(math.log(120.0)))
    mmjax.convert.save_pretrained(model, tmp_path / "target")
    reference = transformers.CLIPModel.from_pretrained(tmp_path / "target")
    images, (tokens, mask) = pixels(2, 16, 16, 3), texts(3, 6, 11)
    with torch.no_grad():
        expected = reference(long(tokens), channels_first(images), long(mask)).logits_per_image
    parity.close("CLIPModel", "logits", quick(model, images, tokens, mask), expected)


@pytest.mark.parametrize(
    ("part", "options", "message"),
    [
        ("text_config", {"eos_token_id": [39, 40]}, r"eos_token_id=\[39, 40\].*give one id"),
        ("text_config", {"eos_token_id": 99}, "eos_id=99 is outside of a vocabulary of 50"),
        ("text_config", {"hidden_act": "mish"}, "hidden_act='mish'"),
        ("vision_config", {"patch_size": [8, 4]}, "only equal height and width"),
        ("vision_config", {"image_size": [32, 64]}, "only equal height and width"),
    ],
)
def test_what_cannot_be_computed_is_refused(part, options, message):
    config = dict(CONFIGS["as published"])
    config[part] = config[part] | options
    with pytest.raises(ValueError, match=message):
        refused("CLIPModel", transformers.CLIPConfig(**config))


def test_a_model_that_the_format_cannot_say_is_not_saved(saved, tmp_path):
    model = mmjax.convert.from_pretrained(saved[1])
    model.config = mmjax.convert.load.with_fields(model.config, registers=2)
    with pytest.raises(mmjax.convert.ConversionError, match=r"image\.registers=2"):
        mmjax.convert.save_pretrained(model, tmp_path / "target")
    assert not (tmp_path / "target").exists()
