"""The small layers against PyTorch and transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.nn import backend
from mmjax.nn.dropout import drop_patches, drop_path
from mmjax.nn.linear import Embedding, Linear
from mmjax.nn.mlp import ACTIVATIONS, MLP
from mmjax.nn.norm import LayerNorm, RMSNorm
from mmjax.nn.partition import activation_sharding
from mmjax.nn.patch import PatchEmbed
from mmjax.nn.position import interpolate_grid, sincos2d
from mmjax.nn.rope import Rope, rotary


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(0), (2, 5, 8))


def tensor(x):
    import torch

    return torch.tensor(np.asarray(x))


@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_the_same_in_both_layouts(x, bias):
    layer = Linear(8, 6, bias=bias, rngs=nnx.Rngs(0))
    expected = np.asarray(x) @ np.asarray(layer.kernel) + (np.asarray(layer.bias) if bias else 0)
    np.testing.assert_allclose(layer(x), expected, atol=1e-6)
    with backend.compiling_for("tpu"):
        np.testing.assert_allclose(layer(x), expected, atol=1e-6)
    np.testing.assert_allclose(layer(x[0, 0]), expected[0, 0], atol=1e-6)


def test_linear_flattens_its_operands_on_cpu_only(x):
    layer = Linear(8, 6, rngs=nnx.Rngs(0))

    def operand_dims():
        # A new function each time: tracing is cached by function.
        jaxpr = jax.make_jaxpr(lambda x: layer(x))(x)
        (dot,) = (e for e in jaxpr.eqns if e.primitive.name == "dot_general")
        return dot.invars[0].aval.ndim

    assert operand_dims() == 2
    with backend.compiling_for("tpu"):
        assert operand_dims() == 3


def test_linear_computes_in_the_dtype_of_its_input(x):
    layer = Linear(8, 6, rngs=nnx.Rngs(0))
    assert layer(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert layer.kernel.dtype == jnp.float32


@pytest.mark.torch
@pytest.mark.parametrize(("ours", "theirs"), [(LayerNorm, "LayerNorm"), (RMSNorm, "RMSNorm")])
def test_norms_equal_torch(x, ours, theirs):
    torch = pytest.importorskip("torch")
    layer = ours(8, eps=1e-3)
    layer.scale.set_value(jnp.linspace(0.5, 2, 8))
    reference = getattr(torch.nn, theirs)(8, eps=1e-3)
    reference.weight.data = tensor(layer.scale[...])
    np.testing.assert_allclose(layer(x), reference(tensor(x)).detach(), atol=1e-6)


def test_norms_compute_in_float32():
    # A mean of 1,000 leaves bfloat16 no digits for the rest.
    x = (1000 + jax.random.normal(jax.random.key(0), (4, 64)) * 8).astype(jnp.bfloat16)
    for layer in (LayerNorm(64, eps=1e-6), RMSNorm(64, eps=1e-6)):
        expected = layer(x.astype(jnp.float32))
        out = layer(x)
        assert out.dtype == jnp.bfloat16
        np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=0.02)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("gelu", "gelu"),
        ("gelu_tanh", "gelu_pytorch_tanh"),
        ("quick_gelu", "quick_gelu"),
        ("relu", "relu"),
        ("silu", "silu"),
    ],
)
def test_activations_equal_transformers(ours, theirs):
    activations = pytest.importorskip("transformers.activations")
    x = jnp.linspace(-6, 6, 101)
    expected = activations.ACT2FN[theirs](tensor(x))
    np.testing.assert_allclose(ACTIVATIONS[ours](x), expected, atol=1e-6)


def test_a_gate_multiplies(x):
    mlp = MLP(8, 12, activation="silu", gated=True, bias=False, rngs=nnx.Rngs(0))
    expected = mlp.down(jax.nn.silu(mlp.gate(x)) * mlp.up(x))
    np.testing.assert_allclose(mlp(x), expected, atol=1e-7)


@pytest.mark.torch
@pytest.mark.parametrize("size", [(16, 24), (19, 25)])
def test_patches_equal_a_convolution_with_gradients(size):
    torch = pytest.importorskip("torch")
    conv = torch.nn.Conv2d(3, 10, kernel_size=8, stride=8)
    layer = PatchEmbed(8, 3, 10, partial="crop", rngs=nnx.Rngs(0))
    kernel = conv.weight.detach().numpy().transpose(2, 3, 1, 0).reshape(-1, 10)
    layer.projection.kernel.set_value(jnp.asarray(kernel))
    layer.projection.bias.set_value(jnp.asarray(conv.bias.detach().numpy()))
    images = jax.random.normal(jax.random.key(0), (2, *size, 3))
    pixels = tensor(images).permute(0, 3, 1, 2).contiguous().requires_grad_()
    expected = conv(pixels).flatten(2).transpose(1, 2)
    out, pull = jax.vjp(layer, images)
    np.testing.assert_allclose(out, expected.detach(), atol=1e-5)
    expected.square().sum().backward()
    gradient = pixels.grad.permute(0, 2, 3, 1)
    np.testing.assert_allclose(pull(2 * out)[0], gradient, atol=1e-5)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("source", "target"),
    [((4, 4), (7, 5)), ((5, 3), (2, 9)), ((16, 16), (24, 24)), ((3, 3), (1, 1))],
)
def test_interpolation_equals_torch(source, target):
    torch = pytest.importorskip("torch")
    table = jax.random.normal(jax.random.key(0), (source[0] * source[1], 6))
    expected = torch.nn.functional.interpolate(
        tensor(table).reshape(1, *source, 6).permute(0, 3, 1, 2),
        size=target,
        mode="bicubic",
        align_corners=False,
    )
    expected = expected.permute(0, 2, 3, 1).reshape(-1, 6)
    np.testing.assert_allclose(interpolate_grid(table, source, target), expected, atol=1e-5)
    same = interpolate_grid(table, source, source)
    np.testing.assert_allclose(same, table, atol=1e-6)


def test_sincos_has_the_values_of_its_definition():
    table = sincos2d((2, 3), 16)
    assert table.shape == (6, 16)
    for row in range(2):
        for column in range(3):
            for i in range(4):
                omega = 10_000.0 ** (-i / 3)
                expected = [f(p * omega) for p in (column, row) for f in (np.sin, np.cos)]
                np.testing.assert_allclose(table[row * 3 + column, i::4], expected, atol=1e-6)


@pytest.mark.torch
def test_rotary_equals_transformers():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    import torch
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=32, num_attention_heads=2, rope_theta=10_000.0)
    positions = jnp.array([[0, 1, 2, 3, 4], [7, 8, 9, 2000, 1]])
    q, k = jax.random.normal(jax.random.key(0), (2, 2, 5, 3, 16))
    embedding = llama.LlamaRotaryEmbedding(config)
    cos, sin = embedding(torch.zeros(1), tensor(positions))
    expected = llama.apply_rotary_pos_emb(
        tensor(q).transpose(1, 2), tensor(k).transpose(1, 2), cos, sin
    )
    for ours, theirs in zip((q, k), expected, strict=True):
        actual = rotary(ours, Rope(10_000.0).rotation(positions, 16))
        # Angles reach 2,000, of which float32 keeps 4 decimals.
        np.testing.assert_allclose(actual, theirs.transpose(1, 2), atol=1e-3)
        np.testing.assert_allclose(actual[0], theirs.transpose(1, 2)[0], atol=1e-6)


SCALED = {
    "linear": ({"factor": 3.0}, {"factor": 3.0}),
    "dynamic": ({"factor": 2.5}, {"factor": 2.5, "original_length": 16}),
    "llama3": (
        {
            "factor": 8.0,
            "low_freq_factor": 1.5,
            "high_freq_factor": 5.0,
            "original_max_position_embeddings": 16,
        },
        {
            "factor": 8.0,
            "low_frequency_factor": 1.5,
            "high_frequency_factor": 5.0,
            "original_length": 16,
        },
    ),
    "yarn": (
        {
            "factor": 4.0,
            "beta_fast": 3.0,
            "beta_slow": 0.5,
            "attention_factor": 1.2,
            "original_max_position_embeddings": 16,
        },
        {
            "factor": 4.0,
            "beta_fast": 3.0,
            "beta_slow": 0.5,
            "amplitude": 1.2,
            "original_length": 16,
        },
    ),
}


@pytest.mark.torch
@pytest.mark.parametrize("length", [12, 40])
@pytest.mark.parametrize("scaling", SCALED)
def test_scaled_rotary_equals_transformers(scaling, length):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    import torch
    from transformers import LlamaConfig

    theirs, ours = SCALED[scaling]
    config = LlamaConfig(
        hidden_size=32,
        num_attention_heads=2,
        max_position_embeddings=16,
        rope_parameters={"rope_type": scaling, "rope_theta": 100.0, **theirs},
    )
    positions = jnp.arange(length)[None]
    cos, sin = llama.LlamaRotaryEmbedding(config)(torch.zeros(1), tensor(positions))
    rotation = Rope(100.0, scaling=scaling, **ours).rotation(positions, 16)
    np.testing.assert_allclose(rotation.cos, cos[..., :8], atol=5e-6)
    np.testing.assert_allclose(rotation.sin, sin[..., :8], atol=5e-6)


def test_part_of_a_head_may_be_rotated():
    x = jax.random.normal(jax.random.key(0), (1, 3, 2, 8))
    rotation = Rope(100.0, dims=4).rotation(jnp.arange(3)[None], 8)
    out = rotary(x, rotation)
    np.testing.assert_array_equal(out[..., 4:], x[..., 4:])
    np.testing.assert_array_equal(out[..., :4], rotary(x[..., :4], rotation))


def test_bad_ropes_say_what_is_wrong():
    with pytest.raises(ValueError, match="did you mean 'llama3'"):
        Rope(1e4, scaling="llama")
    with pytest.raises(ValueError, match="'yarn' needs original_length"):
        Rope(1e4, scaling="yarn")
    with pytest.raises(ValueError, match="dims=3"):
        Rope(1e4, dims=3)
    with pytest.raises(ValueError, match="at most all"):
        Rope(1e4, dims=8).rotation(jnp.zeros((1, 1), jnp.int32), 4)


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    x = jnp.ones((4000, 2, 3))
    out = np.asarray(drop_path(x, 0.25, jax.random.key(0)))
    assert set(np.unique(out)) == {0.0, np.float32(1 / 0.75)}
    assert (out == out[:, :1, :1]).all()
    np.testing.assert_allclose(out.mean(), 1, atol=0.03)
    assert drop_path(x.astype(jnp.bfloat16), 0.25, jax.random.key(0)).dtype == jnp.bfloat16


def test_drop_patches_keeps_a_random_subset_in_order():
    x = jnp.broadcast_to(jnp.arange(20.0)[None, :, None], (500, 20, 2))
    out = np.asarray(drop_patches(x, 0.7, jax.random.key(0)))
    assert out.shape == (500, 6, 2)
    assert (np.diff(out[:, :, 0]) > 0).all()  # in order and distinct
    counts = np.bincount(out[:, :, 0].ravel().astype(int), minlength=20)
    np.testing.assert_allclose(counts, 500 * 0.3, rtol=0.25)
    assert drop_patches(x[:, :1], 0.99, jax.random.key(0)).shape == (500, 1, 2)


def test_ids_outside_of_a_table_are_nan():
    table = Embedding(4, 3, init=nnx.initializers.normal(), rngs=nnx.Rngs(0))
    out = table(jnp.array([3, 4, -1]))
    assert jnp.isfinite(out[0]).all() and jnp.isnan(out[1:]).all()


def test_activations_are_named_for_sharding(x):
    """Hidden activations tell their logical dimensions to whoever listens."""
    seen = []

    def record(x, names):
        seen.append((x.shape, names))
        return x

    with activation_sharding(record):
        MLP(8, 12, activation="relu", rngs=nnx.Rngs(0))(x)
    assert seen == [((2, 5, 12), ("batch", "tokens", "mlp"))]
