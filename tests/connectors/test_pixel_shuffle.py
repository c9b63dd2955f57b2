"""The pixel-shuffle connector beside those of Idefics3 and InternVL."""

import hf
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.config import dataclass_from
from mmjax.connectors import (
    ConnectorConfig,
    ConnectorError,
    MLPConfig,
    PixelShuffleConfig,
    cost,
    make_connector,
)

WIDTH, OUTPUTS = 5, 6


def compare(reference, table, config, grid):
    """`reference`: [2, h * w, D] torch features -> tokens, with the weights that `table` names."""
    import torch

    connector = make_connector(config, WIDTH, OUTPUTS, rngs=nnx.Rngs(0))
    hf.load(reference[0], table, connector)
    features = np.random.default_rng(0).normal(size=(2, grid[0] * grid[1], WIDTH))
    features = features.astype(np.float32)
    with torch.no_grad():
        expected = reference[1](torch.tensor(features)).numpy()
    tokens, mask = connector(jnp.asarray(features), None, grid)
    np.testing.assert_allclose(tokens, expected.reshape(tokens.shape), atol=1e-5)
    assert mask.shape == tokens.shape[:2] and bool(mask.all())
    found = cost(config, WIDTH, OUTPUTS, grid)
    assert found.tokens == tokens.shape[1]
    assert found.parameters == sum(p.numel() for p in reference[0].parameters())


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_idefics3(factor):
    models = hf.transformers().models.idefics3
    config = hf.transformers().Idefics3Config(
        vision_config={"hidden_size": WIDTH},
        text_config={"hidden_size": OUTPUTS, "num_attention_heads": 1},
        scale_factor=factor,
    )
    reference = hf.randomise(models.modeling_idefics3.Idefics3Connector(config))
    table = {"modality_projection.proj": "projection/projection"}
    compare((reference, reference), table, PixelShuffleConfig(factor), (6, 6))


def test_internvl():
    modeling = hf.transformers().models.internvl.modeling_internvl
    config = hf.transformers().InternVLConfig(
        vision_config={"hidden_size": WIDTH}, text_config={"hidden_size": OUTPUTS}
    )
    projector = hf.randomise(modeling.InternVLMultiModalProjector(config))

    def reference(features):
        shuffled = modeling.InternVLModel.pixel_shuffle(None, features.view(2, 4, 6, WIDTH))
        return projector(shuffled)

    table = {
        "layer_norm": "norm",
        "linear_1": "projection/linears/0",
        "linear_2": "projection/linears/1",
    }
    compare((projector, reference), table, PixelShuffleConfig(2, MLPConfig(), norm=True), (4, 6))


def test_features_that_do_not_count():
    config = PixelShuffleConfig(2)
    connector = make_connector(config, WIDTH, OUTPUTS, rngs=nnx.Rngs(0))
    features = np.random.default_rng(0).normal(size=(1, 16, WIDTH)).astype(np.float32)
    valid = np.ones((1, 4, 4), bool)
    valid[:, 3], valid[:, :, 2:] = False, False  # half of the lower squares, all of the right ones
    valid = jnp.asarray(valid.reshape(1, 16))
    tokens, mask = connector(jnp.asarray(features), valid, (4, 4))
    np.testing.assert_array_equal(mask, [[True, False, True, False]])
    features[~np.asarray(valid)] = 1e6
    again, _ = connector(jnp.asarray(features), valid, (4, 4))
    np.testing.assert_array_equal(again, tokens)


def test_config_group():
    group = {"name": "pixel_shuffle", "factor": 4, "projection": {"name": "mlp", "layers": 3}}
    config = dataclass_from(ConnectorConfig, group, "model.connector")
    assert config == PixelShuffleConfig(4, MLPConfig(3))


@pytest.mark.parametrize(
    ("factor", "grid", "extra", "message"),
    [
        (3, (4, 4), 0, "factor=2 is the nearest"),
        (4, (6, 9), 0, "factor=3 is the nearest"),
        (2, (4, 4), 1, "class_token=False"),
    ],
)
def test_what_does_not_fit(factor, grid, extra, message):
    with pytest.raises(ConnectorError, match=message):
        PixelShuffleConfig(factor).tokens(grid, extra)


def test_features_of_another_grid():
    connector = make_connector(PixelShuffleConfig(2), WIDTH, OUTPUTS, rngs=nnx.Rngs(0))
    with pytest.raises(ConnectorError, match="4 x 4 = 16"):
        connector(jnp.zeros((1, 17, WIDTH)), None, (4, 4))
    with pytest.raises(ConnectorError, match="factor=0 must be 1 or more"):
        PixelShuffleConfig(0)
