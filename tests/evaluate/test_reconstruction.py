"""Scores of reconstructions beside scikit-image and SciPy; the evaluator on a small tokenizer."""

import dataclasses
from types import SimpleNamespace

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from scipy.linalg import sqrtm
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from mmjax.evaluate import make_evaluator, reconstruction
from mmjax.evaluate.image_metrics import frechet_distance, psnr, ssim, to_unit
from mmjax.models.vqgan import VQGANOutput
from mmjax.params import split
from mmjax.quantizers import CodebookConfig, ResidualConfig


def pictures(count=3, height=17, width=24, seed=0):
    """Smooth ones and noisy copies of them, from 0 to 1."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(size=(count, 4, 4, 3)).astype(np.float32)
    images = np.asarray(jax.image.resize(coarse, (count, height, width, 3), "cubic")).clip(0, 1)
    made = images + 0.1 * rng.normal(size=images.shape).astype(np.float32)
    return images, made.clip(0, 1).astype(np.float32)


def test_psnr_and_ssim_equal_scikit_image():
    images, made = pictures()
    found = psnr(jnp.array(made), jnp.array(images), peak=1.0)
    alike = ssim(jnp.array(made), jnp.array(images), peak=1.0)
    for number, (one, other) in enumerate(zip(images, made, strict=True)):
        expected = peak_signal_noise_ratio(one, other, data_range=1.0)
        np.testing.assert_allclose(found[number], expected, rtol=1e-5)
        expected = structural_similarity(
            one,
            other,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1.0,
            channel_axis=-1,
        )
        np.testing.assert_allclose(alike[number], expected, atol=1e-5)
    same = jnp.array(images)
    np.testing.assert_allclose(ssim(same, same, peak=1.0), 1, rtol=1e-6)
    np.testing.assert_allclose(psnr(same, same, peak=1.0), 100, rtol=1e-6)
    with pytest.raises(ValueError, match="10 x 24 pixels have no window of 11"):
        ssim(same[:, :10], same[:, :10], peak=1.0)


@pytest.mark.parametrize("count", [50, 5], ids=["full rank", "few images"])
def test_frechet_distance_is_the_closed_formula(count):
    rng = np.random.default_rng(0)
    one = rng.normal(size=(count, 8)) @ rng.normal(size=(8, 8))
    other = rng.normal(size=(count + 3, 8)) + 0.5
    c, d = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    shared = np.trace(sqrtm(c @ d).real)
    expected = np.square(one.mean(0) - other.mean(0)).sum() + np.trace(c) + np.trace(d) - 2 * shared
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-6 * np.trace(c))
    with pytest.raises(ValueError, match="two features or more"):
        frechet_distance(one[:1], other)


def test_levels_of_normalised_images():
    mean, std = (0.5, 0.4, 0.3), (0.5, 0.25, 0.2)
    levels = pictures(1)[0]
    np.testing.assert_allclose(to_unit((levels - mean) / std, mean, std), levels, atol=1e-6)
    assert float(to_unit(jnp.full((1, 2, 2, 3), 9.0), mean, std).max()) == 1


# --- the evaluator


class Coarse(nnx.Module):
    """Codes are levels of the means of squares of four pixels; images are what they say."""

    def __init__(self, quantizer):
        self.config = SimpleNamespace(quantizer=quantizer)
        self.scale = nnx.Param(jnp.ones(()))

    def __call__(self, images):
        squares = images.reshape(len(images), 3, 4, 3, 4, 3).mean(axis=(2, 4))
        levels = self.config.quantizer.size
        codes = jnp.clip(jnp.round((squares.mean(-1) + 1) / 2 * (levels - 1)), 0, levels - 1)
        made = codes / (levels - 1) * 2 - 1
        made = jnp.repeat(jnp.repeat(made, 4, axis=1), 4, axis=2)[..., None] * self.scale[...]
        codes = codes.astype(jnp.int32)
        for _ in self.config.quantizer.shape:
            codes = jnp.stack([codes, jnp.zeros_like(codes)], axis=-1)
        return VQGANOutput(jnp.broadcast_to(made, images.shape), codes, jnp.float32(0))


class Model(nnx.Module):
    def __init__(self, quantizer):
        self.tokenizer = Coarse(quantizer)


def make_context(workdir, devices=1, quantizer=None):
    context, _ = fakes.make_context(workdir, devices=devices)
    graph, params = split(Model(quantizer or CodebookConfig(8, 2)))
    return dataclasses.replace(context, graphdef=graph), params


def examples(count=11):
    images = pictures(count, 12, 12, seed=2)[0]
    return images, fakes.data(range(count), images=2 * images - 1, texts=False, labels=False)


@pytest.mark.parametrize("devices", [1, 8])
def test_scores_are_those_of_each_image(tmp_path, devices, monkeypatch):
    """Features are the means of colours here; the last batch is padded."""
    embedder = SimpleNamespace(images=lambda x: np.stack([i.mean(axis=(0, 1)) for i in x]))
    monkeypatch.setattr(reconstruction, "open_embedder", lambda *_, **__: embedder)
    context, params = make_context(tmp_path, devices)
    images, data = examples()
    config = dict(name="reconstruction", data=data, encoder="DIR", sheet="it.png", title="Colours")
    evaluator = make_evaluator(config, context, "config.evals.it")
    scores = evaluator.run(params)
    found = Coarse(CodebookConfig(8, 2))(jnp.array(2 * images - 1))
    made = np.asarray(found.images) / 2 + 0.5
    pairs = list(zip(images, made, strict=True))
    expected = np.mean([peak_signal_noise_ratio(a, b, data_range=1.0) for a, b in pairs])
    assert scores["psnr"] == pytest.approx(expected, rel=1e-5)
    options = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0)
    expected = np.mean([structural_similarity(a, b, channel_axis=-1, **options) for a, b in pairs])
    assert scores["ssim"] == pytest.approx(expected, abs=1e-5)
    share = np.bincount(np.asarray(found.codes).ravel(), minlength=8) / found.codes.size
    assert scores["usage"] == np.mean(share > 0) < 1
    entropy = -sum(p * np.log(p) for p in share if p)
    assert scores["perplexity"] == pytest.approx(np.exp(entropy), rel=1e-5)
    levels = [np.round(255 * x).mean(axis=(1, 2)) for x in (made, images)]
    assert scores["frechet"] == pytest.approx(frechet_distance(*levels), rel=1e-3)
    assert scores["examples"] == 11
    said = evaluator.describe(scores)
    assert "Colours" in said and "Frechet distance, features of DIR" in said
    assert Image.open(tmp_path / "it.png").width > 500


def test_several_codes_of_a_place(tmp_path):
    """The second one is always 0."""
    config = dict(name="reconstruction", data=examples()[1])
    scores = {}
    for name, quantizer in (
        ("one", CodebookConfig(8, 2)),
        ("two", ResidualConfig(CodebookConfig(8, 2), depth=2)),
    ):
        context, params = make_context(tmp_path, quantizer=quantizer)
        scores[name] = make_evaluator(config, context, "config.evals.it").run(params)
    assert scores["two"]["usage"] == pytest.approx((scores["one"]["usage"] + 1 / 8) / 2)
    assert scores["two"]["perplexity"] == pytest.approx((scores["one"]["perplexity"] + 1) / 2)
    assert "frechet" not in scores["one"]
