"""Adapters of linear maps: they begin as nothing, and merge into kernels that do the same.

That they compute what PEFT computes is shown in tests/convert/test_peft.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from functional import QUICK

import mmjax
from mmjax import params
from mmjax.nn import lora
from mmjax.nn.linear import Linear
from mmjax.nn.lora import LoRAConfig
from mmjax.registry import UnknownNameError

LM = dict(
    name="lm",
    vocab_size=40,
    max_len=16,
    width=32,
    depth=2,
    heads=4,
    kv_heads=2,
    mlp_width=48,
    activation="silu",
    norm_eps=1e-6,
    tied=False,
    rope=dict(theta=1e4),
)
TOKENS = jnp.arange(12).reshape(2, 6)
KINDS = {
    "lora": LoRAConfig(4, 8, r"decoder/layers/.*/(query|value|down)|head"),
    "dora": LoRAConfig(4, 8, r"decoder/layers/.*|head", dora=True, rslora=True),
}


@functools.cache
def base():
    """A graph and random values, which are made sooner than by initialisers."""
    graph, shapes = params.abstract(lambda: mmjax.build(LM, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    return graph, {
        path: jnp.float32(rng.normal(size=x.shape) * x.shape[0] ** -0.5)
        for path, x in shapes.items()
    }


def build(config=None):
    model = params.merge(*base())
    if config is not None:
        lora.add(model, config, rngs=nnx.Rngs(1))
    return model


def randomised(model):
    """The same, its adapters no longer being nothing."""
    graph, arrays = params.split(model)
    rng = np.random.default_rng(0)
    noise = {k: jnp.float32(0.1 * rng.normal(size=v.shape)) for k, v in arrays.items()}
    return params.merge(
        graph, {k: v + noise[k] if lora.is_adapter(k) else v for k, v in arrays.items()}
    )


@jax.jit
def logits(model):
    return model(TOKENS)


def test_paths_shapes_and_first_values():
    model = build(KINDS["dora"])
    arrays = {k: v for k, v in params.split(model)[1].items() if lora.is_adapter(k)}
    up = {k.rpartition("/")[2]: v for k, v in arrays.items() if "/up/lora/" in k}
    assert {name: x.shape for name, x in up.items()} == {
        "a": (2, 32, 4),
        "b": (2, 4, 48),
        "magnitude": (2, 48),
    }
    assert arrays["head/lora/a"].shape == (32, 4)
    assert all(lora.adapted(path) in params.split(model)[1] for path in arrays)
    for path, x in arrays.items():
        if path.endswith("/a"):
            # Uniform of variance 1 / (3 inputs).
            bound = x.shape[-2] ** -0.5
            assert np.abs(x).max() <= bound
            np.testing.assert_allclose(np.std(x), bound / 3**0.5, rtol=0.15)
        else:
            assert not np.any(x)
    assert not np.array_equal(up["a"][0], up["a"][1])


@pytest.mark.parametrize("kind", KINDS)
def test_new_adapters_change_nothing_and_merged_ones_nothing_more(kind):
    plain, model = build(), build(KINDS[kind])
    np.testing.assert_array_equal(logits(model), logits(plain))
    model = randomised(model)
    model.origin = "somewhere"
    expected = logits(model)
    assert np.abs(expected - logits(plain)).max() > 0.05
    merged = lora.merge(model)
    assert merged.origin == "somewhere" and not lora.adapted_maps(merged)
    assert lora.adapted_maps(model), "merging left the model as it was"
    np.testing.assert_allclose(logits(merged), expected, atol=2e-6)
    # The very structure of a model that never had any, so that programs are shared.
    del merged.origin
    assert nnx.graphdef(merged) == nnx.graphdef(plain)
    assert lora.merge(merged) is merged


def test_decoding_with_adapters():
    """The scan over the prompt and the steps of unstacked layers agree with the whole."""
    model = randomised(build(KINDS["dora"]))

    def decode(model):
        mask = jnp.ones((2, 4), bool)
        first, cache = model.prefill(TOKENS[:, :4], mask, length=6)
        second, cache = model.unstack().step(TOKENS[:, 4], cache)
        return first, second

    first, second = jax.jit(decode, compiler_options=QUICK)(model)
    whole = logits(model)
    np.testing.assert_allclose(first, whole[:, 3], atol=2e-6)
    np.testing.assert_allclose(second, whole[:, 4], atol=2e-6)


def test_the_computation_is_in_the_type_of_the_input():
    linear = Linear(8, 6, rngs=nnx.Rngs(0))
    holder = nnx.List([linear])
    lora.add(holder, LoRAConfig(2, 4, "0", dora=True), rngs=nnx.Rngs(0))
    x = jnp.ones((3, 8), jnp.bfloat16)
    assert linear(x).dtype == jnp.bfloat16
    assert linear(x, jnp.float32).dtype == jnp.float32


def test_dora_keeps_columns_of_zeros_and_its_lengths_are_constants():
    linear = Linear(8, 6, bias=False, rngs=nnx.Rngs(0))
    linear.kernel.set_value(linear.kernel[...].at[:, 2].set(0.0))
    lora.add(nnx.List([linear]), LoRAConfig(2, 4, "0", dora=True), rngs=nnx.Rngs(0))
    graph, adapter = nnx.split(linear.lora)
    kernel, x = linear.kernel[...], jax.random.normal(jax.random.key(0), (5, 8))

    def total(adapter):
        return jnp.sum(nnx.merge(graph, adapter)(x, kernel) ** 2)

    np.testing.assert_array_equal(linear(x), x @ kernel)
    grads = jax.grad(total)(adapter)
    # By hand: with s * a @ b = 0, the lengths constant, d/db is that of LoRA.
    by_hand = jax.grad(lambda b: jnp.sum((x @ kernel + 2 * x @ adapter.a[...] @ b) ** 2))
    expected = by_hand(jnp.zeros((2, 6)))
    np.testing.assert_allclose(grads.b[...], expected.at[:, 2].set(0.0), rtol=1e-5, atol=1e-6)
    # d/dm is the gradient along the column's direction.
    lengths = np.linalg.norm(kernel, axis=0)
    expected = np.sum(2 * np.square(x @ kernel), axis=0)[lengths > 0] / lengths[lengths > 0]
    np.testing.assert_allclose(grads.magnitude[...][lengths > 0], expected, rtol=1e-5)
    assert np.all(np.isfinite(grads.magnitude[...]))


def test_what_cannot_be():
    model = build()
    with pytest.raises(UnknownNameError, match="did you mean 'decoder/layers/attention/query'"):
        lora.add(model, LoRAConfig(4, 8, "decoder/attention/query"), rngs=nnx.Rngs(0))
    # A table of vectors is no linear map.
    with pytest.raises(UnknownNameError, match="no linear map"):
        lora.add(model, LoRAConfig(4, 8, "token"), rngs=nnx.Rngs(0))
    assert not lora.adapted_maps(model)
    lora.add(model, LoRAConfig(4, 8, "head"), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"have an adapter already: head\. Merge it first"):
        lora.add(model, LoRAConfig(4, 8, ".*"), rngs=nnx.Rngs(0))
    assert list(lora.adapted_maps(model)) == ["head"]
    with pytest.raises(ValueError, match="rank of at least 1, not rank=0"):
        LoRAConfig(0, 8, ".*")
    with pytest.raises(ValueError, match="no regular expression"):
        LoRAConfig(1, 8, "(")
