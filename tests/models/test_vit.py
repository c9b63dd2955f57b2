"""ViT against transformers, and what a ViT promises."""

import dataclasses

import hf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from functional import jitted

from mmjax.models import MODELS, ProjectionConfig, ViT, ViTConfig, vit_size

CONFIG = ViTConfig(
    image_size=32,
    patch_size=8,
    width=32,
    depth=2,
    heads=4,
    mlp_width=48,
    activation="gelu",
    norm_eps=1e-6,
    pooling="cls",
    position="learned",
    num_classes=5,
)


def replace(**changes):
    return dataclasses.replace(CONFIG, **changes)


def build(**changes):
    return ViT(replace(**changes), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(np.random.default_rng(0).normal(size=(3, 32, 32, 3)), jnp.float32)


@pytest.fixture(scope="module")
def reference():
    transformers = hf.transformers()
    config = transformers.ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
        num_labels=5,
    )
    return hf.randomise(transformers.ViTForImageClassification(config))


@pytest.mark.torch
def test_logits_tokens_and_gradients_equal_transformers(reference, images):
    torch = pytest.importorskip("torch")
    model = hf.load(reference, hf.VIT, build())
    graph, params = nnx.split(model)
    weight = np.random.default_rng(1).normal(size=(3, 5)).astype(np.float32)

    @jax.jit
    def run(params, images):
        def loss(params):
            out = nnx.merge(graph, params)(images, features=(0, -1))
            return jnp.sum(weight * out.logits), out

        return jax.grad(loss, has_aux=True)(params)

    grads, out = run(params, images)
    reference.zero_grad()
    pixels = torch.tensor(np.asarray(images)).permute(0, 3, 1, 2)
    expected = reference(pixels, output_hidden_states=True)
    (torch.tensor(weight) * expected.logits).sum().backward()
    last = reference.vit(pixels).last_hidden_state
    np.testing.assert_allclose(out.logits, expected.logits.detach(), atol=1e-5)
    np.testing.assert_allclose(out.tokens, last.detach(), atol=1e-5)
    np.testing.assert_allclose(out.pooled, last[:, 0].detach(), atol=1e-5)
    # hidden_states[0] is what enters the first block.
    for feature, state in zip(out.features, (1, 2), strict=True):
        np.testing.assert_allclose(feature, expected.hidden_states[state].detach(), atol=2e-5)
    hf.assert_same_gradients(hf.convert(hf.gradients(reference), hf.VIT, build()), grads)


@pytest.mark.torch
@pytest.mark.parametrize("size", [(48, 48), (16, 56), (24, 32)])
def test_other_resolutions_interpolate_as_transformers_does(reference, size):
    torch = pytest.importorskip("torch")
    images = np.random.default_rng(2).normal(size=(2, *size, 3)).astype(np.float32)
    with torch.no_grad():
        pixels = torch.tensor(np.asarray(images)).permute(0, 3, 1, 2)
        expected = reference(pixels, interpolate_pos_encoding=True).logits
    actual = jitted(hf.load(reference, hf.VIT, build()))(jnp.asarray(images)).logits
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("pooling", ["cls", "mean", "map"])
@pytest.mark.parametrize("position", ["learned", "sincos2d"])
def test_every_pooling_and_position_on_an_oblong_grid(pooling, position):
    model = jitted(build(image_size=(16, 48), pooling=pooling, position=position))
    images = jax.random.normal(jax.random.key(0), (2, 16, 48, 3))
    out = model(images)
    assert out.tokens.shape == (2, 12 + (pooling == "cls"), 32)
    assert out.pooled.shape == (2, 32)
    assert out.logits.shape == (2, 5)
    assert out.features is None
    # Positions matter: the same patches in another order give another result.
    assert not np.allclose(model(images[:, :, ::-1]).pooled, out.pooled, atol=1e-3)


def test_no_pooling_gives_tokens_only():
    out = jitted(build(pooling="none", num_classes=0))(jnp.ones((1, 32, 32, 3)))
    assert out.tokens.shape == (1, 16, 32)
    assert out.pooled is None and out.logits is None


def test_mean_pooling_is_the_mean_of_the_normed_tokens(images):
    out = jitted(build(pooling="mean"))(images)
    np.testing.assert_allclose(out.pooled, np.asarray(out.tokens).mean(1), atol=1e-6)


def test_a_sample_does_not_depend_on_its_neighbours(images):
    model = jitted(build(pooling="map"))
    together = model(images).tokens
    for i in range(3):
        np.testing.assert_allclose(model(images[i : i + 1]).tokens[0], together[i], atol=2e-6)


def test_bfloat16_computes_in_it_and_returns_float32_logits(images):
    full = build(num_classes=0)
    half = ViT(replace(num_classes=0, dtype="bfloat16"), rngs=nnx.Rngs(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(half))} == {jnp.dtype("float32")}
    out = jitted(half)(images)
    assert out.tokens.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        out.tokens.astype(jnp.float32), jitted(full)(images).tokens, atol=0.1
    )
    assert jitted(build(dtype="bfloat16"))(images).logits.dtype == jnp.float32


def test_patch_dropout_and_stochastic_depth_need_a_key(images):
    model = build(patch_dropout=0.5, drop_path=0.5)
    np.testing.assert_array_equal(jitted(model)(images).tokens, jitted(build())(images).tokens)
    dropped = jitted(model, lambda model, images, rng: model(images, rng=rng))
    one = dropped(images, jax.random.key(1))
    same = dropped(images, jax.random.key(1))
    other = dropped(images, jax.random.key(2))
    assert one.tokens.shape == (3, 1 + 8, 32)
    np.testing.assert_array_equal(one.tokens, same.tokens)
    assert not np.allclose(one.tokens, other.tokens)


def test_initialisation_under_jit_and_as_shapes_only():
    def params():
        return nnx.state(build())

    eager = params()
    shapes = nnx.state(nnx.eval_shape(build))
    compiled = jax.jit(params)()
    described = jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    assert described == jax.tree.map(lambda x: (x.shape, x.dtype), compiled)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), eager, compiled)
    # Blocks differ from each other, and each has the spread of its own width.
    kernels = eager["encoder"]["layers"]["attention"]["query"]["kernel"][...]
    assert kernels.shape == (2, 32, 32)
    assert np.unique(kernels).size > 2000
    np.testing.assert_allclose(np.std(kernels, axis=(1, 2)), (2 / 64) ** 0.5, rtol=0.1)


# Parameters as published for 1,000 classes: torchvision (B/16, B/32, L/16, H/14) and timm.
@pytest.mark.parametrize(
    ("size", "count"),
    [
        ("Ti/16", 5_717_416),
        ("S/16", 22_050_664),
        ("B/16", 86_567_656),
        ("B/32", 88_224_232),
        ("L/16", 304_326_632),
        ("H/14", 632_045_800),
    ],
)
def test_sizes_have_the_published_number_of_parameters(size, count):
    config = replace(image_size=224, num_classes=1000, **vit_size(size))
    model = nnx.eval_shape(lambda: ViT(config, rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model))) == count


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 5}, "5 heads do not divide a width of 32"),
        ({"image_size": 30}, "32 x 32|24 x 24"),
        ({"pooling": "clz"}, "did you mean 'cls'"),
        ({"position": "learnt"}, "did you mean 'learned'"),
        ({"activation": "gelu_tan"}, "did you mean 'gelu_tanh'"),
        ({"remat": "ful"}, "did you mean 'full'"),
        ({"dtype": "bf16"}, "bfloat16"),
        ({"drop_path": 1.0}, "drop_path=1.0"),
        ({"patch_dropout": -0.1}, "patch_dropout=-0.1"),
        ({"pooling": "none"}, "num_classes=5"),
        ({"depth": 0}, "at least one block"),
        ({"registers": 2, "pooling": "mean"}, "registers=2 .* need a class token"),
        ({"head_input": "patch"}, "did you mean 'patches'"),
        ({"head_input": "cls_and_patches", "pooling": "map"}, "need a class token"),
        ({"interpolation": "cubic"}, "did you mean 'bicubic'"),
        (
            {"pooling": "none", "num_classes": 0, "projection": ProjectionConfig(8)},
            "projection needs a pooled vector",
        ),
    ],
)
def test_bad_configs_say_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: build(**changes))


def test_bad_images_say_what_is_wrong():
    model = build()
    with pytest.raises(ValueError, match=r"not divisible into patches of 8.*32 x 40"):
        model(jnp.ones((1, 32, 45, 3)))
    with pytest.raises(ValueError, match="4 channels where the model has 3"):
        model(jnp.ones((1, 32, 32, 4)))
    with pytest.raises(ValueError, match="needs a mask token"):
        model(jnp.ones((1, 32, 32, 3)), masked=jnp.ones((1, 16), bool))
    with pytest.raises(ValueError, match="no block 2 in a stack of 2"):
        model(jnp.ones((1, 32, 32, 3)), features=(2,))


@pytest.mark.parametrize(
    ("head_input", "width"),
    [("pooled", 8), ("patches", 32), ("raw_patches", 32), ("cls_and_patches", 64)],
)
def test_what_the_head_sees(images, head_input, width):
    """Registers and the class token are no patches; a square image size is one number."""
    changes = {"registers": 3, "projection": ProjectionConfig(8), "image_size": (32, 32)}
    model = build(**changes, head_input=head_input)
    assert model.config.image_size == 32
    assert model.config.head_width == model.head.kernel.shape[0] == width
    model.head.kernel.set_value(jnp.ones((width, 5)))
    out = jitted(model, _with_last)(images)
    raw, tokens = np.asarray(out.features[0]), np.asarray(out.tokens)
    assert tokens.shape == (3, 1 + 3 + 16, 32)
    expected = {
        "pooled": out.pooled,
        "patches": tokens[:, 4:].mean(1),
        "raw_patches": raw[:, 4:].mean(1),
        "cls_and_patches": np.concatenate([tokens[:, 0], tokens[:, 4:].mean(1)], 1),
    }[head_input]
    np.testing.assert_allclose(out.logits[:, 0], expected.sum(1), atol=2e-5)


def _with_last(model, images):
    return model(images, features=(-1,))


def test_partial_patches_can_be_cropped():
    model = jitted(build(image_size=38, partial_patches="crop"))
    images = jax.random.normal(jax.random.key(0), (1, 38, 38, 3))
    np.testing.assert_array_equal(model(images).tokens, model(images[:, :32, :32]).tokens)


@pytest.mark.parametrize("name", ["Q/16", "S", "S/x", "S/0"])
def test_unknown_sizes_are_errors(name):
    with pytest.raises(ValueError):
        vit_size(name)


def test_the_registry_names_the_models():
    assert MODELS["vit"] == (ViTConfig, ViT)
    with pytest.raises(ValueError, match="did you mean 'siglip'"):
        MODELS["sigclip"]
