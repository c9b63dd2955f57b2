"""Emu3's image tokenizer, both ways: codes, and images of codes; of images and of clips."""

import dataclasses

import hf
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from towers import QUICK, channels_first, pixels, quick, refused

import mmjax.convert
from mmjax import params
from mmjax.models import Emu3VQ

transformers = hf.transformers()
pytestmark = pytest.mark.torch

# Group norms of transformers have 32 groups.
SMALL = {"base_channels": 32, "codebook_size": 29, "num_res_blocks": 1}
# name -> options, and the size of the images.
CASES = {
    "two levels": (
        {"channel_multiplier": [1, 2], "attn_resolutions": [1], "hidden_size": 64},
        (8, 12),
    ),
    "one level, one frame, two heads": (
        {
            **{"channel_multiplier": [1], "attn_resolutions": [0], "hidden_size": 32},
            **{"num_attention_heads": 2, "temporal_downsample_factor": 1},
        },
        (5, 3),
    ),
    "three levels, attention at two, grey": (
        {
            **{"channel_multiplier": [2, 1, 2], "attn_resolutions": [0, 2], "hidden_size": 64},
            **{"in_channels": 1, "out_channels": 1, "temporal_downsample_factor": 2},
            **{"num_attention_heads": 4, "embed_dim": 6, "latent_channels": 6},
        },
        (12, 20),
    ),
    "no attention but the middle, two blocks": (
        {
            **{"channel_multiplier": [2, 1], "attn_resolutions": [], "hidden_size": 32},
            "num_res_blocks": 2,
        },
        (14, 4),
    ),
}


def make(name):
    """A tokenizer whose statistics say something, too."""
    import torch

    config = transformers.Emu3VQVAEConfig(**SMALL | CASES[name][0])
    model = transformers.Emu3VQVAE(config)
    generator = torch.Generator().manual_seed(2)
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.fill_(70_001)
        else:
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    # Codes far enough from each other that many are used.
    model.quantize.embedding.weight.data.normal_(generator=generator)
    return model.eval()


def theirs(reference, x, size):
    """Codes, and the images of them."""
    import torch

    with torch.no_grad():
        found = reference.encode(x, torch.tensor([size] * len(x))).image_tokens
        codes = torch.stack(found)
        return codes, reference.decode(codes)


def frames_first(clips):
    """[B, T, H, W, C] -> [B, T, C, H, W]"""
    import torch

    return torch.tensor(np.asarray(clips).transpose(0, 1, 4, 2, 3))


def everything(model, images):
    codes = model.encode(images)
    return codes, model(images), model.decode(codes)


@pytest.mark.parametrize("name", CASES)
def test_codes_and_images(name, tmp_path):
    reference, size = make(name), CASES[name][1]
    directory = parity.save_hf(reference, tmp_path / "theirs")
    model = mmjax.convert.from_pretrained(directory)
    factor = model.config.factor
    images = pixels(2, *size, model.config.channels)
    x = channels_first(images)
    expected_codes, expected = theirs(reference, x, size)
    codes, out, again = quick(model, images, function=everything)
    assert codes.shape == (2, size[0] // factor, size[1] // factor)
    np.testing.assert_array_equal(codes, expected_codes)
    assert len(np.unique(codes)) > 3, "codes that are all the same show nothing"
    np.testing.assert_array_equal(out.codes, codes)
    expected = expected.permute(0, 2, 3, 1)
    parity.close("Emu3VQVAE", "images", out.images, expected)
    parity.close("Emu3VQVAE", "images", again, expected)
    parity.check_round_trip(directory, tmp_path / "ours", lambda model: theirs(model, x, size)[1])
    parity.check_saving_without_origin(directory, tmp_path / "alone")


def test_clips(tmp_path):
    name = "two levels"
    reference, size = make(name), CASES[name][1]
    model = mmjax.convert.from_pretrained(parity.save_hf(reference, tmp_path / "theirs"))
    count = 2 * model.config.frames
    clips = pixels(2, count, *size, model.config.channels)
    codes, expected = theirs(reference, frames_first(clips), size)
    out = quick(model, clips)
    assert out.codes.shape[:2] == (2, 2)
    np.testing.assert_array_equal(out.codes, codes)
    assert len(np.unique(codes)) > 3
    parity.close("Emu3VQVAE", "clips", out.images, expected.permute(0, 1, 3, 4, 2))
    assert out.images.shape == clips.shape
    with pytest.raises(ValueError, match=f"{count + 1} frames .* multiple of {count // 2}"):
        model.encode(jnp.concatenate([clips, clips[:, :1]], axis=1))


def test_gradients_of_an_image(tmp_path):
    """Of everything but the way through the codes, which is the codebook's own."""
    name = "two levels"
    reference, size = make(name), CASES[name][1]
    directory = parity.save_hf(reference, tmp_path / "theirs")
    model = mmjax.convert.from_pretrained(directory)
    images = pixels(2, *size, 3)
    weights = pixels(2, *size, 3, seed=1)
    x = channels_first(images)[:, None].repeat(1, model.config.frames, 1, 1, 1)
    vectors = reference.quant_conv(reference.encoder(x).transpose(1, 2))
    grid = reference.post_quant_conv(vectors)
    decoded = reference.decoder(grid.transpose(1, 2), vectors.transpose(1, 2))
    first = decoded.reshape(2, -1, *decoded.shape[1:])[:, 0]
    (first * channels_first(weights)).sum().backward()
    graph, arrays = params.split(model)

    def ours(arrays):
        model = params.merge(graph, arrays)
        return jnp.sum(model.decoder(model.encoder(images)[:, 0]) * weights)

    slopes = jax.jit(jax.grad(ours), compiler_options=QUICK)(arrays)
    parity.check_gradients("Emu3VQVAE", model, slopes, reference)


def test_what_is_not_supported():
    options = SMALL | CASES["two levels"][0]
    for changes, message in (
        ({"double_latent": True}, "double_latent=True"),
        ({"out_channels": 1}, "out_channels=1 and in_channels=3"),
        ({"hidden_size": 32}, r"hidden_size=32.* grids of \[64\] channels"),
        ({"attn_resolutions": [0, 1]}, r"hidden_size=64.* grids of \[32, 64\] channels"),
        ({"temporal_downsample_factor": 3}, "frames=3 is no power of two"),
        ({"embed_dim": 6}, "latent=4, but vectors of codes have 6"),
        ({"num_attention_heads": 3}, "heads=3 do not divide 64"),
    ):
        config = transformers.Emu3VQVAEConfig(**options | changes)
        with pytest.raises(ValueError, match=message):
            refused("Emu3VQVAE", config)


def test_the_published_shapes():
    """Every tensor of the default config: 8 x 8 pixels, and 4 frames, a code."""
    import torch

    from mmjax.convert.load import structure
    from mmjax.convert.table import lay_out

    config = transformers.Emu3VQVAEConfig()
    with torch.device("meta"):
        reference = transformers.Emu3VQVAE(config)
    family = mmjax.convert.FAMILIES["Emu3VQVAE"]
    source = mmjax.convert.family.Source(config, frozenset(), None)
    ours = family.from_hf(source)
    assert (ours.factor, ours.frames, ours.quantizer.size) == (8, 4, 32768)
    _, shapes = structure(Emu3VQ, ours)
    found = {entry.name: entry.shape for entry in lay_out(family.rows(ours), shapes)}
    assert found == {k: tuple(v.shape) for k, v in reference.state_dict().items()}
    assert family.from_hf(source._replace(config=family.to_hf(ours))) == ours
    without = dataclasses.replace(ours, middle_attends=False)
    with pytest.raises(ValueError, match="it cannot say middle_attends=False"):
        mmjax.convert.save.say(family, without, frozenset())
