"""Contrastive losses against transformers and PyTorch, and the ring against the dense formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mmjax.losses import (
    ring_sigmoid_contrastive,
    ring_softmax_contrastive,
    sigmoid_contrastive,
    softmax_contrastive,
)
from mmjax.registry import UnknownNameError

SCALE, BIAS = 20.0, -7.0
DENSE = {"softmax": softmax_contrastive, "sigmoid": sigmoid_contrastive}
RING = {"softmax": ring_softmax_contrastive, "sigmoid": ring_sigmoid_contrastive}
MESHES = [
    {"data": 1, "fsdp": 1, "tensor": 1},
    {"data": 2, "fsdp": 1, "tensor": 1},
    {"data": 8, "fsdp": 1, "tensor": 1},
    {"data": 1, "fsdp": 8, "tensor": 1},
    {"data": 2, "fsdp": 4, "tensor": 1},
    {"data": 2, "fsdp": 2, "tensor": 2},
]


def arguments(kind, batch=16, width=12, seed=0):
    """Random unit-norm pairs that are somewhat alike, and the scalars of the loss."""
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(batch, width))
    text = 0.7 * image + rng.normal(size=(batch, width))
    image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))
    scalars = {"softmax": (SCALE,), "sigmoid": (SCALE, BIAS)}[kind]
    return tuple(jnp.asarray(x, jnp.float32) for x in (image, text, *scalars))


def mesh_of(shape):
    devices = np.array(jax.devices()[: int(np.prod(list(shape.values())))])
    return jax.sharding.Mesh(devices.reshape(list(shape.values())), tuple(shape))


def value_and_gradients(loss, args):
    """Loss (the ratio) and the gradients with respect to every argument."""

    def ratio(*args):
        numerator, denominator = loss(*args)
        return numerator / denominator

    return jax.jit(jax.value_and_grad(ratio, argnums=tuple(range(len(args)))))(*args)


def torch_value_and_gradients(kind, args):
    torch = pytest.importorskip("torch")
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss

    image, text, *scalars = leaves = [torch.tensor(np.asarray(x), requires_grad=True) for x in args]
    logits = scalars[0] * text @ image.T  # logits_per_text, as transformers computes them
    if kind == "softmax":
        loss = image_text_contrastive_loss(logits)
    else:  # SiglipModel.forward, return_loss=True
        logits = logits + scalars[1]
        signs = -torch.ones_like(logits) + 2 * torch.eye(len(logits))
        loss = (-torch.nn.functional.logsigmoid(signs * logits).sum(dim=-1)).mean()
    loss.backward()
    return loss.detach().numpy(), tuple(leaf.grad.numpy() for leaf in leaves)


def assert_equal(got, expected, tolerance):
    np.testing.assert_allclose(got[0], expected[0], rtol=tolerance)
    for gradient, reference in zip(got[1], expected[1], strict=True):
        size = np.abs(reference).max()
        np.testing.assert_allclose(gradient, reference, rtol=0, atol=tolerance * max(size, 1e-3))


@pytest.mark.torch
@pytest.mark.parametrize("kind", DENSE)
def test_dense_equals_transformers(kind):
    args = arguments(kind)
    expected = torch_value_and_gradients(kind, args)
    assert_equal(value_and_gradients(DENSE[kind], args), expected, 3e-6)


@pytest.mark.parametrize("shape", MESHES, ids=lambda s: ",".join(f"{k}={v}" for k, v in s.items()))
@pytest.mark.parametrize("kind", RING)
def test_ring_equals_dense(kind, shape):
    args = arguments(kind)
    mesh = mesh_of(shape)
    features = NamedSharding(mesh, P(("data", "fsdp")))
    image, text, *scalars = args
    placed = (
        *jax.device_put((image, text), features),
        *jax.device_put(scalars, NamedSharding(mesh, P())),
    )

    def ring(*args):
        return RING[kind](*args, mesh=mesh, axes=("data", "fsdp"))

    expected = value_and_gradients(DENSE[kind], args)
    got = value_and_gradients(ring, placed)
    assert_equal(got, expected, 1e-5)
    assert got[1][0].sharding.is_equivalent_to(features, 2)
    # Without gradients another, cheaper, program runs.
    numerator, denominator = jax.jit(ring)(*placed)
    np.testing.assert_allclose(numerator / denominator, expected[0], rtol=1e-6)
    assert denominator == len(image)


@pytest.mark.parametrize("kind", RING)
def test_ring_passes_the_cotangent_on(kind):
    """The gradient of a function of the loss, as with gradient accumulation."""
    args, mesh = arguments(kind), mesh_of(MESHES[1])

    def squared(loss, *args):
        return loss(*args)[0] ** 2

    def ring(*args):
        return RING[kind](*args, mesh=mesh, axes="data")

    got = jax.grad(lambda *a: squared(ring, *a))(*args)
    expected = jax.grad(lambda *a: squared(DENSE[kind], *a))(*args)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.torch
@pytest.mark.parametrize("kind", RING)
def test_stable_at_the_largest_scale(kind):
    """CLIP's clamp allows 100; opposite features then have logits of -100 to 100 and more."""
    image, text, _, *bias = arguments(kind)
    args = (image, -text, jnp.float32(1000.0), *bias)
    mesh = mesh_of(MESHES[2])
    expected = torch_value_and_gradients(kind, args)
    for loss in (DENSE[kind], lambda *a: RING[kind](*a, mesh=mesh, axes=("data", "fsdp"))):
        got = value_and_gradients(loss, args)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))
        assert_equal(got, expected, 1e-4)


@pytest.mark.parametrize("kind", RING)
def test_bfloat16_features_are_computed_in_float32(kind):
    image, text, *scalars = arguments(kind)
    image, text = image.astype(jnp.bfloat16), text.astype(jnp.bfloat16)
    mesh = mesh_of(MESHES[1])
    ring = value_and_gradients(
        lambda *a: RING[kind](*a, mesh=mesh, axes="data"), (image, text, *scalars)
    )
    exact = value_and_gradients(
        DENSE[kind], (image.astype(jnp.float32), text.astype(jnp.float32), *scalars)
    )
    np.testing.assert_allclose(ring[0], exact[0], rtol=1e-6)
    assert ring[1][0].dtype == jnp.bfloat16


def test_perfect_and_chance_values():
    """Identical orthogonal pairs cost nothing at a large scale, indistinguishable ones log B."""
    eye = jnp.eye(8)
    numerator, denominator = softmax_contrastive(eye, eye, jnp.float32(100.0))
    assert numerator / denominator < 1e-6
    numerator, denominator = softmax_contrastive(eye, eye, jnp.float32(0.0))
    np.testing.assert_allclose(numerator / denominator, np.log(8), rtol=1e-6)
    numerator, denominator = sigmoid_contrastive(eye, eye, jnp.float32(0.0), jnp.float32(0.0))
    np.testing.assert_allclose(numerator / denominator, 8 * np.log(2), rtol=1e-6)


def test_bad_input():
    image, text, scale = arguments("softmax")
    mesh = mesh_of(MESHES[2])
    with pytest.raises(ValueError, match="multiple of 8"):
        ring_softmax_contrastive(image[:6], text[:6], scale, mesh, ("data",))
    with pytest.raises(UnknownNameError, match="did you mean 'data'"):
        ring_softmax_contrastive(image, text, scale, mesh, ("date",))


TOWER = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)


@pytest.mark.torch
@pytest.mark.parametrize("kind", DENSE)
def test_equals_the_loss_of_transformers_models(kind):
    """`return_loss=True` of CLIPModel and SiglipModel, from the features that they return."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    prefix = {"softmax": "CLIP", "sigmoid": "Siglip"}[kind]
    config = getattr(transformers, f"{prefix}Config")(
        text_config=dict(TOWER, vocab_size=50, max_position_embeddings=8),
        vision_config=dict(TOWER, image_size=16, patch_size=8),
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}Model")(config).eval()
    with torch.no_grad():
        output = model(
            input_ids=torch.randint(0, 50, (6, 8)),
            pixel_values=torch.randn(6, 3, 16, 16),
            return_loss=True,
        )
    scalars = [model.logit_scale.exp()] + ([model.logit_bias] if kind == "sigmoid" else [])
    args = (output.image_embeds, output.text_embeds, *[x.reshape(()) for x in scalars])
    numerator, denominator = DENSE[kind](*[jnp.asarray(x.detach().numpy()) for x in args])
    np.testing.assert_allclose(numerator / denominator, output.loss.numpy(), rtol=2e-6)


@pytest.mark.parametrize("kind", RING)
def test_ring_memory_is_flat_in_the_number_of_devices(kind):
    from experiments._bench_loss import collectives, compile_loss

    def temporary(ring, devices):
        compiled = compile_loss(kind, ring, devices, local_batch=64, width=32)
        return compiled.memory_analysis().temp_size_in_bytes, collectives(compiled)

    ring = {devices: temporary(True, devices) for devices in (2, 8)}
    dense = {devices: temporary(False, devices) for devices in (2, 8)}
    assert ring[8][0] <= 1.05 * ring[2][0]
    assert dense[8][0] >= 2 * dense[2][0]
    assert not {"all-gather", "all-to-all", "reduce-scatter"} & ring[8][1].keys()
