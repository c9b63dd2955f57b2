"""The scanned stack: against a loop over its blocks, and against decoders of transformers."""

import dataclasses

import hf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from functional import jitted

from mmjax.nn import masks
from mmjax.nn.rope import Rope
from mmjax.nn.stack import REMAT, Block, BlockConfig, LayerKind, Layers, Stack

CONFIG = BlockConfig(
    width=16, heads=2, mlp_width=24, activation="gelu", norm="layernorm", norm_eps=1e-6
)
DEPTH = 3


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(3), (2, 5, 16))


def build(**options):
    return Stack(CONFIG, DEPTH, **options, rngs=nnx.Rngs(0))


def loop(stack, x, mask=None):
    """The outputs of all blocks, one after the other, without a scan."""
    graph, params = nnx.split(stack.layers)
    outputs = []
    for layer in range(DEPTH):
        x = nnx.merge(graph, jax.tree.map(lambda leaf, i=layer: leaf[i], params))(x, mask=mask)
        outputs.append(x)
    return outputs


def test_the_scan_equals_a_loop(x):
    mask = masks.causal(5)
    outputs = jitted(build(), loop, mask=mask)(x)
    for unroll in (1, DEPTH):
        out = jitted(build(unroll=unroll), mask=mask)(x)
        np.testing.assert_allclose(out, outputs[-1], atol=1e-6)


def test_features_are_the_outputs_of_the_chosen_blocks(x):
    outputs = jitted(build(), loop)(x)
    out, features = jitted(build(), Stack.run, features=(-1, 0, -2, 0))(x)
    np.testing.assert_allclose(out, outputs[-1], atol=1e-6)
    for feature, block in zip(features, (2, 0, 1, 0), strict=True):
        np.testing.assert_allclose(feature, outputs[block], atol=1e-6)
    with pytest.raises(ValueError, match="no block -4 in a stack of 3: choose from -3 to 2"):
        build().run(x, (-4,))


def test_every_remat_policy_gives_the_same_gradients(x):
    def gradients(remat, unroll=1):
        graph, params = nnx.split(build(remat=remat, drop_path=0.5, unroll=unroll))

        def loss(params, x, rng):
            out, taken = nnx.merge(graph, params).run(x, (0, -1), rng=rng)
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(taken))

        return jax.jit(jax.grad(loss))(params, x, jax.random.key(0))

    expected = gradients("none")
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected)) > 0.1
    runs = [gradients(name) for name in REMAT if name != "none"]
    for actual in [*runs, gradients("full", unroll=DEPTH)]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), expected, actual)


def test_remat_keeps_less(x):
    """What the forward pass hands to the backward pass, in bytes."""
    x = jax.random.normal(jax.random.key(3), (4, 32, 16))

    def residuals(remat):
        graph, params = nnx.split(build(remat=remat))
        _, pull = jax.eval_shape(lambda p, x: jax.vjp(nnx.merge(graph, p), x), params, x)
        return sum(leaf.size for leaf in jax.tree.leaves(pull))

    sizes = [residuals(name) for name in ("full", "dots", "all_dots", "none")]
    assert sizes == sorted(sizes) and len(set(sizes)) == 4


def count_equations(jaxpr):
    inner = [
        sub.jaxpr if hasattr(sub, "jaxpr") else sub
        for equation in jaxpr.eqns
        for value in equation.params.values()
        for sub in (value if isinstance(value, tuple | list) else (value,))
        if hasattr(sub, "jaxpr") or hasattr(sub, "eqns")
    ]
    return len(jaxpr.eqns) + sum(count_equations(sub) for sub in inner)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_depth_does_not_lengthen_the_program(x, remat):
    def equations(depth):
        stack = nnx.eval_shape(lambda: Stack(CONFIG, depth, remat=remat, rngs=nnx.Rngs(0)))
        graph, params = nnx.split(stack)

        def loss(params, x):
            return jnp.sum(nnx.merge(graph, params)(x))

        return count_equations(jax.make_jaxpr(jax.value_and_grad(loss))(params, x).jaxpr)

    assert equations(24) == equations(4) > 100


def test_stochastic_depth_drops_later_blocks_more_often():
    """The first block is never dropped; the last is, for about its rate of the samples."""
    stack = build(drop_path=0.5)
    x = jnp.broadcast_to(jax.random.normal(jax.random.key(0), (1, 2, 16)), (2000, 2, 16))
    run = jitted(stack, lambda stack, x, rng: stack.run(x, (0, 1, 2), rng=rng)[1])
    first, middle, last = (np.asarray(f) for f in run(x, jax.random.key(1)))
    still = jitted(stack, lambda stack, x: stack.run(x, (0,))[1])(x)
    np.testing.assert_allclose(first, still[0], atol=1e-6)
    # Both branches of the last block are dropped for a quarter of the samples: no change at all.
    unchanged = np.isclose(last, middle, atol=0).all(axis=(1, 2)).mean()
    np.testing.assert_allclose(unchanged, 0.25, atol=0.04)
    unchanged = np.isclose(middle, first, atol=0).all(axis=(1, 2)).mean()
    np.testing.assert_allclose(unchanged, 0.25**2, atol=0.03)


DECODER = BlockConfig(
    width=32,
    heads=4,
    mlp_width=48,
    activation="silu",
    norm="rmsnorm",
    norm_eps=1e-5,
    kv_heads=2,
    head_dim=8,
    gated=True,
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
)
ROPE = Rope(10_000.0)


def hf_decoder(family, **options):
    """The counterpart of two blocks of `DECODER` in transformers."""
    transformers = hf.transformers()
    config = getattr(transformers, f"{family}Config")(
        vocab_size=8,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        hidden_act="silu",
        rms_norm_eps=1e-5,
        max_position_embeddings=64,
        rope_theta=10_000.0,
        attn_implementation="eager",
        **options,
    )
    return hf.randomise(getattr(transformers, f"{family}Model")(config))


@pytest.mark.torch
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Mistral"])
def test_a_decoder_equals_transformers(family):
    """Causal mask, left padding, window, rotary, grouped queries, gates and norms."""
    torch = pytest.importorskip("torch")
    window = {"sliding_window": 4} if family == "Mistral" else {}
    reference = hf_decoder(family, **window)
    config = dataclasses.replace(DECODER, qk_norm="rmsnorm" if family == "Qwen3" else None)
    inner = {k: v for k, v in hf.weights(reference).items() if k.startswith("layers")}
    stack = Stack(config, 2, rngs=nnx.Rngs(0))
    nnx.update(stack, hf.convert(inner, hf.DECODER, stack))

    x = np.random.default_rng(0).normal(size=(2, 9, 32)).astype(np.float32)
    valid = np.arange(9)[None] >= np.array([0, 3])[:, None]
    states = []
    hook = reference.layers[-1].register_forward_hook(lambda _, __, out: states.append(out))
    with torch.no_grad():
        reference(
            inputs_embeds=torch.tensor(x),
            attention_mask=torch.tensor(valid, dtype=torch.long),
            position_ids=torch.arange(9)[None],
        )
    hook.remove()
    expected = (states[0][0] if isinstance(states[0], tuple) else states[0]).numpy()

    mask = masks.blocks(
        jnp.ones((2, 9), bool), group=jnp.asarray(valid), window=window.get("sliding_window")
    )
    rotation = ROPE.rotation(jnp.arange(9)[None], DECODER.head_dim)
    actual = jitted(stack, mask=mask, rotation=rotation)(jnp.asarray(x))
    np.testing.assert_allclose(actual[valid], expected[valid], atol=1e-5)


def test_packed_samples_equal_samples_on_their_own():
    stack = Stack(DECODER, 2, rngs=nnx.Rngs(0))
    call = jitted(
        stack,
        lambda stack, x, group, positions: stack(
            x,
            mask=masks.blocks(jnp.ones(group.shape, bool), group=group),
            rotation=ROPE.rotation(positions, DECODER.head_dim),
        ),
    )
    x = jax.random.normal(jax.random.key(0), (1, 8, 32))
    packed = call(x, jnp.array([[1, 1, 1, 2, 2, 2, 2, 0]]), jnp.array([[0, 1, 2, 0, 1, 2, 3, 0]]))
    for start, end in ((0, 3), (3, 7)):
        length = end - start
        alone = call(x[:, start:end], jnp.ones((1, length), jnp.int32), jnp.arange(length)[None])
        np.testing.assert_allclose(packed[:, start:end], alone, atol=1e-5)


def test_bad_stacks_say_what_is_wrong():
    with pytest.raises(ValueError, match="did you mean 'dots'"):
        build(remat="dot")
    with pytest.raises(ValueError, match=r"drop_path=1\.5"):
        build(drop_path=1.5)


def test_blocks_are_initialised_one_by_one():
    """Each layer is what a block makes of its own key."""
    stack = build()
    key = jax.random.split(nnx.Rngs(0).params(), DEPTH)[1]
    block = Block(CONFIG, rngs=nnx.Rngs(key))
    np.testing.assert_array_equal(stack.layers.mlp.up.kernel[1], block.mlp.up.kernel[...])


LOCAL_GLOBAL = (0, 1, 0)  # which kind each layer is of


def kinds(positions):
    """Local layers with a window and a faster rotation between global ones."""
    rotations = [Rope(theta).rotation(positions, DECODER.head_dim) for theta in (100.0, 1e4)]
    return Layers(
        (LayerKind(3, rotations[0], 0.3), LayerKind(None, rotations[1], 0.4)), LOCAL_GLOBAL
    )


def decoder(**options):
    config = dataclasses.replace(DECODER, softcap=5.0, qk_norm="rmsnorm", **options)
    return Stack(config, 3, rngs=nnx.Rngs(1))


def one_by_one(stack, x, layers):
    """A loop over the blocks, each with the mask, rotation and scale of its kind."""
    graph, params = nnx.split(stack.layers)
    for layer, kind in enumerate(layers.index):
        window, rotation, scale = layers.kinds[kind]
        block = nnx.merge(graph, jax.tree.map(lambda leaf, i=layer: leaf[i], params))
        mask = masks.causal(x.shape[1], window=window)
        x = block(x, mask=mask, rotation=rotation, scale=scale)
    return x


@pytest.mark.parametrize("placement", ["pre", "post", "sandwich"])
def test_kinds_of_layers_and_steps_equal_a_loop(placement):
    """The scan over layers of two kinds, and decoding token by token after a prefill."""
    stack = decoder(norm_placement=placement)
    x = jax.random.normal(jax.random.key(0), (2, 7, 32))
    positions = jnp.arange(7)[None]
    expected = jax.jit(lambda x: one_by_one(stack, x, kinds(positions)))(x)

    @jax.jit
    def scanned(x):
        return stack.run(x, (), mask=masks.causal(7, window=1), layers=kinds(positions))[0]

    np.testing.assert_allclose(scanned(x), expected, atol=1e-5)

    @jax.jit
    def prefill(x):
        mask, layers = masks.causal(4, window=1), kinds(positions[:, :4])
        return stack.prefill(x, 8, mask=mask, layers=layers)

    out, caches = prefill(x[:, :4])
    np.testing.assert_allclose(out, expected[:, :4], atol=1e-5)
    for chosen in (stack, stack.unstack()):

        @jax.jit
        def step(x, caches, slot, chosen=chosen):
            place = jnp.arange(8, dtype=jnp.int32)[None]
            query = masks.Labels(jnp.ones((1, 1), jnp.int32), None, slot[None, None])
            key = masks.Labels((place <= slot).astype(jnp.int32), None, place)
            layers = kinds(slot[None, None])
            return chosen.step(x, caches, slot, mask=masks.Mask(query, key), layers=layers)

        now = caches
        for slot in range(4, 7):
            out, now = step(x[:, slot : slot + 1], now, jnp.int32(slot))
            np.testing.assert_allclose(out[:, 0], expected[:, slot], atol=1e-5)


def test_windows_need_positions():
    with pytest.raises(ValueError, match="made with a window"):
        decoder().run(
            jnp.zeros((1, 7, 32)), (), mask=masks.causal(7), layers=kinds(jnp.arange(7)[None])
        )


def test_layer_scale_scales_the_branches():
    config = dataclasses.replace(CONFIG, layer_scale=True)
    block = Block(config, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 3, 16))
    block.attention_scale[...] = jnp.zeros(16)
    block.mlp_scale[...] = jnp.full(16, 0.5)
    np.testing.assert_allclose(block(x), x + 0.5 * block.mlp(block.mlp_norm(x)), atol=1e-6)


def test_unknown_placement_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'sandwich'"):
        dataclasses.replace(CONFIG, norm_placement="sandwitch")
