"""Cross entropy against PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.losses import softmax_cross_entropy


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    return rng.normal(size=(6, 5)).astype(np.float32) * 10, rng.integers(0, 5, 6)


@pytest.mark.torch
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_equals_torch(data, smoothing):
    torch = pytest.importorskip("torch")
    logits, labels = data
    numerator, denominator = softmax_cross_entropy(
        jnp.asarray(logits), jnp.asarray(labels), label_smoothing=smoothing
    )
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(logits), torch.tensor(labels), label_smoothing=smoothing
    )
    np.testing.assert_allclose(numerator / denominator, expected.numpy(), rtol=1e-6)


def test_masked_rows_do_not_count_and_have_no_gradient(data):
    logits, labels = jnp.asarray(data[0]), jnp.asarray(data[1])
    mask = jnp.array([True, True, False, True, False, False])
    labels = jnp.where(mask, labels, -1)  # padding need not hold a class

    def numerator(logits):
        return softmax_cross_entropy(logits, labels, mask=mask)[0]

    expected = softmax_cross_entropy(logits[mask], labels[mask])
    np.testing.assert_allclose(numerator(logits), expected[0], rtol=1e-6)
    assert softmax_cross_entropy(logits, labels, mask=mask)[1] == 3
    gradient = jax.grad(numerator)(logits)
    assert np.all(gradient[~mask] == 0) and np.isfinite(gradient).all()


@pytest.mark.parametrize("label", [-1, 5])
def test_labels_out_of_range_are_not_learnt_from(data, label):
    logits = jnp.asarray(data[0])
    numerator, _ = softmax_cross_entropy(logits, jnp.full(6, label))
    assert np.isnan(numerator)


def test_bad_smoothing(data):
    with pytest.raises(ValueError, match="label_smoothing"):
        softmax_cross_entropy(jnp.asarray(data[0]), jnp.asarray(data[1]), label_smoothing=1.0)
