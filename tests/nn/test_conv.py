"""Convolutions and resampling of grids against PyTorch."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.nn.conv import DepthwiseConv
from mmjax.nn.resample import RESAMPLERS


@pytest.mark.torch
@pytest.mark.parametrize(("size", "stride", "bias"), [(3, 1, True), (3, 2, False), (5, 2, True)])
def test_depthwise_convolution(size, stride, bias):
    torch = pytest.importorskip("torch")
    reference = torch.nn.Conv2d(
        4, 4, size, stride, padding=size // 2, groups=4, bias=bias
    ).requires_grad_(False)
    layer = DepthwiseConv(4, size=size, stride=stride, bias=bias, rngs=nnx.Rngs(0))
    layer.kernel.set_value(jnp.asarray(reference.weight.numpy().transpose(2, 3, 1, 0)))
    if bias:
        layer.bias.set_value(jnp.asarray(reference.bias.numpy()))
    x = np.random.default_rng(0).normal(size=(2, 7, 6, 4)).astype(np.float32)
    expected = reference(torch.tensor(x).movedim(-1, 1)).movedim(1, -1)
    np.testing.assert_allclose(layer(jnp.asarray(x)), expected, atol=1e-6)


def test_an_even_kernel_is_an_error():
    with pytest.raises(ValueError, match="size=2 has no middle"):
        DepthwiseConv(4, size=2, rngs=nnx.Rngs(0))


@pytest.mark.torch
@pytest.mark.parametrize(("source", "target"), [(8, 4), (9, 3), (7, 5), (5, 7), (6, 1), (1, 3)])
def test_resampling_of_a_row(source, target):
    functional = pytest.importorskip("torch").nn.functional
    identity = pytest.importorskip("torch").eye(source)[:, None]
    expected = functional.adaptive_avg_pool1d(identity, target)[:, 0].T
    np.testing.assert_allclose(RESAMPLERS["average"](source, target), expected, atol=1e-6)
    expected = functional.interpolate(identity, target, mode="linear")[:, 0].T
    np.testing.assert_allclose(RESAMPLERS["bilinear"](source, target), expected, atol=1e-6)
