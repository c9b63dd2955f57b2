"""ViT of transformers, both ways."""

import hf
import numpy as np
import parity
import pytest
from towers import (
    SMALL,
    blocks,
    channels_first,
    check,
    pixels,
    quick,
    refused,
    rewrite,
    same_parameters,
)

import mmjax.convert

transformers = hf.transformers()
pytestmark = pytest.mark.torch

CONFIGS = {
    "gelu": {"image_size": 24, "patch_size": 8, "intermediate_size": 48, "num_labels": 5},
    "three heads, no biases": {
        **{"num_attention_heads": 3, "hidden_size": 36, "intermediate_size": 20},
        **{"qkv_bias": False, "hidden_act": "gelu_new", "layer_norm_eps": 1e-3},
        **{"image_size": 16, "patch_size": 4, "num_channels": 1, "num_labels": 3},
    },
    "partial patches, a deeper one": {
        **{"num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64},
        **{"image_size": 29, "patch_size": 7, "hidden_act": "quick_gelu", "num_labels": 2},
    },
    "oblong": {
        **{"image_size": [16, 24], "patch_size": [8, 8], "hidden_act": "relu"},
        **{"intermediate_size": 32, "num_labels": 4},
    },
}


def images(config, batch=2):
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return pixels(batch, height, width, config.num_channels)


@pytest.mark.parametrize("name", CONFIGS)
def test_classifier(name, tmp_path):
    config = transformers.ViTConfig(**{**SMALL, **CONFIGS[name]})
    batch = images(config)

    def ours(model, batch):
        out = model(batch, features=range(config.num_hidden_layers))
        return {"logits": out.logits, "tokens": out.tokens, "blocks": out.features}

    def theirs(reference, batch):
        x = channels_first(batch)
        out = reference(x, output_hidden_states=True)
        states = out.hidden_states
        tokens = reference.vit.layernorm(states[-1])
        return {"logits": out.logits, "tokens": tokens, "blocks": blocks(states)}

    reference = transformers.ViTForImageClassification(config)
    check("ViTForImageClassification", reference, tmp_path, (batch,), ours, theirs)


@pytest.mark.parametrize(
    ("pooling", "options"),
    [(True, {}), (True, {"pooler_output_size": 20, "pooler_act": "gelu"}), (False, {})],
)
def test_plain_with_and_without_pooler(pooling, options, tmp_path):
    config = transformers.ViTConfig(**SMALL, **CONFIGS["gelu"] | options)
    batch = images(config)

    def ours(model, batch):
        out = model(batch)
        return {"tokens": out.tokens} | ({"pooled": out.pooled} if pooling else {})

    def theirs(reference, batch):
        out = reference(channels_first(batch))
        return {"tokens": out.last_hidden_state} | (
            {"pooled": out.pooler_output} if pooling else {}
        )

    reference = transformers.ViTModel(config, add_pooling_layer=pooling)
    if pooling:
        check("ViTModel", reference, tmp_path, (batch,), ours, theirs, gradients=not options)
        return
    # transformers can only write such a checkpoint: it reads each ViTModel with a pooler.
    source = parity.save_hf(reference, tmp_path / "source")
    model = mmjax.convert.from_pretrained(source)
    parity.close(
        "ViTModel", "tokens", quick(model, batch).tokens, theirs(reference, batch)["tokens"]
    )
    assert model.projection is None
    mmjax.convert.save_pretrained(model, tmp_path / "target")
    same_parameters(model, mmjax.convert.from_pretrained(tmp_path / "target"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A classifier of 24 pixels, patches of 8: (reference, directory)."""
    config = transformers.ViTConfig(**SMALL, **CONFIGS["gelu"])
    reference = transformers.ViTForImageClassification(config)
    return reference, parity.save_hf(reference, tmp_path_factory.mktemp("vit") / "source")


def test_another_resolution(saved):
    """Interpolated at each call, or once on loading; fewer rows and more columns than before."""
    import torch

    reference, directory = saved
    batch = pixels(2, 16, 40, 3)
    with torch.no_grad():
        expected = reference(channels_first(batch), interpolate_pos_encoding=True).logits
    at_call = mmjax.convert.from_pretrained(directory)
    on_load = mmjax.convert.from_pretrained(directory, image_size=(16, 40))
    assert on_load.config.grid == (2, 5)
    for model in (at_call, on_load):
        parity.close("ViTForImageClassification", "resized", quick(model, batch).logits, expected)


def test_a_resized_model_is_saved_as_one_of_its_size(saved, tmp_path):
    import torch

    _, directory = saved
    model = mmjax.convert.resize.resize_positions(mmjax.convert.from_pretrained(directory), 32)
    mmjax.convert.save_pretrained(model, tmp_path / "target")
    theirs = transformers.ViTForImageClassification.from_pretrained(tmp_path / "target")
    batch = pixels(2, 32, 32, 3)
    with torch.no_grad():
        expected = theirs(channels_first(batch)).logits
    parity.close("ViTForImageClassification", "resized", quick(model, batch).logits, expected)


def test_labels_survive(saved, tmp_path):
    reference, _ = saved
    reference.config.id2label = {i: f"label {i}" for i in range(5)}
    reference.save_pretrained(tmp_path / "source")
    model = mmjax.convert.from_pretrained(tmp_path / "source")
    mmjax.convert.save_pretrained(model, tmp_path / "target")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "target")
    assert config.id2label == {i: f"label {i}" for i in range(5)}


def test_names_of_other_versions(saved, tmp_path):
    """Files have the names of transformers 4; those within transformers 5 are read as well."""
    reference, directory = saved
    model = mmjax.convert.from_pretrained(directory)
    reference.save_pretrained(tmp_path / "new", save_original_format=False)
    same_parameters(model, mmjax.convert.from_pretrained(tmp_path / "new"))

    def with_pooler(tensors):
        pooler = np.zeros((32, 32), np.float32)
        return tensors | {"vit.pooler.dense.weight": pooler, "vit.pooler.dense.bias": pooler[0]}

    other = rewrite(directory, tmp_path / "pooler", with_pooler)
    same_parameters(model, mmjax.convert.from_pretrained(other))


def test_masked_image_modelling_gives_the_plain_model(tmp_path):
    config = transformers.ViTConfig(**SMALL, **CONFIGS["gelu"], encoder_stride=8)
    reference = transformers.ViTForMaskedImageModeling(config)
    model = mmjax.convert.from_pretrained(parity.save_hf(reference, tmp_path / "source"))
    batch = pixels(2, 24, 24, 3)
    expected = reference.vit(channels_first(batch)).last_hidden_state
    parity.close("ViTModel", "tokens", quick(model, batch).tokens, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": [8, 4]}, r"patch_size=\(8, 4\).*equal height and width"),
        ({"hidden_act": "mish"}, "hidden_act='mish'"),
        ({"image_size": 4}, "no patch of 16"),
    ],
)
def test_what_cannot_be_computed_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        refused("ViTModel", transformers.ViTConfig(**SMALL | options))
