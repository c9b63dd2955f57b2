"""The image tokenizers of Chameleon and Janus, both ways: codes, and images of codes."""

import dataclasses

import hf
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from towers import channels_first, pixels, quick, refused

import mmjax.convert
from mmjax import params
from mmjax.models import VQGAN

transformers = hf.transformers()
pytestmark = pytest.mark.torch

# Group norms of transformers have 32 groups.
SMALL = {"base_channels": 32, "num_embeddings": 19, "embed_dim": 6, "latent_channels": 10}
CASES = {
    "Janus": ("Janus", {"channel_multiplier": [1, 2], "num_res_blocks": 2, "num_patches": 4}),
    "Janus, one level": ("Janus", {"channel_multiplier": [2], "num_patches": 5}),
    "Janus, three levels, one block, grey": (
        "Janus",
        {
            **{"channel_multiplier": [1, 1, 3], "num_res_blocks": 1, "num_patches": 3},
            **{"in_channels": 1, "out_channels": 1, "num_embeddings": 40},
        },
    ),
    "Chameleon": ("Chameleon", {"channel_multiplier": [1, 2], "resolution": 16}),
    "Chameleon, attention at two grids": (
        "Chameleon",
        {"channel_multiplier": [1, 2, 1], "resolution": 20, "attn_resolutions": [20, 5]},
    ),
    "Chameleon, no attention": (
        "Chameleon",
        {"channel_multiplier": [2, 1], "resolution": 12, "attn_type": "none", "num_res_blocks": 1},
    ),
}


def make(name):
    prefix, options = CASES[name]
    config = getattr(transformers, f"{prefix}VQVAEConfig")(**SMALL | options)
    return getattr(transformers, f"{prefix}VQVAE")(config)


@pytest.mark.parametrize("name", CASES)
def test_codes_and_images(name, tmp_path):
    import torch

    reference = make(name).eval()
    family = type(reference).__name__
    directory = parity.save_hf(reference, tmp_path / "theirs")
    model = mmjax.convert.from_pretrained(directory)
    config = model.config
    images = pixels(2, config.image_size, config.image_size, config.channels)
    x = channels_first(images)
    with torch.no_grad():
        theirs = reference.encode(x)
    codes = quick(model, images, function=VQGAN.encode)
    assert codes.shape == (2, *[config.image_size // config.factor] * 2)
    np.testing.assert_array_equal(codes.reshape(-1), theirs.image_tokens)
    assert len(np.unique(codes)) > 3, "codes that are all the same show nothing"
    if config.decodes:
        with torch.no_grad():
            expected = reference(x).decoded_pixel_values.permute(0, 2, 3, 1)
        out = quick(model, images)
        parity.close(family, "images", out.images, expected)
        np.testing.assert_array_equal(out.codes, codes)
        parity.close(family, "images", quick(model, codes, function=VQGAN.decode), expected)
    else:
        with pytest.raises(ValueError, match="decodes=False"):
            model.decode(codes)

    def call(torch_model):
        return torch_model.encode(x).image_tokens

    parity.check_round_trip(directory, tmp_path / "ours", call)
    parity.check_saving_without_origin(directory, tmp_path / "alone")


def test_gradients_of_an_image(tmp_path):
    """Of everything but the way through the codes, which is the codebook's own."""
    reference = make("Janus").eval()
    directory = parity.save_hf(reference, tmp_path / "theirs")
    model = mmjax.convert.from_pretrained(directory)
    images = pixels(2, 8, 8, 3)
    weights = pixels(2, 8, 8, 3, seed=1)
    hidden = reference.encoder(channels_first(images))
    grid = reference.post_quant_conv(reference.quant_conv(hidden))
    loss = (reference.decoder(grid) * channels_first(weights)).sum()
    loss.backward()
    graph, arrays = params.split(model)

    def ours(arrays):
        model = params.merge(graph, arrays)
        grid = model.after(model.before(model.encoder(images)))
        return jnp.sum(model.decoder(grid) * weights)

    parity.check_gradients("JanusVQVAE", model, jax.grad(ours)(arrays), reference)


def test_what_is_not_supported():
    for prefix in ("Janus", "Chameleon"):
        config = getattr(transformers, f"{prefix}VQVAEConfig")(**SMALL, double_latent=True)
        with pytest.raises(ValueError, match="double_latent=True"):
            refused(f"{prefix}VQVAE", config)
    config = transformers.JanusVQVAEConfig(**SMALL, out_channels=1)
    with pytest.raises(ValueError, match="out_channels=1 and in_channels=3"):
        refused("JanusVQVAE", config)


def test_the_published_shapes():
    """Every tensor of the tokenizers' default configs, Janus's of 16 x 16 pixels a code."""
    import torch

    from mmjax.convert.load import structure
    from mmjax.convert.table import lay_out

    for name, factor in (("Janus", 16), ("Chameleon", 16)):
        config = getattr(transformers, f"{name}VQVAEConfig")()
        with torch.device("meta"):
            reference = getattr(transformers, f"{name}VQVAE")(config)
        family = mmjax.convert.FAMILIES[f"{name}VQVAE"]
        source = mmjax.convert.family.Source(config, frozenset(), None)
        ours = family.from_hf(source)
        assert ours.factor == factor
        _, shapes = structure(VQGAN, ours)
        found = {entry.name: entry.shape for entry in lay_out(family.rows(ours), shapes)}
        assert found == {k: tuple(v.shape) for k, v in reference.state_dict().items()}
        assert family.from_hf(source._replace(config=family.to_hf(ours))) == ours


def test_what_a_config_cannot_be():
    config = mmjax.convert.FAMILIES["JanusVQVAE"].from_hf(
        mmjax.convert.family.Source(transformers.JanusVQVAEConfig(), frozenset(), None)
    )
    for changes, message in (
        (dict(image_size=500), "image_size=500 is no multiple of 16"),
        (dict(attends=(5,)), "the levels are 0 to 4"),
        (dict(groups=48), "128 channels, which are not 48 groups"),
        (dict(multipliers=()), "needs a level"),
        (dict(dtype="float8"), "dtype='float8'"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(config, **changes)
    with pytest.raises(ValueError, match="compare='angle'"):
        dataclasses.replace(config.quantizer, compare="angle")
