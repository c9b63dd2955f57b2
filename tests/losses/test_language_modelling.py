"""The next-token loss beside PyTorch's cross entropy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.losses import next_token_loss

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch


def _case(seed=0, rows=3, length=9, width=5, vocab=11):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(rows, length, width)).astype(np.float32)
    kernel = rng.normal(size=(width, vocab)).astype(np.float32)
    tokens = rng.integers(0, vocab, (rows, length)).astype(np.int32)
    weights = (rng.random((rows, length)) < 0.4) * rng.choice([0.5, 1.0, 2.0], (rows, length))
    return hidden, kernel, tokens, weights.astype(np.float32)


def _reference(hidden, kernel, tokens, weights):
    logits = torch.from_numpy(hidden[:, :-1] @ kernel).flatten(0, 1)
    labels = torch.from_numpy(tokens[:, 1:]).flatten().long()
    each = torch.nn.functional.cross_entropy(logits, labels, reduction="none").numpy()
    right = (logits.argmax(-1) == labels).numpy()
    flat = weights[:, 1:].ravel()
    return (flat * each).sum(), flat.sum(), (flat * right).sum()


def _loss(hidden, kernel, tokens, weights, targets=None):
    arrays = map(jnp.asarray, (tokens, weights))
    return next_token_loss(jnp.asarray(hidden), lambda h: h @ kernel, *arrays, targets=targets)


@pytest.mark.parametrize("targets", [None, 7, 100])
def test_equals_pytorch(targets):
    hidden, kernel, tokens, weights = _case()
    found = _loss(hidden, kernel, tokens, weights, targets)
    np.testing.assert_allclose(found, _reference(hidden, kernel, tokens, weights), rtol=1e-5)


def test_gradients_do_not_depend_on_targets():
    hidden, kernel, tokens, weights = _case()

    def loss(hidden, kernel, targets):
        return _loss(hidden, kernel, tokens, weights, targets)[0]

    few = jax.grad(loss, (0, 1))(hidden, kernel, 7)
    every = jax.grad(loss, (0, 1))(hidden, kernel, None)
    for a, b in zip(few, every, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_more_supervised_tokens_than_targets_are_noticed():
    hidden, kernel, tokens, _ = _case()
    weights = np.ones(tokens.shape, np.float32)
    total, weight, _ = _loss(hidden, kernel, tokens, weights, 4)
    assert np.isnan(total) and np.isnan(weight)


def test_what_is_not_supervised_may_hold_anything():
    hidden, kernel, tokens, weights = _case()
    tokens = np.where(weights > 0, tokens, -1)
    total, *_ = _loss(hidden, kernel, tokens, weights)
    assert np.isfinite(total)
    weights[:, 3] = 1.0
    tokens[:, 3] = -1
    total, *_ = _loss(hidden, kernel, tokens, weights)
    assert np.isnan(total)
