"""Quantisers: codes and vectors, gradients and losses, beside vector-quantize-pytorch."""

import hf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.config import ConfigError, dataclass_from
from mmjax.quantizers import (
    QUANTIZERS,
    CodebookConfig,
    FSQConfig,
    LFQConfig,
    QuantizerConfig,
    ResidualConfig,
    make_quantizer,
)

CONFIGS = {
    "codebook": CodebookConfig(13, 6),
    "cosine": CodebookConfig(13, 6, compare="cosine", unit=True, through="rotation"),
    "fsq": FSQConfig((5, 4, 3)),
    "lfq": LFQConfig(5),
    "residual": ResidualConfig(CodebookConfig(7, 4), depth=3),
}


def make(config):
    """With codes that are far from each other."""
    quantizer = make_quantizer(config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    parts = quantizer.each if isinstance(config, ResidualConfig) else [quantizer]
    for number, part in enumerate(parts):
        if hasattr(part, "embedding"):
            values = rng.normal(size=part.embedding.shape) * 0.5**number
            part.embedding[...] = jnp.asarray(values, jnp.float32)
    return quantizer


def draw(config, *shape, seed=0):
    values = np.random.default_rng(seed).normal(size=(*shape, config.width))
    return jnp.asarray(values, jnp.float32)


@pytest.mark.parametrize("name", CONFIGS)
def test_codes_have_the_vectors_that_were_found(name):
    config = CONFIGS[name]
    quantizer, x = make(config), draw(config, 2, 3, 5)
    found = quantizer(x)
    assert found.codes.shape == (2, 3, 5, *config.shape) and found.codes.dtype == jnp.int32
    assert (found.codes >= 0).all() and (found.codes < config.size).all()
    np.testing.assert_array_equal(quantizer.codes(x), found.codes)
    np.testing.assert_allclose(quantizer.vectors(found.codes), found.vectors, atol=1e-6)
    assert found.loss.shape == () and np.isfinite(found.loss)
    half = quantizer(x.astype(jnp.bfloat16))
    assert half.vectors.dtype == jnp.bfloat16 and half.loss.dtype == jnp.float32


@pytest.mark.parametrize("name", ["codebook", "fsq", "lfq"])
def test_every_code_is_its_own(name):
    config = CONFIGS[name]
    quantizer = make(config)
    every = jnp.arange(config.size)
    vectors = quantizer.vectors(every)
    assert len(np.unique(np.asarray(vectors), axis=0)) == config.size
    if name != "fsq":  # whose given numbers go through tanh first
        np.testing.assert_array_equal(quantizer.codes(vectors), every)


def test_registered_by_their_names():
    for config in CONFIGS.values():
        fields = {"name": config.name} | {
            key: value for key, value in vars(config).items() if key not in ("name", "each")
        }
        if isinstance(config, ResidualConfig):
            fields["each"] = dict(name="codebook", size=7, width=4)
        assert dataclass_from(QuantizerConfig, fields, "quantizer") == config
        assert config.name in QUANTIZERS
    with pytest.raises(ConfigError, match="codebook"):
        dataclass_from(QuantizerConfig, dict(name="codebok"), "quantizer")


@pytest.mark.parametrize(
    "make_config, message",
    [
        (lambda: CodebookConfig(0, 3), "size=0, width=3: both must be 1 or more"),
        (lambda: CodebookConfig(3, 3, compare="angle"), "compare='angle'"),
        (lambda: CodebookConfig(3, 3, through="noise"), "through='noise'"),
        (lambda: FSQConfig((8, 2)), "each 3 or more"),
        (lambda: FSQConfig(()), "give one or more"),
        (lambda: LFQConfig(19), "bits=19 must be in 1 to 18"),
        (lambda: LFQConfig(3, temperature=0.0), "temperature=0.0 must be above 0"),
        (lambda: ResidualConfig(CodebookConfig(3, 3), 0), "depth=0 must be 1 or more"),
        (lambda: ResidualConfig(CodebookConfig(3, 3, unit=True), 2), "set unit=False"),
    ],
)
def test_what_cannot_be_is_said(make_config, message):
    with pytest.raises(ValueError, match=message):
        make_config()


# --- beside vector-quantize-pytorch


def tensor(x):
    import torch

    return torch.tensor(np.asarray(x), requires_grad=True)


def weighed(quantizer, x, weights):
    """The gradient of the weighted sum of the vectors."""
    return jax.grad(lambda x: jnp.sum(quantizer(x).vectors * weights))(x)


@pytest.mark.torch
@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (3,), (4, 6)])
def test_fsq(levels):
    hf.transformers()
    from vector_quantize_pytorch import FSQ

    config = FSQConfig(levels)
    quantizer, x, weights = make(config), 2 * draw(config, 4, 50), draw(config, 4, 50, seed=1)
    reference, theirs = FSQ(list(levels)), tensor(x)
    vectors, codes = reference(theirs)
    found = quantizer(x)
    np.testing.assert_array_equal(found.codes, codes)
    np.testing.assert_allclose(found.vectors, vectors.detach(), atol=1e-6)
    (vectors * tensor(weights).detach()).sum().backward()
    np.testing.assert_allclose(weighed(quantizer, x, weights), theirs.grad, atol=1e-5)
    every = jnp.arange(config.size)
    expected = reference.indices_to_codes(tensor(every.astype(jnp.float32)).long())
    np.testing.assert_allclose(quantizer.vectors(every), expected, atol=1e-6)


@pytest.mark.torch
@pytest.mark.parametrize("bits", [1, 6])
def test_lfq(bits):
    hf.transformers()
    from vector_quantize_pytorch import LFQ

    # So warm that no probability is below 1e-5, where theirs stop.
    config = LFQConfig(bits, entropy=0.3, diversity=0.7, temperature=4.0, commitment=0.2)
    quantizer, x, weights = make(config), draw(config, 4, 50), draw(config, 4, 50, seed=1)
    reference = LFQ(
        dim=bits, entropy_loss_weight=0.3, diversity_gamma=0.7, commitment_loss_weight=0.2
    )
    theirs = tensor(x)
    vectors, codes, loss = reference(theirs, inv_temperature=0.25)
    found = quantizer(x)
    np.testing.assert_array_equal(found.codes, codes)
    np.testing.assert_array_equal(found.vectors, vectors.detach())
    np.testing.assert_allclose(found.loss, loss.detach(), rtol=1e-5)
    ((vectors * tensor(weights).detach()).sum() + loss).backward()

    def both(x):
        found = quantizer(x)
        return jnp.sum(found.vectors * weights) + found.loss

    np.testing.assert_allclose(jax.grad(both)(x), theirs.grad, atol=1e-5)


def test_lfq_has_gradients_where_codes_are_far_from_all_vectors():
    quantizer = make_quantizer(LFQConfig(9), rngs=nnx.Rngs(0))
    vectors = jnp.array(np.random.default_rng(0).normal(size=(20, 9)), jnp.float32)
    gradient = jax.grad(lambda x: quantizer(x).loss)(vectors)
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0


@pytest.mark.torch
@pytest.mark.parametrize("cosine", [False, True])
def test_codebook_with_the_rotation_trick(cosine):
    hf.transformers()
    import torch
    from vector_quantize_pytorch import VectorQuantize

    compare = "cosine" if cosine else "distance"
    config = CodebookConfig(13, 6, compare=compare, unit=cosine, through="rotation")
    quantizer, x, weights = make(config), draw(config, 4, 50), draw(config, 4, 50, seed=1)
    reference = VectorQuantize(
        dim=6, codebook_size=13, use_cosine_sim=cosine, rotation_trick=True, commitment_weight=1.0
    )
    table = np.asarray(quantizer.vectors(jnp.arange(13)))
    with torch.no_grad():
        reference._codebook.embed.copy_(torch.tensor(table)[None])
    reference.eval()
    _, codes, _ = reference(tensor(x))
    np.testing.assert_array_equal(quantizer.codes(x), codes)
    reference.train()  # only then do gradients pass; the codebook moves after it has been used
    theirs = tensor(x)
    vectors, _, _ = reference(theirs)
    (vectors * tensor(weights).detach()).sum().backward()
    np.testing.assert_allclose(quantizer(x).vectors, vectors.detach(), atol=1e-5)
    np.testing.assert_allclose(weighed(quantizer, x, weights), theirs.grad, atol=1e-5)


@pytest.mark.torch
def test_residual():
    hf.transformers()
    import torch
    from vector_quantize_pytorch import ResidualVQ

    config = CONFIGS["residual"]
    quantizer, x = make(config), draw(config, 4, 50)
    reference = ResidualVQ(dim=4, num_quantizers=3, codebook_size=7).eval()
    for layer, each in zip(reference.layers, quantizer.each, strict=True):
        with torch.no_grad():
            layer._codebook.embed.copy_(torch.tensor(np.asarray(each.embedding[...]))[None])
    vectors, codes, _ = reference(tensor(x))
    found = quantizer(x)
    np.testing.assert_array_equal(found.codes, codes)
    np.testing.assert_allclose(found.vectors, vectors.detach(), atol=1e-5)


def test_losses_draw_codes_to_vectors_and_vectors_to_codes():
    """The gradients of the two terms, each as its formula says (van den Oord et al., eq. 3)."""
    config = CONFIGS["codebook"]
    quantizer, x = make(config), draw(config, 40)
    codes = np.asarray(quantizer.codes(x))
    away = np.asarray(x) - np.asarray(quantizer.vectors(codes))
    graph, state = nnx.split(quantizer)

    def loss(state, x):
        return nnx.merge(graph, state)(x).loss

    to_table, to_x = jax.grad(loss, (0, 1))(state, x)
    np.testing.assert_allclose(to_x, 0.25 * 2 * away / away.size, atol=1e-7)
    expected = np.zeros((13, 6))
    np.add.at(expected, codes, -2 * away / away.size)
    np.testing.assert_allclose(to_table.embedding[...], expected, atol=1e-6)
    through = jax.grad(lambda x: jnp.sum(quantizer(x).vectors))(x)
    np.testing.assert_array_equal(through, np.ones_like(through))
