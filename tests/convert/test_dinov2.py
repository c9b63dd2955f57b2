"""DINOv2 of transformers, with and without registers, both ways."""

import hf
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from towers import SMALL, blocks, channels_first, check, pixels, quick, refused

import mmjax.convert

transformers = hf.transformers()
pytestmark = pytest.mark.torch

BASE = {**SMALL, "image_size": 24, "patch_size": 8, "num_labels": 5}
CONFIGS = {
    "as published": ("Dinov2", BASE),
    "giant: gated, no biases": (
        "Dinov2",
        {**BASE, "use_swiglu_ffn": True, "qkv_bias": False, "num_attention_heads": 2},
    ),
    "three heads, no mask token": (
        "Dinov2",
        {
            **{**BASE, "hidden_size": 36, "num_attention_heads": 3, "num_hidden_layers": 3},
            **{"mlp_ratio": 2, "hidden_act": "gelu_new", "layer_norm_eps": 1e-3},
            **{"use_mask_token": False, "num_channels": 1},
        },
    ),
    "partial patches": (
        "Dinov2",
        {**BASE, "image_size": 29, "patch_size": 7, "mlp_ratio": 1, "hidden_act": "relu"},
    ),
    "registers": ("Dinov2WithRegisters", BASE),
    "registers, gated": (
        "Dinov2WithRegisters",
        {**BASE, "use_swiglu_ffn": True, "num_register_tokens": 2, "num_attention_heads": 1},
    ),
    "one register": (
        "Dinov2WithRegisters",
        {
            **{**BASE, "hidden_size": 36, "num_attention_heads": 3, "qkv_bias": False},
            **{"num_register_tokens": 1, "mlp_ratio": 3, "layer_norm_eps": 1e-3},
        },
    ),
    "registers, partial patches": (
        "Dinov2WithRegisters",
        {**BASE, "image_size": 29, "patch_size": 7, "mlp_ratio": 1, "hidden_act": "quick_gelu"},
    ),
}


# They differ in nothing but numbers from one that has them.
WITHOUT_GRADIENTS = ("partial patches", "one register", "registers, partial patches")


class AsFiles:
    """A model of transformers under the names of its files, where gate and up are one tensor."""

    def __init__(self, model):
        self.model = model

    def named_parameters(self):
        import torch

        found = dict(self.model.named_parameters())
        for name in list(found):
            if "gate_proj" in name:
                pair = found.pop(name), found.pop(name.replace("gate_proj", "up_proj"))
                value = torch.cat([p.detach() for p in pair])
                value.grad = torch.cat([p.grad for p in pair])
                found[name.replace("gate_proj", "weights_in")] = value
        return found.items()

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, *args, **kwargs):
        return self.model(*args, **kwargs)


def base(reference):
    return getattr(reference, reference.base_model_prefix)


@pytest.mark.parametrize("name", CONFIGS)
def test_classifier(name, tmp_path):
    prefix, options = CONFIGS[name]
    config = getattr(transformers, f"{prefix}Config")(**options)
    batch = pixels(2, config.image_size, config.image_size, config.num_channels)

    def ours(model, batch):
        out = model(batch, features=range(config.num_hidden_layers))
        return {"logits": out.logits, "tokens": out.tokens, "blocks": out.features}

    def theirs(reference, batch):
        x = channels_first(batch)
        out = reference(x, output_hidden_states=True)
        tokens = base(reference).layernorm(out.hidden_states[-1])
        return {"logits": out.logits, "tokens": tokens, "blocks": blocks(out.hidden_states)}

    reference = getattr(transformers, f"{prefix}ForImageClassification")(config)
    family = f"{prefix}ForImageClassification"
    gradients = name not in WITHOUT_GRADIENTS
    reference = AsFiles(reference) if gradients else reference
    check(family, reference, tmp_path, (batch,), ours, theirs, None, gradients)


@pytest.mark.parametrize("prefix", ["Dinov2", "Dinov2WithRegisters"])
def test_plain(prefix, tmp_path):
    config = getattr(transformers, f"{prefix}Config")(**BASE)

    def ours(model, batch):
        out = model(batch)
        return {"tokens": out.tokens, "pooled": out.pooled}

    def theirs(reference, batch):
        out = reference(channels_first(batch))
        return {"tokens": out.last_hidden_state, "pooled": out.pooler_output}

    reference = getattr(transformers, f"{prefix}Model")(config)
    inputs = (pixels(2, 24, 24, 3),)
    check(f"{prefix}Model", reference, tmp_path, inputs, ours, theirs, None, False)


@pytest.fixture(scope="module", params=["Dinov2", "Dinov2WithRegisters"])
def saved(request, tmp_path_factory):
    """(name of the class, reference, directory) of a plain model for 48 pixels."""
    config = getattr(transformers, f"{request.param}Config")(**BASE | {"image_size": 48})
    reference = getattr(transformers, f"{request.param}Model")(config)
    directory = parity.save_hf(reference, tmp_path_factory.mktemp("dinov2") / "source")
    return f"{request.param}Model", reference, directory


def test_another_resolution(saved):
    """With registers the interpolation is antialiased, which shows where the grid shrinks."""
    import torch

    name, reference, directory = saved
    batch = pixels(2, 16, 80, 3)
    with torch.no_grad():
        expected = reference(channels_first(batch)).last_hidden_state
    for options in ({}, {"image_size": (16, 80)}):
        model = mmjax.convert.from_pretrained(directory, **options)
        parity.close(name, "resized", quick(model, batch).tokens, expected)


def test_hidden_patches_and_features_of_several_blocks(saved):
    """What pretraining and backbones take."""
    import torch

    name, reference, directory = saved
    model = mmjax.convert.from_pretrained(directory)
    batch = pixels(2, 48, 48, 3)
    masked = np.random.default_rng(0).random((2, 36)) < 0.4
    backbone = getattr(transformers, name.replace("Model", "Backbone")).from_pretrained(
        directory, out_indices=[1, 2], reshape_hidden_states=False
    )

    def hidden(model, batch, masked):
        tokens = model(batch, masked=masked).tokens
        return tokens, model.final_norm(model(batch, features=(0, 1)).features)

    tokens, features = quick(model, batch, jnp.asarray(masked), function=hidden)
    with torch.no_grad():
        expected = reference(channels_first(batch), bool_masked_pos=torch.tensor(masked))
        maps = backbone(channels_first(batch)).feature_maps
    parity.close(name, "masked", tokens, expected.last_hidden_state)
    parity.close(name, "features", features, torch.stack(maps))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": [32, 64]}, "only equal height and width"),
        ({"hidden_act": "mish"}, "hidden_act='mish'"),
    ],
)
def test_what_cannot_be_computed_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        refused("Dinov2Model", transformers.Dinov2Config(**BASE | options))


def test_a_width_that_the_format_cannot_say_is_not_saved(saved, tmp_path):
    model = mmjax.convert.from_pretrained(saved[2])
    model.config = mmjax.convert.load.with_fields(model.config, mlp_width=50)
    with pytest.raises(mmjax.convert.ConversionError, match="mlp_width=50"):
        mmjax.convert.save_pretrained(model, tmp_path / "target")
