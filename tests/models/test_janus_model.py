"""Janus: reads as a VLM, draws as a unified model, and both in one stream."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_unified import BEGIN, CONFIG, IMAGE, LM, TEXT

from mmjax import params
from mmjax.config import dataclass_from, split_name
from mmjax.connectors import FramesConfig, MLPConfig, PixelShuffleConfig
from mmjax.models import (
    MODELS,
    VLM,
    Janus,
    JanusConfig,
    Unified,
    UnifiedConfig,
    ViTConfig,
    VLMConfig,
)
from mmjax.models.unified import ApartConfig

ENCODER = ViTConfig(
    image_size=8,
    patch_size=2,
    width=12,
    depth=2,
    heads=2,
    mlp_width=20,
    activation="gelu",
    norm_eps=1e-6,
    pooling="none",
    position="learned",
)
# Four visual tokens and sixteen codes of an image.
SIGHT = dict(encoder=ENCODER, connector=PixelShuffleConfig(factor=2))
CONFIGS = {
    "as published": JanusConfig(
        **SIGHT,
        lm=dataclasses.replace(LM, vocab_size=TEXT),
        image=dataclasses.replace(CONFIG.image, end=None),
        image_token=IMAGE,
        apart=ApartConfig(embed_width=6, depth=2, head_hidden=14),
    ),
    "one table, all options": JanusConfig(
        **SIGHT,
        lm=dataclasses.replace(LM, experts=2, window=9),
        image=CONFIG.image,
        # No id of the vocabulary.
        image_token=1000,
        modality_embeddings=True,
        grid_positions=True,
        features=(0, -1),
        features_norm=False,
    ),
}
LOWEST = float(jnp.finfo(jnp.float32).min)
# Compiling is what takes the time here.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    """Janus with weights that are not all but zero."""
    config = CONFIGS[request.param]
    graph, shapes = params.abstract(lambda: Janus(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(1)
    return params.merge(
        graph,
        {
            path: jnp.asarray(rng.normal(0, 0.3, shape.shape) + path.endswith("scale"), shape.dtype)
            for path, shape in shapes.items()
        },
    )


def run(model, *inputs, function=Unified.run, **options):
    """One call of the model (or of `function(model, ...)`), compiled without much optimisation."""
    graph, arrays = params.split(model)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(arrays, inputs, options):
        return function(params.merge(graph, arrays), *inputs, **options)

    return run(arrays, inputs, options)


def part(model, kind, config):
    """A model of another kind with the parameters that it shares with this one."""
    graph, shapes = params.abstract(lambda: kind(config, rngs=nnx.Rngs(0)))
    arrays = params.split(model)[1]
    return params.merge(graph, {path: arrays[path] for path in shapes})


def pixels(*shape):
    return jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (*shape, 8, 8, 3)), jnp.float32)


def rows_of(config, *rows):
    """Tokens, mask and places of rows padded on the left, of words, and of ("read" or "drawn", the
    number of an image)."""
    seen, end = config.image_tokens, config.image.end
    slots = {"read": range(seen), "drawn": range(seen, config.places)}

    def laid(item):
        if isinstance(item, int):
            return [(item, -1)]
        kind, number = item
        # What stands at the places of images does not count.
        places = [(5, number * config.places + slot) for slot in slots[kind]]
        after = [(end, -1)] if kind == "drawn" and end is not None else []
        return [(BEGIN, -1), *places, *after]

    rows = [[pair for item in row for pair in laid(item)] for row in rows]
    length = max(map(len, rows))
    padded = np.array([[(0, -1)] * (length - len(row)) + row for row in rows], np.int32)
    mask = np.array([[False] * (length - len(row)) + [True] * len(row) for row in rows])
    return jnp.array(padded[..., 0]), jnp.array(mask), jnp.array(padded[..., 1])


def mixed(config):
    """Two rows of two images each, one read and one drawn."""
    return rows_of(
        config,
        (1, 2, ("read", 0), 3, ("drawn", 1), 4, 6),
        (6, ("drawn", 0), 7, 8, 9, ("read", 1)),
    )


@pytest.mark.parametrize("model", ["as published"], indirect=True)
def test_reads_as_a_vlm(model):
    config = model.config
    fields = {field.name for field in dataclasses.fields(VLMConfig)} - {"name"}
    shared = {name: getattr(config, name) for name in fields & set(vars(config))}
    vlm = part(model, VLM, VLMConfig(**shared))
    tokens, mask, place = rows_of(
        config, (1, ("read", 0), 2, ("read", 1)), (("read", 0), 3, ("read", 1), 4, 5)
    )
    here = place >= 0
    tokens, images = jnp.where(here, IMAGE, tokens), pixels(2, 2)
    expected = run(vlm, tokens, images, mask, function=VLM.run)
    for given in (None, place):
        out = run(model.following("never"), tokens, images, mask, place=given)
        np.testing.assert_allclose(out.hidden, expected.hidden, atol=1e-5)
        np.testing.assert_allclose(out.logits[..., :TEXT], expected.logits, atol=1e-5)
        assert np.all(out.logits[..., TEXT:] == LOWEST)
        np.testing.assert_array_equal(out.tokens, jnp.where(mask, tokens, 0))


def test_draws_as_a_unified_model(model):
    config = model.config
    fields = {field.name for field in dataclasses.fields(UnifiedConfig)} - {"name"}
    unified = part(
        model, Unified, UnifiedConfig(**{name: getattr(config, name) for name in fields})
    )
    tokens, mask, place = rows_of(config, (1, ("drawn", 1), 2, ("drawn", 0)), (3, ("drawn", 0)))
    images, length = pixels(2, 2), config.image.length
    number, slot = place // config.places, place % config.places
    there = jnp.where(place >= 0, number * length + slot - config.image_tokens, -1)
    expected = run(unified, tokens, images, mask, place=there)
    out = run(model, tokens, images, mask, place=place)
    for name in ("follows", "tokens"):
        np.testing.assert_array_equal(getattr(out, name), getattr(expected, name))
    np.testing.assert_allclose(out.hidden, expected.hidden, atol=1e-5)
    ids = run(model, tokens, images, mask, place, function=Janus.fill)
    np.testing.assert_array_equal(ids, out.tokens)
    again = run(model, ids, mask=mask)
    np.testing.assert_allclose(again.logits, out.logits, atol=1e-5)


def test_codes_follow_where_an_image_is_drawn_only(model):
    config = model.config
    tokens, mask, place = mixed(config)
    logits = np.array(run(model, tokens, pixels(2, 2), mask, place=place).logits)
    codes = config.image.all_ids
    some = (logits[..., codes] > LOWEST).any(-1)
    # The next token is an id of a drawn image.
    is_next = np.pad(np.array(place)[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    expected = (is_next >= 0) & (is_next % config.places >= config.image_tokens)
    valid = np.array(mask)
    np.testing.assert_array_equal(some[valid], expected[valid])


def test_steps_equal_the_whole(model):
    config, images = model.config, pixels(2, 2)
    tokens, mask, place = rows_of(config, (1, 2, ("read", 0), 3, BEGIN), (6, ("read", 1), BEGIN))
    whole = rows_of(config, (1, 2, ("read", 0), 3, ("drawn", 1)), (6, ("read", 1), ("drawn", 0)))
    out = run(model, whole[0], images, whole[1], place=whole[2])
    half, length = tokens.shape[1], whole[0].shape[1]

    def decode(model, tokens, mask, images, place, ids):
        first, cache = model.prefill(tokens, mask, length=length, images=images, place=place)

        def step(cache, token):
            logits, cache = model.step(token, cache)
            return cache, logits

        return first, jax.lax.scan(step, cache, ids.T)[1].swapaxes(0, 1)

    first, others = run(model, tokens, mask, images, place, out.tokens[:, half:], function=decode)
    logits = jnp.concatenate([first[:, None], others], axis=1)
    np.testing.assert_allclose(logits, out.logits[:, half - 1 :], atol=2e-5)


def test_packed_samples_are_as_if_alone(model):
    tokens, mask, place = mixed(model.config)
    images = pixels(2, 2)
    alone = np.array(run(model, tokens, images, mask, place=place).logits)[np.array(mask)]
    shift = jnp.array([[0], [2 * model.config.places]])
    place = jnp.where(place >= 0, place + shift, place)
    segments = jnp.repeat(jnp.array([1, 2]), mask.sum(axis=1))[None]
    packed = run(
        model,
        tokens[mask][None],
        images.reshape(1, 4, 8, 8, 3),
        place=place[mask][None],
        segments=segments,
    )
    np.testing.assert_allclose(packed.logits[0], alone, atol=2e-5)


def test_gradients_reach_what_was_used(model):
    """The encoder learns of images that are read, the codes' table of those that are drawn."""

    def slopes(model, tokens, mask, place):
        graph, arrays = params.split(model)

        def loss(arrays):
            out = params.merge(graph, arrays).run(tokens, pixels(1, 1), mask, place=place)
            return jnp.sum(jnp.sin(out.hidden))

        return jax.grad(loss)(arrays)

    names = {path.split("/")[0] for path in params.split(model)[1]} - {"tokenizer"}
    unused = {"read": {"apart", "row", "column"}, "drawn": {"encoder", "connector"}}
    for kind, others in unused.items():
        found = run(model, *rows_of(model.config, (1, (kind, 0), 2)), function=slopes)
        assert all(np.isfinite(slope).all() for slope in found.values())
        used = {path.split("/")[0] for path, slope in found.items() if np.any(slope != 0)}
        assert used == names - others


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (dict(features=(2,)), "there is no block 2 in an encoder of depth=2"),
        (
            dict(encoder=dataclasses.replace(ENCODER, image_size=16)),
            r"\(16, 16, 3\) \(height, width, channels\), image.tokenizer of \(8, 8, 3\)",
        ),
        (dict(connector=FramesConfig(2, MLPConfig())), "reads clips of 2 images"),
        (dict(follow="gramar"), "did you mean 'grammar'"),
    ],
)
def test_configs_that_cannot_be(wrong, match):
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(CONFIGS["as published"], **wrong)


@pytest.mark.parametrize("name", CONFIGS)
def test_an_experiment_takes_the_config(name):
    found, fields = split_name(dataclasses.asdict(CONFIGS[name]), "config.model")
    assert dataclass_from(MODELS[found][0], fields, "config.model") == CONFIGS[name]
