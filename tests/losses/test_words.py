"""The loss of a caption's words against the formula of SuperClass, in PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.losses import word_loss

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

VOCABULARY = 12


def superclass(logits, captions):
    """Sums over the words of loss and weight: targets with a weight for each word of a caption,
    its inverse document frequency."""
    weights = torch.zeros(len(captions), VOCABULARY)
    for row, caption in enumerate(captions):
        for word in caption:
            having = sum(word in other for other in captions)
            weights[row, word] = np.log(len(captions) / having)
    loss = -torch.log_softmax(torch.tensor(logits), dim=-1) * weights
    return float(loss.sum()), float(weights.sum())


def test_as_superclass():
    rng = np.random.default_rng(0)
    # The word 0 ends every caption, 1 is in two, others in one.
    captions = [[3, 1, 0], [4, 5, 6, 0], [1, 7, 0]]
    logits = rng.normal(size=(3, VOCABULARY)).astype(np.float32)
    # Two rows: [picture, caption, picture, caption] and [picture, caption, text of no picture].
    tokens = np.zeros((2, 12), np.int32)
    weights = np.zeros((2, 12), np.float32)
    image = np.full((2, 12), -1, np.int32)
    for row, start, number, caption in ((0, 1, 0, 0), (0, 5, 1, 1), (1, 1, 0, 2)):
        there = slice(start, start + len(captions[caption]))
        tokens[row, there], weights[row, there], image[row, there] = captions[caption], 1, number
    tokens[1, 6:9], weights[1, 6:9] = [3, 4, 9], 1
    tokens[0, 10:], weights[0, 10:] = -100, 0
    shares = np.full((2, 2, VOCABULARY), -99, np.float32)  # the second row has one picture only
    shares[0], shares[1, 0] = logits[:2], logits[2]
    shares = jax.nn.log_softmax(jnp.asarray(shares))
    found = word_loss(shares, *map(jnp.asarray, (tokens, weights, image)))
    np.testing.assert_allclose(found, superclass(logits, captions), rtol=1e-5)
    # In one caption alone every word is in all of them.
    nothing = word_loss(shares[1:], *(jnp.asarray(x[1:]) for x in (tokens, weights, image)))
    assert nothing == (0.0, 0.0)
