"""Language models: decoding, padding, masks, meshes. Beside transformers they are in
tests/convert/test_language_models.py."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from functional import QUICK

import mmjax
from mmjax import params as parameters
from mmjax import sharding
from mmjax.models import LM, LMConfig
from mmjax.nn import masks
from mmjax.nn.partition import activation_sharding
from mmjax.nn.rope import Rope

VOCAB, LENGTH = 40, 10

LLAMA = LMConfig(
    vocab_size=VOCAB,
    max_len=32,
    width=24,
    depth=2,
    heads=4,
    kv_heads=2,
    mlp_width=36,
    activation="silu",
    norm_eps=1e-5,
    tied=False,
    rope=Rope(1000.0),
)
CONFIGS = {
    "llama": LLAMA,
    "gemma": dataclasses.replace(
        LLAMA,
        depth=3,
        norm="rmsnorm_offset",
        norm_placement="sandwich",
        activation="gelu_tanh",
        scale_embeddings=True,
        tied=True,
        qk_norm=True,
        scale=0.3,
        softcap=2.0,
        final_softcap=3.0,
        window=3,
        window_layers=(0, 2),
        window_rope=Rope(50.0),
    ),
    "opt": dataclasses.replace(
        LLAMA,
        kv_heads=None,
        rope=None,
        norm="layernorm",
        norm_placement="post",
        final_norm=False,
        gated=False,
        activation="relu",
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        embed_width=20,
        position_offset=2,
        window=4,
    ),
    "gpt2": dataclasses.replace(
        LLAMA,
        kv_heads=None,
        rope=None,
        norm="layernorm",
        gated=False,
        activation="gelu_tanh",
        qkv_bias=True,
        tied=True,
        scale_by_depth=True,
    ),
    "gpt_neox": dataclasses.replace(
        LLAMA,
        kv_heads=None,
        rope=Rope(1000.0, dims=2),
        norm="layernorm",
        norm_placement="parallel",
        gated=False,
        activation="gelu",
    ),
    "mpt": dataclasses.replace(
        LLAMA,
        width=30,
        heads=3,
        kv_heads=None,
        rope=None,
        alibi=8.0,
        norm="layernorm_unbiased",
        gated=False,
        activation="gelu",
    ),
}


def build(config):
    """A model in which no parameter is zero or one."""
    graph, shapes = parameters.abstract(lambda: LM(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    params = {
        path: path.endswith("scale") + 0.2 * rng.normal(size=shape.shape)
        for path, shape in shapes.items()
    }
    return parameters.merge(graph, jax.tree.map(jnp.float32, params))


def compiled(model, function=LM.__call__, **static):
    """`function(model, *arrays, **static)`, compiled."""
    graph, params = parameters.split(model)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def call(params, *args):
        return function(parameters.merge(graph, params), *args, **static)

    return lambda *args: call(params, *args)


@pytest.fixture(scope="module")
def models():
    return {name: build(config) for name, config in CONFIGS.items()}


@pytest.fixture(scope="module")
def calls(models):
    return {name: compiled(model) for name, model in models.items()}


@pytest.fixture(scope="module")
def texts():
    """Three texts of 10, 6 and 3 tokens, padded on the left."""
    tokens = np.random.default_rng(0).integers(0, VOCAB, (3, LENGTH)).astype(np.int32)
    valid = np.arange(LENGTH) >= LENGTH - np.array([10, 6, 3])[:, None]
    return jnp.asarray(tokens), jnp.asarray(valid)


def to_the_left(x, valid):
    """The same texts, padded on the right."""
    order = np.argsort(~np.asarray(valid), axis=1, kind="stable")
    return np.take_along_axis(np.asarray(x), order.reshape(order.shape + (1,) * (x.ndim - 2)), 1)


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_and_neighbours_do_not_matter(calls, texts, name):
    tokens, valid = texts
    together = np.asarray(calls[name](tokens, valid))
    assert together.dtype == np.float32
    # On the other side, and with something that is no token where the padding is.
    garbage = jnp.where(valid, tokens, -1)
    right = calls[name](to_the_left(garbage, valid), to_the_left(valid, valid))
    np.testing.assert_allclose(right[1, :6], together[1, -6:], atol=1e-5)
    np.testing.assert_allclose(right[2, :3], together[2, -3:], atol=1e-5)
    # Alone, without a mask.
    alone = calls[name](tokens[2:, -3:])
    np.testing.assert_allclose(alone[0], together[2, -3:], atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_decoding_equals_the_whole_text(models, calls, texts, name):
    expected = np.asarray(calls[name](*texts))
    tokens, valid = (x[:2] for x in texts)
    start = 7
    prefill = compiled(models[name], LM.prefill, length=LENGTH)
    logits, cache = prefill(tokens[:, :start], valid[:, :start])
    np.testing.assert_allclose(logits, expected[:2, start - 1], atol=1e-5)
    # The batch changes its order and repeats a text, as beam search does.
    rows = jnp.array([1, 0, 1])
    cache = cache.select(rows)
    step = compiled(models[name].unstack(), LM.step)
    for place in range(start, LENGTH):
        logits, cache = step(tokens[rows, place], cache)
        np.testing.assert_allclose(logits, expected[rows, place], atol=1e-5)
    # The cache is full.
    assert jnp.isnan(step(tokens[rows, 0], cache)[0]).all()


def test_steps_without_unstacking_are_the_same(models, texts):
    tokens, valid = texts
    _, cache = compiled(models["gemma"], LM.prefill, length=LENGTH + 1)(tokens, valid)
    one = compiled(models["gemma"], LM.step)(tokens[:, 0], cache)[0]
    other = compiled(models["gemma"].unstack(), LM.step)(tokens[:, 0], cache)[0]
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_run_takes_embeddings_masks_and_positions(models, texts):
    """Embeddings for tokens; a prefix that sees itself; two samples packed in a row."""
    model, (tokens, valid) = models["gemma"], texts

    def run(model, tokens, valid):
        plain = model.run(tokens, mask=valid, features=(0, -1))
        same = model.run(embeddings=model.embed(tokens), mask=valid)
        first = jnp.broadcast_to(jnp.arange(LENGTH) < 4, valid.shape)
        prefix = masks.prefix_lm(first, group=valid, window=1)
        seen = model.run(tokens, mask=valid, attention=prefix)
        group = jnp.where(jnp.arange(LENGTH) < 6, 1, 2)[None]
        packed = model.run(
            tokens[:1],
            attention=masks.blocks(jnp.ones((1, LENGTH), bool), group=group, window=1),
            positions=jnp.arange(LENGTH)[None] % 6,
        )
        return plain, same, seen, packed, model.run(tokens[:1, 6:])

    plain, same, seen, packed, alone = compiled(model, run)(tokens, valid)
    np.testing.assert_allclose(same.logits[valid], plain.logits[valid], atol=1e-5)
    assert plain.features.shape == (2, 3, LENGTH, 24) and plain.hidden.shape == (3, LENGTH, 24)
    np.testing.assert_allclose(model.logits(plain.hidden), plain.logits, atol=1e-6)
    # The first token sees the prefix, and later tokens see it change.
    assert np.abs(seen.logits - plain.logits)[0].max(axis=1).min() > 1e-3
    np.testing.assert_allclose(packed.logits[:, 6:], alone.logits, atol=1e-5)


def test_windows_are_as_long_as_they_say(calls, texts):
    """With two layers that see 4 tokens, a token matters to the 6 after it and no further."""
    tokens, _ = texts
    changed = tokens.at[:, 1].set((tokens[:, 1] + 1) % VOCAB)
    difference = np.abs(calls["opt"](tokens) - calls["opt"](changed)).max(axis=(0, 2))
    assert (difference[1:8] > 1e-4).all() and (difference[8:] == 0).all() and difference[0] == 0


def test_computing_in_bfloat16_rounds_the_scale_of_embeddings_as_gemma_does():
    config = dataclasses.replace(CONFIGS["gemma"], dtype="bfloat16")
    model = build(config)
    tokens = jnp.arange(8, dtype=jnp.int32)[None]
    vectors = model.token.embedding[...][:8].astype(jnp.bfloat16)
    expected = vectors * jnp.asarray(24**0.5, jnp.bfloat16)
    assert jnp.array_equal(model.embed(tokens)[0], expected)
    logits = compiled(model)(tokens)
    reference = compiled(build(CONFIGS["gemma"]))(tokens)
    assert logits.dtype == jnp.float32 and bool(jnp.isfinite(logits).all())
    np.testing.assert_allclose(logits, reference, atol=0.15)


MESHES = {"fsdp=8": (1, 8, 1), "data=2,fsdp=2,tensor=2": (2, 2, 2)}


@pytest.fixture(scope="module")
def trained():
    """Losses of three steps of gradient descent, on one device."""
    mesh = sharding.make_mesh(sharding.MeshConfig(1, 1, 1), jax.devices()[:1])
    return functools.cache(lambda name: train(CONFIGS[name], mesh))


@pytest.mark.parametrize(
    ("name", "mesh"), [("gemma", mesh) for mesh in MESHES] + [("opt", "data=2,fsdp=2,tensor=2")]
)
def test_training_does_not_depend_on_the_mesh(name, mesh, trained, monkeypatch):
    monkeypatch.setattr(sharding, "FSDP_MIN_SIZE", 2)
    losses = train(CONFIGS[name], sharding.make_mesh(sharding.MeshConfig(*MESHES[mesh])))
    np.testing.assert_allclose(losses, trained(name), rtol=1e-4)
    assert losses[-1] < losses[0] - 0.1


def train(config, mesh):
    graph, params = parameters.split(build(dataclasses.replace(config, remat="dots")))
    places = sharding.parameter_shardings(params, sharding.DEFAULT_RULES, mesh)
    split = {path for path, place in places.items() if not place.is_fully_replicated}
    if mesh.size > 1:  # what is large lies on several devices
        assert {path for path in params if path.endswith(("kernel", "embedding"))} <= split
    params = jax.device_put(params, places)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (8, LENGTH)).astype(np.int32)
    tokens = jax.device_put(tokens, sharding.batch_sharding(mesh))

    def loss(params, tokens):
        logits = parameters.merge(graph, params)(tokens)[:, :-1]
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=2)
        return -jnp.mean(chosen)

    def step(params, tokens):
        value, gradients = jax.value_and_grad(loss)(params, tokens)
        return value, jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients)

    step = jax.jit(step, out_shardings=(None, places), donate_argnums=0, compiler_options=QUICK)
    losses = []
    with activation_sharding(sharding.activation_constraint(mesh)):
        for _ in range(3):
            value, params = step(params, tokens)
            losses.append(float(value))
    return losses


def test_a_config_builds_it():
    fields = {"name": "lm", **dataclasses.asdict(CONFIGS["gemma"])}
    graph, shapes = parameters.abstract(lambda: mmjax.build(fields, rngs=nnx.Rngs(0)))
    assert parameters.merge(graph, shapes).config == CONFIGS["gemma"]


def test_fields_that_say_what_is_so_anyway_make_no_difference():
    same = {"head_dim": 6, "scale": 6**-0.5, "embed_width": 24, "kv_heads": 2}
    assert dataclasses.replace(LLAMA, **same) == LLAMA
    assert dataclasses.replace(LLAMA, kv_heads=4) == dataclasses.replace(LLAMA, kv_heads=None)
    windowed = dataclasses.replace(LLAMA, window=3)
    assert windowed == dataclasses.replace(windowed, window_layers=(1, 0), window_rope=LLAMA.rope)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 0}, "at least 1"),
        ({"window_layers": (0,)}, "set `window`"),
        ({"window": 3, "window_layers": (2,)}, "layers 0 to 1"),
        ({"window": 3, "window_layers": ()}, "names no layer"),
        ({"position_offset": 2}, "position table"),
        ({"rope": None, "window": 3, "window_rope": Rope(10.0)}, "window_rope without rope"),
        ({"dtype": "bf16"}, "did you mean 'bfloat16'"),
    ],
)
def test_bad_configs_say_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LLAMA, **changes)


def test_bad_input_says_what_is_wrong(models, texts):
    tokens, valid = texts
    with pytest.raises(ValueError, match="40 tokens is longer than the model's max_len=32"):
        models["gpt2"](jnp.zeros((1, 40), jnp.int32))
    assert models["gpt2"].config.limit == 32 and models["llama"].config.limit is None
    with pytest.raises(ValueError, match="tokens or embeddings: give one"):
        models["llama"].run()
    with pytest.raises(ValueError, match="with window=4"):
        models["opt"].run(tokens, attention=masks.padding(valid))
    with pytest.raises(ValueError, match="8 slots has no room for 10"):
        models["llama"].prefill(tokens, valid, length=8)
    assert jnp.isnan(compiled(models["llama"])(tokens.at[0, 2].set(VOCAB))[0, 2:]).all()
