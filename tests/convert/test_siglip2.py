"""SigLIP 2 NaFlex of transformers, both ways: images of any shape in one batch."""

import hf
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from functional import jitted
from towers import SMALL, TOKENS, blocks, check, fresh, long, quick, refused, remember

import mmjax.convert
from mmjax.models import NaFlexConfig, NaFlexSigLIP, NaFlexViT
from mmjax.models.naflex import resample_positions
from mmjax.patches import Patches

transformers = hf.transformers()
pytestmark = pytest.mark.torch

VISION = {**SMALL, "patch_size": 4, "num_patches": 16, "intermediate_size": 48}
TEXT = {**SMALL, **TOKENS, "intermediate_size": 48}
CONFIGS = {
    "as published": {"vision_config": VISION, "text_config": TEXT},
    "a larger table": {
        "vision_config": {**VISION, "num_patches": 49, "hidden_act": "gelu"},
        "text_config": {**TEXT, "hidden_act": "gelu", "layer_norm_eps": 1e-3},
    },
    "unlike towers": {
        "vision_config": {
            **VISION,
            **{"num_hidden_layers": 3, "hidden_size": 36, "num_attention_heads": 3},
            **{"num_patches": 4, "patch_size": 3, "layer_norm_eps": 1e-2},
        },
        "text_config": {
            **TEXT,
            **{"num_hidden_layers": 1, "hidden_size": 20, "num_attention_heads": 2},
            **{"projection_size": 36, "vocab_size": 61},
        },
    },
    "grey": {
        "vision_config": {**VISION, "num_channels": 1, "hidden_act": "quick_gelu"},
        "text_config": {**TEXT, "hidden_act": "relu", "num_attention_heads": 1},
    },
}
# Rows and columns of patches: wide, tall, full, a line, a single patch.
SHAPES = ((2, 6), (5, 3), (4, 4), (1, 16), (1, 1))


def patches(vision, shapes=SHAPES, room=16, seed=0):
    width = vision.patch_size**2 * vision.num_channels
    values = np.random.default_rng(seed).normal(size=(len(shapes), room, width))
    shapes = jnp.asarray(shapes, jnp.int32)
    mask = jnp.arange(room)[None] < jnp.prod(shapes, axis=1)[:, None]
    return Patches(jnp.asarray(values, jnp.float32), shapes, mask)


def given(batch):
    import torch

    return {
        "pixel_values": torch.tensor(np.asarray(batch.patches)),
        "pixel_attention_mask": long(batch.mask),
        "spatial_shapes": long(batch.shapes),
    }


def tokens_of(text):
    shape = (4, text.max_position_embeddings)
    return jnp.asarray(np.random.default_rng(3).integers(0, text.vocab_size, shape), jnp.int32)


@pytest.mark.parametrize("name", CONFIGS)
def test_both_towers(name, tmp_path):
    config = transformers.Siglip2Config(**CONFIGS[name])
    vision, text = config.vision_config, config.text_config
    batch = patches(vision)

    def ours(model, batch, tokens):
        image = model.image(batch, features=range(vision.num_hidden_layers))
        words = model.text(tokens, features=range(text.num_hidden_layers))
        remember(model, "image", image)
        remember(model, "text", words)
        return {
            "logits": model(batch, tokens),
            "image embeddings": model.encode_image(batch),
            "text embeddings": model.encode_text(tokens),
            "image tokens": image.tokens,
            "image blocks": image.features,
            "text blocks": words.features,
        }

    def theirs(reference, batch, tokens):
        out = reference(long(tokens), **given(batch), output_hidden_states=True)
        image = out.vision_model_output
        return {
            "logits": out.logits_per_image,
            "image embeddings": out.image_embeds,
            "text embeddings": out.text_embeds,
            "image tokens": image.last_hidden_state,
            "image blocks": blocks(image.hidden_states),
            "text blocks": blocks(out.text_model_output.hidden_states),
        }

    mask = np.asarray(batch.mask)
    depth = vision.num_hidden_layers
    where = {"image tokens": mask, "image blocks": np.broadcast_to(mask, (depth, *mask.shape))}
    reference = transformers.Siglip2Model(config)
    check("Siglip2Model", reference, tmp_path, (batch, tokens_of(text)), ours, theirs, where)


def test_images_only(tmp_path):
    config = transformers.Siglip2VisionConfig(**VISION, vision_use_head=False)
    batch = patches(config)

    def ours(model, batch):
        return {"tokens": model(batch).tokens}

    def theirs(reference, batch):
        return {"tokens": reference(**given(batch)).last_hidden_state}

    reference, where = transformers.Siglip2VisionModel(config), {"tokens": np.asarray(batch.mask)}
    check("Siglip2VisionModel", reference, tmp_path, (batch,), ours, theirs, where, False)


def test_texts_only(tmp_path):
    config = transformers.Siglip2TextConfig(**TEXT, projection_size=20)

    def ours(model, tokens):
        return {"pooled": model(tokens).pooled}

    def theirs(reference, tokens):
        return {"pooled": reference(long(tokens)).pooler_output}

    reference = transformers.Siglip2TextModel(config)
    check("Siglip2TextModel", reference, tmp_path, (tokens_of(config),), ours, theirs, None, False)


def test_classifier(tmp_path):
    config = transformers.Siglip2Config(vision_config=VISION, text_config=TEXT, num_labels=5)

    def ours(model, batch):
        return {"logits": model(batch).logits}

    def theirs(reference, batch):
        return {"logits": reference(**given(batch)).logits}

    reference = transformers.Siglip2ForImageClassification(config)
    inputs = (patches(config.vision_config),)
    check("Siglip2ForImageClassification", reference, tmp_path, inputs, ours, theirs, None, False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    reference = transformers.Siglip2Model(transformers.Siglip2Config(**CONFIGS["as published"]))
    return reference, parity.save_hf(reference, tmp_path_factory.mktemp("siglip2") / "source")


def test_all_shapes_pass_through_one_compiled_function(saved):
    """Shapes are traced; the padding may hold anything; without a mask the shapes say it."""
    import torch

    reference, directory = saved
    model = mmjax.convert.from_pretrained(directory)
    traces = []

    def encode(model, batch):
        traces.append(batch)
        return NaFlexSigLIP.encode_image(model, batch)

    run = jitted(model, encode)
    vision = reference.config.vision_config
    every = [(h, w) for h in range(1, 17) for w in range(1, 17) if h * w <= 16]
    every = [(h, w) for h, w in every if w > 1 or h in (1, 4)]  # see the test below
    for start in range(0, len(every) - 4, 5):
        batch = patches(vision, every[start : start + 5], seed=start)
        with torch.no_grad():
            expected = reference.get_image_features(**given(batch)).pooler_output.numpy()
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
        garbage = jnp.where(batch.mask[:, :, None], batch.patches, 1e3)
        parity.close("Siglip2Model", "all shapes", run(batch._replace(patches=garbage)), expected)
    assert len(traces) == 1
    actual = quick(model, batch._replace(mask=None), function=NaFlexSigLIP.encode_image)
    parity.close("Siglip2Model", "all shapes", actual, expected)


def test_positions_of_a_single_column_are_those_of_a_single_row():
    """torch 2.13's kernel for CPUs gets [n, 1] wrong (not [1, n]), so the table is turned round."""
    import torch

    table = np.random.default_rng(0).normal(size=(4, 4, 8)).astype(np.float32)
    turned = torch.tensor(table.transpose(1, 0, 2)).permute(2, 0, 1)[None]
    for rows in (2, 3, 5, 7):
        expected = torch.nn.functional.interpolate(
            turned, size=(1, rows), mode="bilinear", antialias=True
        )[0, :, 0].T
        shapes = jnp.asarray([[rows, 1]])
        actual = resample_positions(jnp.asarray(table.reshape(16, 8)), 4, shapes, 7)
        parity.close("Siglip2Model", "positions", actual[0, :rows], expected)


def test_the_processor_of_transformers_fits(saved):
    """Patches come from there row by row, channels last."""
    import torch

    reference, directory = saved
    processor = transformers.Siglip2ImageProcessor(patch_size=4, max_num_patches=16)
    images = [
        np.random.default_rng(s).integers(0, 256, (20 + 30 * s, 50, 3), np.uint8) for s in (0, 1)
    ]
    batch = processor(images, return_tensors="pt")
    with torch.no_grad():
        expected = reference.get_image_features(**batch).pooler_output.numpy()
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    ours = Patches(
        jnp.asarray(batch["pixel_values"].numpy()),
        jnp.asarray(batch["spatial_shapes"].numpy(), jnp.int32),
        jnp.asarray(batch["pixel_attention_mask"].numpy()).astype(bool),
    )
    model = mmjax.convert.from_pretrained(directory)
    actual = quick(model, ours, function=NaFlexSigLIP.encode_image)
    parity.close("Siglip2Model", "image embeddings", actual, expected)


def test_an_image_with_more_patches_than_room_is_noticed():
    config = NaFlexConfig(
        **{"patch_size": 2, "num_patches": 4, "width": 32, "depth": 1, "heads": 4},
        **{"mlp_width": 32, "activation": "gelu", "norm_eps": 1e-6, "pooling": "map"},
    )
    model = fresh(NaFlexViT, config)
    batch = Patches(jnp.ones((2, 4, 12)), jnp.asarray([[2, 2], [3, 2]]), None)
    pooled = quick(model, batch).pooled
    assert np.isfinite(pooled[0]).all() and np.isnan(pooled[1]).all()
    with pytest.raises(ValueError, match=r"not \[batch, patches, 12\]"):
        model(batch._replace(patches=jnp.ones((2, 4, 13))))


def test_what_cannot_be_computed_is_refused(saved):
    config = dict(CONFIGS["as published"])
    config["vision_config"] = config["vision_config"] | {"num_patches": 20}
    with pytest.raises(ValueError, match=r"num_patches=20 is no square.*16 or 25"):
        refused("Siglip2Model", transformers.Siglip2Config(**config))
    with pytest.raises(ValueError, match="takes images of any size"):
        mmjax.convert.from_pretrained(saved[1], image_size=32)
