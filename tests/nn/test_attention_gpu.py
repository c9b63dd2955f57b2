"""Flash attention on a GPU, forward and backward, beside plain attention in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.nn import masks
from mmjax.nn.attention import attend, pick_kernel

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="there is no GPU")

BATCH, LENGTH = 2, 128
SEGMENTS = jnp.asarray(np.repeat([[1, 2, 3, 0]], BATCH, 0).repeat(LENGTH // 4, 1))
MASKS = {
    "none": None,
    "causal": masks.causal(LENGTH),
    "padding": masks.padding(SEGMENTS > 0),
    "packed": masks.blocks(jnp.ones((BATCH, LENGTH), bool), group=SEGMENTS),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 4, 64), (6, 2, 64), (2, 2, 128)])
def test_flash_attention(name, heads, kv_heads, width):
    rng = np.random.default_rng(0)
    shapes = [(BATCH, LENGTH, h, width) for h in (heads, kv_heads, kv_heads)]
    half = [jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes]
    weights = jnp.asarray(rng.normal(size=shapes[0]), jnp.float32)
    mask = MASKS[name]
    assert pick_kernel(half[0], half[1], mask) == "cudnn"

    def run(kernel, inputs):
        def loss(*inputs):
            out = attend(*inputs, mask, kernel=kernel).astype(jnp.float32)
            return jnp.sum(out * weights), out

        (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*inputs)
        return [out, *gradients]

    exact = run("xla", [x.astype(jnp.float32) for x in half])
    for found, expected in zip(run("cudnn", half), exact, strict=True):
        found = np.asarray(found, np.float32)
        assert np.isfinite(found).all()
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found / scale, expected / scale, atol=1e-2)
