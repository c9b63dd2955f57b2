"""Each mask against its definition in words, written out as a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.nn import masks
from mmjax.nn.attention import attend


def by_rule(rule, queries, keys):
    return np.array([[bool(rule(q, k)) for k in range(keys)] for q in range(queries)])


def check(mask, *rules, queries=6, keys=6):
    dense = np.asarray(mask.dense())
    assert dense.dtype == bool and dense.shape == (len(rules), queries, keys)
    for matrix, rule in zip(dense, rules, strict=True):
        np.testing.assert_array_equal(matrix, by_rule(rule, queries, keys))


def test_causal():
    check(masks.causal(6), lambda q, k: k <= q)
    check(masks.causal(6, window=2), lambda q, k: k <= q and q - k < 2)


def test_padding():
    valid = jnp.array([[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1]], bool)
    check(masks.padding(valid), lambda q, k: q < 3 and k < 3, lambda q, k: q > 1 and k > 1)


def test_prefix_lm_with_padding_on_either_side():
    prefix = jnp.array([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]], bool)
    valid = jnp.array([[1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]], bool)
    check(
        masks.prefix_lm(prefix, group=valid),
        lambda q, k: q < 5 and k < 5 and (k <= q or k < 3),
        lambda q, k: q > 0 and k > 0 and (k <= q or k < 4),
    )


def test_images_within_a_causal_stream():
    image = jnp.array([[0, 1, 1, 2, 2, 0]])
    both = ((1, 2), (3, 4))
    check(
        masks.image_blocks(image, group=jnp.ones((1, 6), bool)),
        lambda q, k: k <= q or any(q in pair and k in pair for pair in both),
    )


def test_a_window_looks_back_a_number_of_places():
    image, inside = jnp.array([[0, 1, 1, 1, 0, 0]]), (1, 2, 3)
    check(
        masks.image_blocks(image, group=jnp.ones((1, 6), bool), window=2),
        lambda q, k: (k <= q and q - k < 2) or (q in inside and k in inside),
    )
    with pytest.raises(ValueError, match="window=0"):
        masks.causal(4, window=0)


def test_packed_segments():
    segment = jnp.array([[1, 1, 2, 2, 2, 0]])
    same = [{0, 1}, {2, 3, 4}]
    check(
        masks.blocks(jnp.ones((1, 6), bool), group=segment),
        lambda q, k: k <= q and any(q in s and k in s for s in same),
    )
    check(masks.blocks(group=segment), lambda q, k: any(q in s and k in s for s in same))
    # Two packed prefix-LM samples: each prefix is seen in its own sample only.
    prefix = jnp.array([[1, 0, 1, 1, 0, 0]], bool)
    check(
        masks.prefix_lm(prefix, group=segment),
        lambda q, k: (k <= q or (q, k) == (2, 3)) and any(q in s and k in s for s in same),
    )


def test_cross_attention_to_the_last_image_only():
    """Flamingo: text sees the image before it, and text before the first image sees none."""
    last_image = jnp.array([[0, 0, 1, 1, 2, 2]])
    of_image = jnp.array([[1, 1, 1, 2, 2, 2, 0, 0]])
    check(
        masks.cross(last_image, of_image),
        lambda q, k: (q in (2, 3) and k < 3) or (q in (4, 5) and 3 <= k < 6),
        keys=8,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_with_nothing_to_attend_to_are_zeros_with_finite_gradients(dtype):
    valid = jnp.array([[0, 0, 0, 0], [0, 1, 1, 0]], bool)
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 4, 2, 8), dtype)

    def loss(q, k, v):
        out = attend(q, k, v, masks.padding(valid))
        return jnp.sum(out.astype(jnp.float32)), out

    grads, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    out = np.asarray(out, np.float32)
    assert (out[~valid] == 0).all() and (out[valid] != 0).all()
    for grad in grads:
        grad = np.asarray(grad, np.float32)
        assert np.isfinite(grad).all() and (grad[~valid] == 0).all()


def test_a_mask_goes_through_transformations():
    mask = masks.blocks(jnp.ones((2, 4), bool), group=jnp.ones((2, 4), bool))
    expected = mask.dense()
    np.testing.assert_array_equal(jax.jit(lambda m: m.dense())(mask), expected)
    one = jax.vmap(lambda m: jax.tree.map(lambda x: x[None], m).dense()[0])(mask)
    np.testing.assert_array_equal(one, expected)
    assert jax.jit(lambda m: m)(masks.causal(3)).triangle
