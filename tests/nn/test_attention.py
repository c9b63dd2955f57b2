"""Attention against PyTorch, and which kernel is chosen for what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from functional import jitted

from mmjax.nn import backend, masks
from mmjax.nn.attention import Attention, attend, pick_kernel
from mmjax.nn.rope import Rope


def arrays(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def swapped(x):
    """[b, n, h, d] as torch has it: [b, h, n, d]."""
    import torch

    return torch.tensor(np.asarray(x)).transpose(1, 2).contiguous().requires_grad_()


@pytest.mark.torch
@pytest.mark.parametrize("kv_heads", [6, 3, 2, 1])
@pytest.mark.parametrize("kind", ["full", "causal", "packed"])
def test_grouped_queries_equal_torch_with_gradients(kv_heads, kind):
    torch = pytest.importorskip("torch")
    q, k, v, weight = arrays((2, 7, 6, 8), (2, 7, kv_heads, 8), (2, 7, kv_heads, 8), (2, 7, 6, 8))
    segment = jnp.array([[1, 1, 1, 2, 2, 2, 2], [1, 2, 2, 2, 2, 3, 3]])
    mask = {
        "full": None,
        "causal": masks.causal(7),
        "packed": masks.blocks(jnp.ones((2, 7), bool), group=segment),
    }[kind]

    @jax.jit
    def run(q, k, v):
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, mask), q, k, v)
        return out, pull(weight)

    out, grads = run(q, k, v)
    inputs = [swapped(x) for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(
        *inputs,
        attn_mask=torch.tensor(np.asarray(mask.dense()))[:, None] if kind == "packed" else None,
        is_causal=kind == "causal",
        enable_gqa=True,
    )
    (expected * swapped(weight)).sum().backward()
    np.testing.assert_allclose(out, expected.transpose(1, 2).detach(), atol=2e-6)
    for grad, tensor in zip(grads, inputs, strict=True):
        np.testing.assert_allclose(grad, tensor.grad.transpose(1, 2), atol=5e-6)


@pytest.mark.torch
def test_cross_attention_equals_torch():
    torch = pytest.importorskip("torch")
    reference = torch.nn.MultiheadAttention(24, 4, kdim=16, vdim=16, batch_first=True)
    layer = Attention(24, 4, context_width=16, rngs=nnx.Rngs(0))
    fused = np.split(reference.in_proj_bias.detach().numpy() + 0.1, 3)
    reference.in_proj_bias.data = torch.tensor(np.concatenate(fused))
    for name, weight, bias in (
        ("query", reference.q_proj_weight, fused[0]),
        ("key", reference.k_proj_weight, fused[1]),
        ("value", reference.v_proj_weight, fused[2]),
        ("out", reference.out_proj.weight, reference.out_proj.bias.detach().numpy()),
    ):
        linear = {"query": layer.query, "key": layer.key, "value": layer.value, "out": layer.out}
        linear[name].kernel.set_value(jnp.asarray(weight.detach().numpy().T))
        linear[name].bias.set_value(jnp.asarray(bias))
    x, context = arrays((2, 5, 24), (2, 9, 16))
    valid = np.arange(9)[None] < np.array([9, 4])[:, None]
    mask = masks.cross(jnp.ones((2, 5), bool), jnp.asarray(valid))
    inputs = [torch.tensor(np.asarray(value)) for value in (x, context)]
    expected, _ = reference(inputs[0], inputs[1], inputs[1], key_padding_mask=torch.tensor(~valid))
    np.testing.assert_allclose(layer(x, context, mask=mask), expected.detach(), atol=1e-6)


def test_half_precision_keeps_the_softmax_in_float32():
    q, k, v = (10 * x for x in arrays((1, 64, 2, 16), (1, 64, 2, 16), (1, 64, 2, 16)))
    half = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    out = attend(*half)
    assert out.dtype == jnp.bfloat16
    # Against the same rounded inputs in float32: logits reach 1,000, where bfloat16 has steps of 4.
    expected = attend(*[x.astype(jnp.float32) for x in half])
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=0.2, rtol=0.02)


def test_the_kernel_is_chosen_by_backend_dtype_and_shape():
    def pick(mask=None, dtype=jnp.bfloat16, width=64, length=77):
        x = jnp.zeros((2, length, 4, width), dtype)
        return pick_kernel(x, x, mask)

    general = masks.padding(jnp.ones((2, 77), bool))
    assert pick() == "cpu"
    with backend.compiling_for("gpu"):
        assert pick() == "cudnn"
        assert pick(masks.causal(77)) == "cudnn"
        assert pick(general, length=78) == "cudnn"
        assert pick(general) == "xla"  # cuDNN does not train odd lengths with a bias
        assert pick(dtype=jnp.float32) == "xla"
        assert pick(width=12) == "xla"
    with backend.compiling_for("tpu"):
        assert pick() == "xla"


def test_a_fully_masked_row_is_zero_whatever_the_batch_of_the_mask():
    q, k, v = arrays((2, 3, 1, 4), (2, 5, 1, 4), (2, 5, 1, 4))
    mask = masks.cross(jnp.array([[1, 0, 1]]), jnp.array([[1, 1, 0, 1, 0]]))
    out = attend(q, k, v, mask)
    assert (out[:, 1] == 0).all() and (out[:, 0] != 0).all()


def test_wrong_heads_say_what_is_wrong():
    q, k, v = arrays((1, 3, 4, 8), (1, 3, 3, 8), (1, 3, 3, 8))
    with pytest.raises(ValueError, match="4 query heads are no multiple of 3"):
        attend(q, k, v)
    with pytest.raises(ValueError, match="5 heads do not divide a width of 32"):
        Attention(32, 5, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="4 query heads are no multiple of 3"):
        Attention(32, 4, kv_heads=3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="even number"):
        Rope(1e4).rotation(jnp.zeros((1, 1), jnp.int32), 3)
    with pytest.raises(ValueError, match="did you mean 'rmsnorm'"):
        Attention(32, 4, qk_norm="rms_norm", rngs=nnx.Rngs(0))


def test_a_sample_does_not_depend_on_its_neighbours_nor_on_padding():
    layer = jitted(
        Attention(16, 4, kv_heads=2, qk_norm="rmsnorm", rngs=nnx.Rngs(0)),
        lambda layer, x, valid: layer(
            x,
            mask=masks.blocks(jnp.ones_like(valid), group=valid),
            rotation=Rope(1e4).rotation(jnp.arange(x.shape[1])[None], 4),
        ),
    )
    (x,) = arrays((3, 6, 16))
    valid = jnp.arange(6)[None] < jnp.array([6, 4, 2])[:, None]
    together = layer(x, valid)
    for i, length in enumerate((6, 4, 2)):
        alone = layer(x[i : i + 1, :length], valid[i : i + 1, :length])
        np.testing.assert_allclose(together[i, :length], alone[0], atol=1e-6)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=["multi-head", "grouped"])
@pytest.mark.parametrize("kind", ["none", "causal", "packed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cpu_kernel_is_the_general_one(heads, kind, dtype):
    """Values and gradients, with rows that may attend to nothing."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(2, 6, heads[0], 8), (2, 6, heads[1], 8), (2, 6, heads[1], 8), (2, 6, heads[0], 8)]
    *qkv, cotangent = (
        jax.random.normal(k, s, jnp.float32).astype(dtype)
        for k, s in zip(keys, shapes, strict=True)
    )
    group = jnp.array([[1, 1, 2, 2, 0, 0], [1, 1, 1, 1, 1, 0]], jnp.int32)
    mask = {"none": None, "causal": masks.causal(6), "packed": masks.blocks(group=group)}[kind]
    results = {}
    for kernel in ("xla", "cpu"):
        out, pullback = jax.vjp(lambda *x, k=kernel: attend(*x, mask, kernel=k), *qkv)
        results[kernel] = (out, *pullback(cotangent))
    tolerance = 2e-6 if dtype == "float32" else 3e-2
    for ours, general in zip(results["cpu"], results["xla"], strict=True):
        assert ours.dtype == general.dtype
        np.testing.assert_allclose(
            np.float32(ours), np.float32(general), atol=tolerance, rtol=tolerance
        )
