"""Losses of reconstructions beside PyTorch's."""

import hf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import losses


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.torch
def test_errors_of_pixels():
    hf.transformers()
    import torch
    from torch.nn.functional import l1_loss, mse_loss

    made, images = draw(3, 5, 4, 3), draw(3, 5, 4, 3, seed=1)
    for ours, theirs in ((losses.absolute_error, l1_loss), (losses.squared_error, mse_loss)):
        expected = theirs(torch.tensor(made), torch.tensor(images), reduction="none")
        expected = expected.mean(dim=(1, 2, 3))
        np.testing.assert_allclose(ours(jnp.array(made), jnp.array(images)), expected, rtol=1e-5)


@pytest.mark.torch
def test_the_perceptual_distance():
    """Of unit vectors the squared distance is 2 - 2 cos."""
    hf.transformers()
    import torch
    from torch.nn.functional import cosine_similarity

    made, features = draw(2, 3, 7, 5), draw(2, 3, 7, 5, seed=1)
    cosine = cosine_similarity(torch.tensor(made), torch.tensor(features), dim=-1)
    expected = (2 - 2 * cosine).mean(dim=2).sum(dim=0)
    found = losses.perceptual_distance(jnp.array(made), jnp.array(features))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert (losses.perceptual_distance(jnp.array(made), jnp.array(made)) == 0).all()
    # Features of nothing are no reason for NaN.
    nothing = jnp.zeros((2, 3, 7, 5))
    slope = jax.grad(lambda x: losses.perceptual_distance(x, nothing).sum())(nothing)
    assert np.isfinite(slope).all()


@pytest.mark.torch
def test_hinges():
    hf.transformers()
    import torch
    from torch.nn.functional import hinge_embedding_loss

    scores = 2 * draw(4, 3, 3)
    theirs = torch.tensor(scores)
    # max(0, 1 - x) is theirs of target -1.
    for ours, sign in ((losses.hinge_real, 1), (losses.hinge_made, -1)):
        expected = hinge_embedding_loss(
            sign * theirs, -torch.ones_like(theirs), margin=1.0, reduction="none"
        )
        np.testing.assert_allclose(ours(jnp.array(scores)), expected.mean(dim=(1, 2)), rtol=1e-5)
    np.testing.assert_allclose(
        losses.hinge_generator(jnp.array(scores)), -scores.mean(axis=(1, 2)), rtol=1e-5
    )
