"""FLOPs are counted as papers do: matrix products, causal attention half, no credit for remat."""

import jax
import jax.numpy as jnp
import pytest
import tiny

from mmjax import sharding
from mmjax.flops import matmul_flops
from mmjax.nn import masks
from mmjax.nn.attention import attend
from mmjax.train.experiment import prepare


def test_products_loops_and_convolutions():
    a, b = jnp.ones((4, 8)), jnp.ones((8, 16))
    assert matmul_flops(lambda a, b: jnp.sin(a @ b), a, b) == 2 * 4 * 8 * 16

    def loop(a):
        return jax.lax.scan(lambda c, _: (c @ jnp.ones((8, 8)), None), a, length=5)[0]

    assert matmul_flops(jax.jit(loop), a) == 5 * 2 * 4 * 8 * 8
    # Forward and backward of a product by a weight: three products, or two for the input alone.
    assert matmul_flops(jax.grad(lambda b: jnp.sum((a @ b) ** 2)), b) == 2 * 2 * 4 * 8 * 16

    # What is not used is not run.
    assert matmul_flops(lambda a, b: (a @ b, (2 * a) @ b)[1], a, b) == 2 * 4 * 8 * 16

    image, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 5))
    convolve = jax.lax.conv_general_dilated
    dims = ("NHWC", "HWIO", "NHWC")
    flops = matmul_flops(
        lambda x, k: convolve(x, k, (1, 1), "SAME", dimension_numbers=dims), image, kernel
    )
    assert flops == 2 * (2 * 8 * 8 * 5) * (3 * 3 * 3)


@pytest.mark.parametrize("kernel", ["xla", "cpu"])
def test_causal_attention_counts_half_also_backwards(kernel):
    q = jnp.ones((1, 6, 2, 4))

    def loss(q, mask):
        return jnp.sum(attend(q, q, q, mask, kernel=kernel))

    causal = masks.causal(6)
    for function in (loss, jax.grad(loss)):
        full = matmul_flops(lambda q, f=function: f(q, None), q)
        assert matmul_flops(lambda q, f=function: f(q, causal), q) == full / 2 > 0


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(sharding.MeshConfig(1, 1, 1), jax.devices()[:1])


def step_flops(mesh, **groups):
    model = {"name": "siglip", "image": dict(tiny.VIT), "text": dict(tiny.TEXT)}
    for tower in ("image", "text"):
        model[tower] |= groups.pop(tower, {})
    image = dict(preset="siglip", size=16)
    data = dict(train=dict(sources=[dict(name="digits")], image=image, text=dict(max_len=8)))
    config = tiny.contrastive(model=model, data=data, **groups)
    experiment = prepare(config, mesh)
    return experiment.step_flops(experiment.batch_shapes())


def test_recomputation_earns_no_credit(mesh):
    plain = step_flops(mesh)
    assert step_flops(mesh, image=dict(remat="full"), text=dict(remat="dots")) == plain
    assert step_flops(mesh, train=dict(accumulate=4)) == plain


def test_a_frozen_tower_costs_its_forward_pass_only(mesh):
    frozen = step_flops(mesh, rules=dict(trainable=(("image/.*", False), (".*", True))))
    forward = _tower_flops()
    # The first layer's input needs no gradient: forward, and backward to weights and to inputs.
    backward = step_flops(mesh) - frozen
    assert forward < backward <= 2 * forward


def _tower_flops():
    from flax import nnx

    from mmjax.models.vit import ViT, ViTConfig
    from mmjax.params import abstract, merge

    graphdef, shapes = abstract(lambda: ViT(ViTConfig(**tiny.VIT), rngs=nnx.Rngs(0)))
    images = jax.ShapeDtypeStruct((16, 16, 16, 3), jnp.float32)
    return matmul_flops(lambda p, x: merge(graphdef, p)(x).pooled, shapes, images)
