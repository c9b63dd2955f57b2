"""Codebooks of moving averages beside vector-quantize-pytorch, update by update."""

import hf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx
from sklearn.cluster import KMeans

from mmjax.quantizers import (
    CodebookConfig,
    EMACodebookConfig,
    FSQConfig,
    ResidualConfig,
    counts,
    make_quantizer,
    perplexity,
    usage,
)
from mmjax.quantizers.ema import k_means

KEY = jax.random.key(0)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def make(config, seed=1):
    """With codes that are far from each other."""
    quantizer = make_quantizer(config, rngs=nnx.Rngs(0))
    for number, part in enumerate(getattr(quantizer, "each", [quantizer])):
        table = draw(part.config.size, part.config.width, seed=seed + number)
        table = unit(table) if part.config.unit else table
        part.embedding[...] = part.total[...] = jnp.asarray(table)
    return quantizer


def step(quantizer, x, key=KEY):
    """What it finds, after which it learns from it."""
    found = quantizer(jnp.asarray(x))
    values = quantizer.update(found.statistics, key)
    assert set(values) == set(quantizer.learnt)
    for path, value in values.items():
        *parents, name = path.split("/")
        part = quantizer
        for parent in parents:
            part = part[int(parent)] if parent.isdigit() else getattr(part, parent)
        old = getattr(part, name)
        assert old[...].shape == value.shape and old[...].dtype == value.dtype
        old[...] = value
    return found


def reference(cls, parts, **options):
    """A quantiser of vector-quantize-pytorch with the codes of ours."""
    hf.transformers()
    import torch
    import vector_quantize_pytorch

    made = getattr(vector_quantize_pytorch, cls)(rotation_trick=False, **options)
    theirs = [layer._codebook for layer in getattr(made, "layers", [made])]
    for codebook, part in zip(theirs, parts, strict=True):
        with torch.no_grad():
            for buffer in (codebook.embed, codebook.embed_avg):
                buffer.copy_(torch.tensor(np.asarray(part.embedding[...]))[None])
    return made.train(), theirs


def agrees(part, codebook, atol=1e-5):
    for ours, theirs in (
        (part.embedding, codebook.embed),
        (part.count, codebook.cluster_size),
        (part.total, codebook.embed_avg),
    ):
        np.testing.assert_allclose(ours[...], theirs[0], atol=atol)


@pytest.mark.torch
@pytest.mark.parametrize("cosine", [False, True])
def test_updates(cosine):
    compare = "cosine" if cosine else "distance"
    config = EMACodebookConfig(
        13, 6, compare=compare, unit=cosine, commitment=0.4, decay=0.8, eps=1e-2
    )
    quantizer = make(config)
    theirs, (codebook,) = reference(
        "VectorQuantize",
        [quantizer],
        dim=6,
        codebook_size=13,
        use_cosine_sim=cosine,
        decay=0.8,
        eps=1e-2,
        commitment_weight=0.4,
    )
    import torch

    for seed in range(5):
        x = draw(3, 20, 6, seed=10 + seed)
        vectors, codes, loss = theirs(torch.tensor(x))
        found = step(quantizer, x)
        np.testing.assert_array_equal(found.codes, codes)
        np.testing.assert_allclose(found.vectors, vectors, atol=1e-5)
        np.testing.assert_allclose(found.loss, loss.detach(), rtol=1e-5)
        agrees(quantizer, codebook)
    assert np.ptp(quantizer.count[...]) > 1


@pytest.mark.torch
def test_each_of_several_learns_from_what_is_left_to_it():
    config = ResidualConfig(EMACodebookConfig(7, 4, decay=0.7), depth=3)
    quantizer = make(config)
    theirs, codebooks = reference(
        "ResidualVQ", quantizer.each, dim=4, num_quantizers=3, codebook_size=7, decay=0.7
    )
    import torch

    for seed in range(4):
        x = draw(2, 30, 4, seed=10 + seed)
        _, codes, _ = theirs(torch.tensor(x))
        np.testing.assert_array_equal(step(quantizer, x).codes, codes)
        for part, codebook in zip(quantizer.each, codebooks, strict=True):
            agrees(part, codebook)


@pytest.mark.torch
@pytest.mark.parametrize("cosine", [False, True])
def test_k_means(cosine):
    hf.transformers()
    import torch
    from vector_quantize_pytorch.vector_quantize_pytorch import kmeans

    x = unit(draw(200, 5)) if cosine else draw(200, 5)
    # The last two are nobody's nearest.
    far = np.full((2, 5), 50.0, np.float32)
    start = x[:11] if cosine else np.concatenate([x[:9], far])
    means, bins = kmeans(
        torch.tensor(x)[None],
        11,
        6,
        use_cosine_sim=cosine,
        sample_fn=lambda *_: torch.tensor(start)[None],
    )
    compare = "cosine" if cosine else "distance"
    ours, count = k_means(jnp.asarray(x), jnp.asarray(start), 6, compare=compare, scaled=cosine)
    np.testing.assert_allclose(ours, means[0], atol=1e-5)
    np.testing.assert_array_equal(count, bins[0])
    assert cosine or (count[-2:] == 0).all()


@pytest.mark.parametrize("depth", [None, 3])
def test_the_first_batch_makes_the_codes(depth):
    """At once those of k-means, of scikit-learn's error, each of what the one before leaves; later
    batches only move them."""
    each = EMACodebookConfig(16, 4, kmeans=20, decay=0.9)
    config = each if depth is None else ResidualConfig(each, depth)
    quantizer = make_quantizer(config, rngs=nnx.Rngs(0))
    x = draw(400, 4)
    left = x
    for number in range(depth or 1):
        theirs = KMeans(16, n_init=1, random_state=number).fit(left)
        left = left - theirs.cluster_centers_[theirs.labels_]

    def table():
        return np.asarray(getattr(quantizer, "each", [quantizer])[-1].embedding[...])

    step(quantizer, x)
    first = table()
    found = step(quantizer, x)
    error, expected = np.mean(np.square(found.vectors - x)), np.mean(np.square(left))
    np.testing.assert_allclose(error, expected, rtol=0.1)
    assert 0 < np.abs(table() - first).max() < 0.2 * np.abs(first).max()


def test_k_means_needs_vectors_enough():
    quantizer = make_quantizer(EMACodebookConfig(16, 4, kmeans=1), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="16 codes of the 15 vectors of a batch"):
        step(quantizer, draw(15, 4))


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("vectors", [40, 3])
def test_dead_codes_are_replaced_by_vectors_of_the_batch(vectors, cosine):
    compare = "cosine" if cosine else "distance"
    options = dict(compare=compare, unit=cosine, decay=0.5)
    plain, reviving = (
        make(EMACodebookConfig(12, 4, **options, revive=revive)) for revive in (0.0, 2.0)
    )
    x = draw(vectors, 4)
    step(plain, x)
    step(reviving, x)
    dead = np.flatnonzero(np.asarray(plain.count[...]) < 2.0)
    assert len(dead) > 3
    replaced = dead[:vectors]  # there may be fewer vectors than dead codes
    kept = np.setdiff1d(np.arange(12), replaced)
    for name in ("embedding", "count", "total"):
        one, other = getattr(plain, name)[...], getattr(reviving, name)[...]
        np.testing.assert_array_equal(one[kept], other[kept])
    fresh = np.asarray(reviving.embedding[...])[replaced]
    given = unit(x) if cosine else x
    rows = np.argmin(np.abs(fresh[:, None] - given[None]).sum(-1), axis=1)
    np.testing.assert_allclose(fresh, given[rows], atol=1e-6)
    assert len(set(rows)) == len(rows)
    np.testing.assert_allclose(reviving.count[...][replaced], 2.0)
    np.testing.assert_allclose(reviving.total[...][replaced], 2.0 * fresh, rtol=1e-6)


def test_which_vectors_replace_them_is_up_to_the_key():
    config, x = EMACodebookConfig(12, 4, revive=2.0), draw(40, 4)

    def table(key):
        quantizer = make(config)
        step(quantizer, x, key)
        return np.asarray(quantizer.embedding[...])

    np.testing.assert_array_equal(table(KEY), table(KEY))
    assert not np.array_equal(table(KEY), table(jax.random.key(1)))


def test_gradients_never_reach_the_codes():
    for config in (EMACodebookConfig(13, 6), EMACodebookConfig(13, 6, through="rotation")):
        graph, state = nnx.split(make(config))
        x = jnp.asarray(draw(40, 6))

        def loss(state, x, graph=graph):
            found = nnx.merge(graph, state)(x)
            return found.loss + jnp.sum(jnp.square(found.vectors))

        to_codes, to_x = jax.grad(loss, (0, 1))(state, x)
        assert all(not leaf.any() for leaf in jax.tree.leaves(to_codes))
        assert to_x.any()


def test_those_without_learn_nothing():
    for config in (
        CodebookConfig(5, 3),
        FSQConfig((3, 3, 3)),
        ResidualConfig(CodebookConfig(5, 3), 2),
    ):
        quantizer = make_quantizer(config, rngs=nnx.Rngs(0))
        found = quantizer(jnp.asarray(draw(4, 3)))
        assert found.statistics == () == quantizer.learnt
        assert quantizer.update(found.statistics, KEY) == {}


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(decay=1.0), "decay=1.0 must be at least 0 and below 1"),
        (dict(eps=0.0), "eps=0.0 must be above 0"),
        (dict(revive=-1.0), "revive=-1.0, kmeans=0: neither is below 0"),
        (dict(compare="angle"), "compare='angle'"),
    ],
)
def test_what_cannot_be_is_said(options, message):
    with pytest.raises(ValueError, match=message):
        EMACodebookConfig(3, 3, **options)


def test_usage_and_perplexity():
    codes = np.random.default_rng(0).zipf(1.6, size=(4, 5, 6)) % 30
    seen = counts(jnp.asarray(codes), CodebookConfig(30, 2))
    expected = np.bincount(codes.ravel(), minlength=30)
    np.testing.assert_array_equal(seen, expected)
    np.testing.assert_allclose(perplexity(seen), np.exp(scipy.stats.entropy(expected)), rtol=1e-5)
    np.testing.assert_allclose(usage(seen), len(np.unique(codes)) / 30, rtol=1e-6)
    assert usage(seen) < 1
    several = counts(jnp.asarray(codes), ResidualConfig(CodebookConfig(30, 2), 6))
    for depth in range(6):
        np.testing.assert_array_equal(
            several[depth], np.bincount(codes[..., depth].ravel(), None, 30)
        )
    assert perplexity(several).shape == usage(several).shape == (6,)
    np.testing.assert_array_equal(perplexity(jnp.asarray([7.0, 0, 0])), 1)
    np.testing.assert_allclose(perplexity(jnp.full(9, 3.0)), 9, rtol=1e-6)
