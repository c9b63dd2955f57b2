"""CLIP and SigLIP against transformers, and what both promise."""

import dataclasses

import hf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from functional import jitted

from mmjax.models import (
    CLIP,
    CLIPConfig,
    SigLIP,
    SigLIPConfig,
    TextConfig,
    TextTransformer,
    ViTConfig,
    text_size,
    vit_size,
)

TINY = {"width": 32, "depth": 2, "heads": 4, "mlp_width": 48}
TINY_HF = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
EOS = 37


def clip_config(activation="quick_gelu", pooling="argmax", image=None, text=None):
    return CLIPConfig(
        image=ViTConfig(
            **{"image_size": 32, "patch_size": 8, **TINY, **(image or {})},
            activation=activation,
            norm_eps=1e-5,
            pooling="cls",
            position="learned",
            pre_norm=True,
            patch_bias=False,
        ),
        text=TextConfig(
            **{"vocab_size": 50, "max_len": 12, **TINY, **(text or {})},
            activation=activation,
            norm_eps=1e-5,
            attention="causal",
            pooling=pooling,
            padding="attend",
            eos_id=EOS if pooling == "eos" else None,
        ),
        embed_dim=16,
    )


def siglip_config(image=None, text=None):
    return SigLIPConfig(
        image=ViTConfig(
            **{"image_size": 32, "patch_size": 8, **TINY, **(image or {})},
            activation="gelu_tanh",
            norm_eps=1e-6,
            pooling="map",
            position="learned",
        ),
        text=TextConfig(
            **{"vocab_size": 50, "max_len": 12, **TINY, **(text or {})},
            activation="gelu_tanh",
            norm_eps=1e-6,
            attention="bidirectional",
            pooling="last",
            padding="attend",
        ),
    )


def hf_clip(activation, eos_token_id):
    transformers = hf.transformers()
    shared = {**TINY_HF, "hidden_act": activation, "layer_norm_eps": 1e-5}
    config = transformers.CLIPConfig(
        text_config={
            **shared,
            "vocab_size": 50,
            "max_position_embeddings": 12,
            "eos_token_id": eos_token_id,
            "bos_token_id": 0,
            "pad_token_id": 1,
        },
        vision_config={**shared, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    return hf.randomise(transformers.CLIPModel(config))


def hf_siglip():
    transformers = hf.transformers()
    shared = {**TINY_HF, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
    config = transformers.SiglipConfig(
        text_config={
            **shared,
            "vocab_size": 50,
            "max_position_embeddings": 12,
            "projection_size": 32,
        },
        vision_config={**shared, "image_size": 32, "patch_size": 8},
    )
    return hf.randomise(transformers.SiglipModel(config))


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(3, 32, 32, 3)).astype(np.float32)
    tokens = rng.integers(2, EOS, (4, 12)).astype(np.int32)
    for row, end in enumerate((3, 7, 11, 5)):
        tokens[row, end:] = EOS  # padded with the end-of-text token, as CLIP's tokenizer does
    return jnp.asarray(images), jnp.asarray(tokens)


def check_parity(reference, model, batch):
    """Embeddings and logits to 1e-5, gradients of all parameters to 1e-3."""
    torch = pytest.importorskip("torch")
    images, tokens = batch
    graph, params = nnx.split(hf.load(reference, hf.TOWERS, model))
    weight = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)

    @jax.jit
    def run(params, images, tokens):
        def loss(params):
            model = nnx.merge(graph, params)
            logits = model(images, tokens)
            out = logits, model.encode_image(images), model.encode_text(tokens)
            return jnp.sum(weight * logits), out

        return jax.grad(loss, has_aux=True)(params)

    grads, (logits, image, text) = run(params, images, tokens)
    expected = reference(
        pixel_values=torch.tensor(np.asarray(images)).permute(0, 3, 1, 2),
        input_ids=torch.tensor(np.asarray(tokens), dtype=torch.long),
    )
    reference.zero_grad()
    (torch.tensor(weight) * expected.logits_per_image).sum().backward()
    np.testing.assert_allclose(image, expected.image_embeds.detach(), atol=1e-6)
    np.testing.assert_allclose(text, expected.text_embeds.detach(), atol=1e-6)
    np.testing.assert_allclose(logits, expected.logits_per_image.detach(), atol=2e-5)
    hf.assert_same_gradients(hf.convert(hf.gradients(reference), hf.TOWERS, model), grads)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("activation", "pooling"), [("quick_gelu", "argmax"), ("gelu", "argmax"), ("gelu", "eos")]
)
def test_clip_equals_transformers(activation, pooling, batch):
    # A config of before transformers PR 24773 says 2, and means the largest id.
    reference = hf_clip(activation, EOS if pooling == "eos" else 2)
    check_parity(reference, CLIP(clip_config(activation, pooling), rngs=nnx.Rngs(0)), batch)


@pytest.mark.torch
def test_siglip_equals_transformers(batch):
    check_parity(hf_siglip(), SigLIP(siglip_config(), rngs=nnx.Rngs(0)), batch)


@pytest.mark.torch
def test_eos_pooling_finds_the_first_end_and_argmax_the_largest_id(batch):
    """With ids above the end-of-text token the two differ, as in transformers."""
    torch = pytest.importorskip("torch")
    tokens = batch[1].at[:, 1].set(45)
    for pooling, eos_token_id in (("eos", EOS), ("argmax", 2)):
        reference = hf_clip("gelu", eos_token_id)
        model = hf.load(reference, hf.TOWERS, CLIP(clip_config("gelu", pooling), rngs=nnx.Rngs(0)))
        with torch.no_grad():
            expected = reference.text_model(
                torch.tensor(np.asarray(tokens), dtype=torch.long)
            ).pooler_output
        np.testing.assert_allclose(jitted(model.text)(tokens).pooled, expected, atol=1e-5)


@pytest.mark.torch
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_masked_padding_equals_transformers(attention, batch):
    torch = pytest.importorskip("torch")
    tokens = batch[1]
    mask = np.arange(12)[None] <= np.array([3, 7, 11, 5])[:, None]
    reference, config, name = {
        "causal": lambda: (hf_clip("gelu", 2), clip_config("gelu"), CLIP),
        "bidirectional": lambda: (hf_siglip(), siglip_config(), SigLIP),
    }[attention]()
    pooling = {"pooling": "argmax"} if attention == "causal" else {"pooling": "mean"}
    config = dataclasses.replace(
        config, text=dataclasses.replace(config.text, padding="mask", **pooling)
    )
    model = hf.load(reference, hf.TOWERS, name(config, rngs=nnx.Rngs(0)))
    with torch.no_grad():
        expected = reference.text_model(
            torch.tensor(np.asarray(tokens), dtype=torch.long),
            attention_mask=torch.tensor(mask, dtype=torch.long),
        ).last_hidden_state.numpy()
    actual = jitted(model.text)(tokens, jnp.asarray(mask)).tokens
    np.testing.assert_allclose(actual[mask], expected[mask], atol=1e-5)


@pytest.fixture(scope="module")
def models():
    return {
        "clip": CLIP(clip_config(), rngs=nnx.Rngs(0)),
        "siglip": SigLIP(siglip_config(), rngs=nnx.Rngs(0)),
    }


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_embeddings_are_unit_and_logits_apply_scale_and_bias(models, name, batch):
    model, (images, tokens) = models[name], batch
    image = jitted(model, type(model).encode_image)(images)
    text = jitted(model, type(model).encode_text)(tokens)
    scale, bias = model.scale_and_bias()
    np.testing.assert_allclose(jnp.linalg.norm(image, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(jnp.linalg.norm(text, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(
        jitted(model)(images, tokens), scale * image @ text.T + bias, rtol=1e-5
    )
    expected = {"clip": (1 / 0.07, 0.0), "siglip": (10.0, -10.0)}[name]
    np.testing.assert_allclose((scale, bias), expected, rtol=1e-6)
    assert scale.shape == bias.shape == ()


def test_clip_clamps_its_scale_and_finds_back(models):
    model = models["clip"]
    graph, params = nnx.split(model)

    def scale(params, sign):
        return sign * nnx.merge(graph, params).scale_and_bias()[0]

    high = jax.tree.map(lambda x: x, params)
    high["logit_scale"] = high["logit_scale"].replace(jnp.asarray(5.0))
    np.testing.assert_allclose(scale(high, 1.0), 100.0, rtol=1e-6)
    # A descending step would raise the scale further: no gradient. Lowering it is possible.
    assert jax.grad(scale)(high, -1.0)["logit_scale"][...] == 0
    np.testing.assert_allclose(jax.grad(scale)(high, 1.0)["logit_scale"][...], 100.0, rtol=1e-6)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_a_text_does_not_depend_on_its_neighbours(models, name, batch):
    model, (_, tokens) = models[name], batch
    encode = jitted(model, type(model).encode_text)
    together = encode(tokens)
    alone = jnp.concatenate([encode(tokens[i : i + 1]) for i in range(4)])
    np.testing.assert_allclose(alone, together, atol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "map"])
def test_masked_padding_does_not_reach_the_pooled_text(pooling, batch):
    config = siglip_config().text
    config = dataclasses.replace(config, padding="mask", pooling=pooling)
    model = jitted(TextTransformer(config, rngs=nnx.Rngs(0)))
    tokens, mask = batch[1][:, :8], jnp.arange(8)[None] < jnp.array([3, 8, 5, 1])[:, None]
    pooled = model(tokens, mask).pooled
    other = jnp.where(mask, tokens, 7)
    np.testing.assert_allclose(model(other, mask).pooled, pooled, atol=1e-6)
    short = model(tokens[:1, :3], mask[:1, :3]).pooled
    np.testing.assert_allclose(short, pooled[:1], atol=1e-6)


def test_a_text_that_is_all_padding_gives_finite_numbers(batch):
    config = dataclasses.replace(siglip_config().text, padding="mask", pooling="mean")
    config = dataclasses.replace(siglip_config(), text=config)
    graph, params = nnx.split(SigLIP(config, rngs=nnx.Rngs(0)))
    mask = jnp.zeros((4, 12), bool).at[0].set(True)

    def loss(params):
        return jnp.sum(nnx.merge(graph, params).encode_text(batch[1], mask))

    grads = jax.jit(jax.grad(loss))(params)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_too_long_texts_and_foreign_ids_are_noticed(models):
    with pytest.raises(ValueError, match="13 tokens is longer than the model's max_len=12"):
        models["clip"].encode_text(jnp.zeros((1, 13), jnp.int32))
    encode = jitted(models["siglip"], SigLIP.encode_text)
    for outside in (50, -1):
        tokens = jnp.zeros((2, 12), jnp.int32).at[0, 3].set(outside)
        out = encode(tokens)
        assert jnp.isnan(out[0]).all() and jnp.isfinite(out[1]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pooling": "eos"}, "needs an eos_id"),
        ({"eos_id": 3}, "needs an eos_id|have none"),
        ({"pooling": "eos", "eos_id": 50}, "outside of a vocabulary of 50"),
        ({"padding": "mask"}, "padding='attend'"),
        ({"attention": "casual"}, "did you mean 'causal'"),
        ({"padding": "masked"}, "did you mean 'mask'"),
    ],
)
def test_bad_text_configs_say_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(siglip_config().text, **changes)


# Parameters as published with OpenAI's and Google's checkpoints (open_clip's model profile).
@pytest.mark.parametrize(
    ("size", "text", "embed_dim", "count"),
    [
        ("B/32", {"width": 512, "heads": 8, "mlp_width": 2048}, 512, 151_277_313),
        ("B/16", {"width": 512, "heads": 8, "mlp_width": 2048}, 512, 149_620_737),
        ("L/14", {"width": 768, "heads": 12, "mlp_width": 3072}, 768, 427_616_513),
    ],
)
def test_clip_has_the_published_number_of_parameters(size, text, embed_dim, count):
    text = {"vocab_size": 49408, "max_len": 77, "depth": 12, **text}
    config = clip_config(image={"image_size": 224, **vit_size(size)}, text=text)
    config = dataclasses.replace(config, embed_dim=embed_dim)
    assert count_parameters(CLIP, config) == count


@pytest.mark.torch
@pytest.mark.parametrize(
    ("size", "image_size"),
    [("B/16", 224), ("L/16", 256), ("So400m/14", 384)],  # the last has 27.4 patches a side
)
def test_siglip_has_as_many_parameters_as_in_transformers(size, image_size):
    torch = pytest.importorskip("torch")
    transformers = hf.transformers()
    vision, text = vit_size(size), text_size(size.split("/")[0])
    shared = {
        "hidden_size": text["width"],
        "num_hidden_layers": text["depth"],
        "num_attention_heads": text["heads"],
        "intermediate_size": text["mlp_width"],
    }
    config = transformers.SiglipConfig(
        text_config={**shared, "projection_size": text["width"]},
        vision_config={**shared, "image_size": image_size, "patch_size": vision["patch_size"]},
    )
    with torch.device("meta"):
        expected = transformers.SiglipModel(config).num_parameters()
    config = siglip_config(
        image={"image_size": image_size, "partial_patches": "crop", **vision},
        text={"vocab_size": 32_000, "max_len": 64, **text},
    )
    assert count_parameters(SigLIP, config) == expected
    if size == "B/16":  # as on the checkpoint's page
        assert expected == 203_155_970


def count_parameters(model, config):
    abstract = nnx.eval_shape(lambda: model(config, rngs=nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(abstract)))
