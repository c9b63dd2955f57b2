"""What every connector promises: its budget, its masks, its cost and its errors."""

import dataclasses

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
    AlignConfig,
    BoardConfig,
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
    config = dataclasses.replace(config, norm="layernorm")
    normed, _ = make_connector(config, WIDTH, WIDTH, rngs=nnx.Rngs(0))(features, mask, grid)
    centred = tokens - tokens.mean(axis=-1, keepdims=True)
    size = jnp.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(normed, centred / size, atol=1e-5)
    with pytest.raises(ConnectorError, match="reads 2 frames itself"):
        FramesConfig(3, SMALL["perceiver"])
    with pytest.raises(ConnectorError, match="23 features are not those of 3 frames"):
        connector(features[:, 1:], None, grid)


def on_board(tiles, rows, columns, grid):
    """The features (or masks) of tiles [tiles * h * w, ...] as they lie on the board, each place
    taken from its tile."""
    height, width = grid
    tiles = tiles.reshape(rows * columns, height, width, *tiles.shape[1:])
    return np.array(
        [
            tiles[y // height * columns + x // width, y % height, x % width]
            for y in range(rows * height)
            for x in range(columns * width)
        ]
    )


def places(rows, columns, width):
    """sin x, cos x, sin y, cos y, at rates from 1 down to 1/10000."""
    rates = np.geomspace(1, 1e-4, width // 4)
    return np.array(
        [
            [f(at * rate) for at in (x, y) for f in (np.sin, np.cos) for rate in rates]
            for y in range(rows)
            for x in range(columns)
        ],
        np.float32,
    )


@pytest.mark.parametrize(
    "whole", [PoolingConfig((2, 3)), PerceiverConfig(latents=4, depth=1, heads=2, head_dim=8)]
)
def test_a_board_is_one_grid(whole):
    """Tiles laid side by side one by one: `whole` reads them as the features of one image."""
    config, grid = BoardConfig(2, 3, whole), (3, 2)
    board = make_connector(config, WIDTH, 12, rngs=nnx.Rngs(0))
    random = np.random.default_rng(0)
    tiles = random.normal(size=(2, 6 * 6, WIDTH)).astype(np.float32)
    mask = random.random((2, 6 * 6)) < 0.3
    laid = np.stack([on_board(image, 2, 3, grid) for image in tiles]) + places(6, 6, WIDTH)
    counts = np.stack([on_board(image, 2, 3, grid) for image in mask])
    for given, expected in ((None, None), (jnp.asarray(mask), jnp.asarray(counts))):
        tokens, valid = board(jnp.asarray(tiles), given, grid)
        alone, alone_valid = board.whole(jnp.asarray(laid), expected, (6, 6))
        np.testing.assert_allclose(tokens, alone, atol=1e-5)
        np.testing.assert_array_equal(valid, alone_valid)
        assert config.tokens(grid) == whole.tokens((6, 6)) == tokens.shape[1]
    assert cost(config, WIDTH, 12, grid) == cost(whole, WIDTH, 12, (6, 6))


def test_a_board_names_the_words_of_the_whole():
    config, grid = BoardConfig(1, 2, AlignConfig(vocab_size=5)), (2, 1)
    assert config.names_words and not BoardConfig(1, 2, LinearConfig()).names_words
    board = make_connector(config, WIDTH, WIDTH, rngs=nnx.Rngs(0))
    tiles = np.random.default_rng(0).normal(size=(1, 4, WIDTH)).astype(np.float32)
    laid = on_board(tiles[0], 1, 2, grid)[None] + places(2, 2, WIDTH)
    shares = board.name(jnp.asarray(tiles), None, grid)
    np.testing.assert_allclose(shares, board.whole.name(jnp.asarray(laid), None, (2, 2)), atol=1e-5)


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
        (lambda: BoardConfig(0, 2, LinearConfig()), "rows=0 must be 1 or more"),
        (
            lambda: BoardConfig(1, 2, PerceiverConfig(frames=2)),
            "reads 2 frames itself: .* take one with frames=1",
        ),
        (lambda: FramesConfig(2, BoardConfig(1, 2, LinearConfig())), "reads 2 frames itself"),
        (
            lambda: BoardConfig(2, 3, PixelShuffleConfig(4)).tokens((3, 2)),
            "do not fill a grid of 6 x 6; factor=3 is the nearest",
        ),
        (
            lambda: make_connector(BoardConfig(2, 2, LinearConfig()), 8, 8, rngs=nnx.Rngs(0))(
                jnp.zeros((1, 23, 8)), None, (3, 2)
            ),
            "23 features are not those of 2 x 2 tiles of 3 x 2, which are 24",
        ),
        (lambda: build(BoardConfig(2, 2, LinearConfig()), 10, 8), "10 wide .* 8, 12, 16"),
        (lambda: build(BoardConfig(2, 2, LinearConfig()), 4, 8), "4 wide .* 8, 12, 16"),
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
    board = {"name": "board", "rows": 3, "columns": 2, "whole": group}
    assert dataclass_from(ConnectorConfig, board, "model.connector") == BoardConfig(3, 2, config)
    with pytest.raises(ValueError, match="did you mean 'perceiver'"):
        dataclass_from(ConnectorConfig, {"name": "perciever"}, "model.connector")
