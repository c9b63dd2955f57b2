"""The discriminator of patches beside the same layers of PyTorch."""

import hf
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from functional import jitted, random_values

from mmjax.models.discriminator import Discriminator, DiscriminatorConfig
from mmjax.params import merge, split


@pytest.mark.torch
def test_it_is_patchgan():
    """Isola et al. (2017), appendix 6.1.2, with group norms."""
    hf.transformers()
    import torch
    from torch import nn

    config = DiscriminatorConfig(width=8, halvings=3, groups=4)
    graph, params = split(Discriminator(config, rngs=nnx.Rngs(0)))
    params = random_values(params)
    layers, inputs = [], 3
    for number, (width, stride) in enumerate([(8, 2), (16, 2), (32, 2), (64, 1), (1, 1)]):
        last = number == 4
        conv = nn.Conv2d(inputs, width, 4, stride, padding=1)
        name = "last" if last else f"convs/{number}"
        with torch.no_grad():
            kernel = torch.tensor(params[f"{name}/kernel"]).permute(3, 2, 0, 1)
            conv.weight.copy_(kernel)
            conv.bias.copy_(torch.tensor(params[f"{name}/bias"]))
        layers.append(conv)
        if 0 < number < 4:
            norm = nn.GroupNorm(4, width, eps=1e-6)
            with torch.no_grad():
                norm.weight.copy_(torch.tensor(params[f"norms/{number - 1}/scale"]))
                norm.bias.copy_(torch.tensor(params[f"norms/{number - 1}/bias"]))
            layers.append(norm)
        layers += [] if last else [nn.LeakyReLU(0.2)]
        inputs = width
    images = np.random.default_rng(0).normal(size=(2, 48, 32, 3)).astype(np.float32)
    with torch.no_grad():
        expected = nn.Sequential(*layers)(torch.tensor(images).permute(0, 3, 1, 2))[:, 0]
    found = jitted(merge(graph, params))(jnp.array(images))
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_what_cannot_be_is_said():
    with pytest.raises(ValueError, match="halvings=0 must be 1 or more"):
        DiscriminatorConfig(halvings=0)
    with pytest.raises(ValueError, match="width=20 does not make 8 groups"):
        DiscriminatorConfig(width=20)
