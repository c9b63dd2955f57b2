"""What every connector promises: its budget, its masks, its cost and its errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from functional import QUICK
from small_connectors import SMALL

from mmjax import params
from mmjax.config import dataclass_from
from mmjax.connectors import (
    CONNECTORS,
    CAbstractorConfig,
    ConnectorConfig,
    ConnectorError,
    DAbstractorConfig,
    FramesConfig,
    IdentityConfig,
    LDPConfig,
    LDPv2Config,
    LinearConfig,
    MLPConfig,
    PerceiverConfig,
    PixelShuffleConfig,
    PoolingConfig,
    TokenPackerConfig,
    cost,
    make_connector,
)

WIDTH = 8


def shapes_of(config, grid, extra):
    """Of the tokens and their mask, of 3 images or clips; the dtype is that of the features."""
    graph, shapes = params.abstract(lambda: make_connector(config, WIDTH, WIDTH, rngs=nnx.Rngs(0)))
    length = config.frames * (extra + grid[0] * grid[1])
    features = jax.ShapeDtypeStruct((3, length, WIDTH), jnp.bfloat16)

    def run(values, features):
        return params.merge(graph, values)(features, None, grid)

    tokens, mask = jax.eval_shape(run, shapes, features)
    assert (tokens.dtype, mask.dtype) == (jnp.bfloat16, bool)
    return [tokens.shape, mask.shape]


@pytest.mark.parametrize("grid", [(4, 4), (2, 6), (8, 6)])
@pytest.mark.parametrize("name", CONNECTORS)
def test_the_budget_is_the_number_of_tokens(name, grid):
    config = SMALL[name]
    count = config.tokens(grid)
    assert shapes_of(config, grid, 0) == [(3, count, WIDTH), (3, count)]
    assert cost(config, WIDTH, WIDTH, grid).tokens == count


@pytest.mark.parametrize("name", CONNECTORS)
def test_a_class_token_is_taken_or_refused(name):
    config, grid = SMALL[name], (4, 4)
    try:
        count = config.tokens(grid, 1)
    except ConnectorError as error:
        assert "class_token=False" in str(error)
        with pytest.raises(ConnectorError, match="class_token=False"):
            shapes_of(config, grid, 1)
    else:
        assert shapes_of(config, grid, 1) == [(3, count, WIDTH), (3, count)]


@pytest.mark.parametrize("name", CONNECTORS)
def test_what_does_not_count_does_not_matter(name):
    """The right half of the first image does not count, of the second all does."""
    config, grid = SMALL[name], (4, 4)
    graph, values = params.split(make_connector(config, WIDTH, WIDTH, rngs=nnx.Rngs(0)))
    random = np.random.default_rng(0)
    features = random.normal(size=(2, config.frames * 16, WIDTH)).astype(np.float32)
    mask = np.ones((2, config.frames, 4, 4), bool)
    mask[0, :, :, 2:] = False
    mask = mask.reshape(2, -1)

    @jax.jit
    def run(values, features, mask):
        connector = params.merge(graph, values)
        return connector(features, mask, grid), connector(features, None, grid)

    run = run.lower(values, features, mask).compile(QUICK)
    (tokens, valid), (unmasked, all_valid) = run(values, features, mask)
    (others, _), _ = run(values, np.where(mask[:, :, None], features, 9.0), mask)
    valid = np.asarray(valid)
    assert valid[0].any() and valid[1].all() and np.asarray(all_valid).all()
    np.testing.assert_array_equal(np.asarray(tokens)[valid], np.asarray(others)[valid])
    np.testing.assert_allclose(tokens[1], unmasked[1], atol=1e-6)


def test_frames_are_read_one_by_one():
    """Each as the inner connector reads it alone, and a vector of its place."""
    config, grid = FramesConfig(3, PixelShuffleConfig(2)), (2, 4)
    connector = make_connector(config, WIDTH, WIDTH, rngs=nnx.Rngs(0))
    features = np.random.default_rng(0).normal(size=(2, 3 * 8, WIDTH)).astype(np.float32)
    mask = np.ones((2, 24), bool)
    mask[1, 8:12] = mask[1, 16:] = False
    features, mask = jnp.asarray(features), jnp.asarray(mask)
    tokens, valid = connector(features, mask, grid)
    for frame in range(3):
        own = slice(8 * frame, 8 * frame + 8)
        alone, counts = connector.each(features[:, own], mask[:, own], grid)
        here = slice(2 * frame, 2 * frame + 2)
        expected = alone + connector.position[frame]
        np.testing.assert_allclose(tokens[:, here], expected, atol=1e-6)
        np.testing.assert_array_equal(valid[:, here], counts)
    with pytest.raises(ConnectorError, match="reads 2 frames itself"):
        FramesConfig(3, SMALL["perceiver"])
    with pytest.raises(ConnectorError, match="23 features are not those of 3 frames"):
        connector(features[:, 1:], None, grid)


def test_cost_of_matrix_products():
    grid, inputs, outputs = (4, 6), 10, 14
    linear = cost(LinearConfig(), inputs, outputs, grid, extra=1)
    assert linear == (25, 10 * 14 + 14, 2 * 25 * 10 * 14)
    mlp = cost(MLPConfig(layers=3, hidden=20, bias=False), inputs, outputs, grid)
    weights = 10 * 20 + 20 * 20 + 20 * 14
    assert mlp == (24, weights, 2 * 24 * weights)
    # Averages over rows and over columns of a 4 x 4 grid are products as well.
    pooling = cost(PoolingConfig((2, 2)), inputs, outputs, (4, 4))
    averages = 2 * inputs * (2 * 4 * 4 + 2 * 2 * 4)
    assert pooling == (4, 10 * 14 + 14, averages + 2 * 4 * 10 * 14)
    assert cost(IdentityConfig(), inputs, inputs, grid) == (24, 0, 0)


def test_cost_of_the_published_sizes():
    """Sums of what the papers describe, for 24 x 24 features of CLIP's ViT-L."""
    grid, inputs = (24, 24), 1024
    # Two linear maps, and a 3 x 3 kernel and a bias for each channel.
    maps = inputs * 2048 + 2048 + 2048 * 2048 + 2048
    assert cost(LDPv2Config(), inputs, 2048, grid)[:2] == (144, maps + 10 * 2048)
    # Two blocks: kernels, two norms, a gate through a quarter of the channels, a map.
    block = 9 * 2048 + 4 * 2048 + (2 * 2048 * 512 + 512 + 2048) + 2048 * 2048
    assert cost(LDPConfig(), inputs, 2048, grid)[:2] == (144, maps + 2 * block)
    # Six blocks of four maps without biases, of 1,536, and MLPs four times as wide.
    block = 4 * 1536 * 1536 + 2 * 4 * 1536 * 1536 + 3 * 2 * 1536
    rest = 64 * 1536 + 2 * 1536
    perceiver = cost(PerceiverConfig(projection=None), 1536, 1536, grid)
    assert perceiver[:2] == (64, 6 * block + rest)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PoolingConfig((4, 3)).tokens((3, 8)), r"grid=\(3, 3\) is the nearest"),
        (lambda: CAbstractorConfig().tokens((16, 8)), r"grid=\(12, 8\) is the nearest"),
        (lambda: DAbstractorConfig().tokens((8, 8)), r"grid=\(8, 8\) is the nearest"),
        (lambda: LDPv2Config().tokens((6, 24)), r"grid=\(6, 12\) is the nearest"),
        (lambda: TokenPackerConfig(3).tokens((8, 8)), "factor=2 is the nearest"),
        (lambda: PoolingConfig((4, 0)), r"grid=\(4, 0\) must be 1 or more"),
        (lambda: PerceiverConfig(frames=0), "frames=0 must be 1 or more"),
        (lambda: build(IdentityConfig(), 8, 16), "8, but .* 16 wide: choose another"),
        (lambda: build(PerceiverConfig(projection=None), 8, 16), "give it a projection"),
        (lambda: build(TokenPackerConfig(levels=3), 8, 16), "8 wide are not those of levels=3"),
        (lambda: DAbstractorConfig(heads=3), "3 heads do not divide"),
        (lambda: TokenPackerConfig(width=12), "8 heads do not divide"),
    ],
)
def test_what_does_not_fit(make, message):
    with pytest.raises(ConnectorError, match=message):
        make()


def build(config, inputs, outputs):
    return params.abstract(lambda: make_connector(config, inputs, outputs, rngs=nnx.Rngs(0)))


def test_configs_by_name():
    group = {"name": "pooling", "grid": [4, 4], "projection": {"name": "mlp", "layers": 3}}
    config = dataclass_from(ConnectorConfig, group, "model.connector")
    assert config == PoolingConfig((4, 4), MLPConfig(layers=3))
    with pytest.raises(ValueError, match="did you mean 'perceiver'"):
        dataclass_from(ConnectorConfig, {"name": "perciever"}, "model.connector")
