"""Image tokenizers in training: who learns what, losses on meshes, configs that do not agree."""

import dataclasses

import jax
import numpy as np
import pytest
from functional import QUICK, random_values
from ml_collections import ConfigDict

from mmjax import losses, sharding
from mmjax.config import ConfigError
from mmjax.params import merge
from mmjax.train.experiment import base_config, prepare
from mmjax.train.handover import model_dataclass
from mmjax.train.image_tasks import ImageTokenizer

SIDE, BATCH = 8, 8
TOKENIZER = dict(
    image_size=SIDE,
    quantizer=dict(name="ema", size=8, width=3, decay=0.9, revive=0.5, kmeans=2),
    width=4,
    multipliers=(1, 1),
    depth=1,
    latent=4,
    middle_attends=False,
    groups=2,
)
ENCODER = dict(
    image_size=SIDE,
    patch_size=4,
    width=16,
    depth=2,
    heads=2,
    mlp_width=16,
    activation="gelu",
    norm_eps=1e-6,
    pooling="mean",
    position="learned",
)
MODEL = dict(name="tokenizer_trainer", tokenizer=TOKENIZER)
WHOLE = MODEL | dict(
    perceptual=ENCODER, blocks=(0, -1), discriminator=dict(width=8, halvings=1, groups=2)
)
FROZEN = (("tokenizer/quantizer/.*", False), ("perceptual/.*", False), (".*", True))
PARTS = dict(perceptual=0.3, adversarial=0.2)


def make_config(model=MODEL, *, task=(), trainable=FROZEN[:1] + FROZEN[2:]):
    source = dict(name="json", path="x.json")
    return base_config(
        task=dict(name="vq") | dict(task),
        model=model,
        data=dict(
            tokenizer=None,
            train=dict(sources=[source], image=dict(preset="siglip", size=SIDE)),
        ),
        optimizer=dict(
            name="adamw", learning_rate=1e-2, schedule=dict(name="constant"), weight_decay=0.0
        ),
        rules=dict(trainable=trainable),
        train=dict(steps=100, batch_size=BATCH),
        checkpoint=dict(every=100),
    )


def pictures(count=BATCH):
    """Two flat halves each, of few colours."""
    rng = np.random.default_rng(0)
    halves = rng.choice([-0.9, 0.0, 0.9], (count, 1, 2, 3)).astype(np.float32)
    return halves.repeat(SIDE, axis=1).repeat(SIDE // 2, axis=2)


def steps(experiment, count):
    """State and metrics after each step, on the same images."""
    params = sharding.place_like_sharding(random_values(experiment.shapes, 0.2), experiment.placed)
    batch = sharding.global_batch({"image": pictures()}, experiment.mesh)
    state = experiment.initial_state(params)
    first = jax.device_get(state.params)
    step = experiment.lower_step(batch).compile(QUICK)
    rows = []
    for _ in range(count):
        state, metrics = step(state, batch)
        rows.append(jax.device_get(metrics))
    return first, jax.device_get(state.params), rows


def one_device():
    return sharding.make_mesh(sharding.MeshConfig(1, 1, 1), jax.devices()[:1])


@pytest.fixture(scope="module")
def single():
    """Of the whole model."""
    return steps(prepare(make_config(WHOLE, task=PARTS, trainable=FROZEN), one_device()), 12)


def test_everybody_learns_but_who_judges(single):
    first, last, rows = single
    assert rows[-1]["pixels"] < 0.8 * rows[0]["pixels"]
    assert rows[-1]["psnr"] > rows[0]["psnr"]
    assert 1 < rows[-1]["perplexity"] <= 8 and 0 < rows[-1]["usage"] <= 1
    changed = {path for path in first if not np.array_equal(first[path], last[path])}
    assert not any(path.startswith("perceptual/") for path in changed)
    for part in (
        "tokenizer/encoder/",
        "tokenizer/quantizer/",
        "tokenizer/decoder/",
        "discriminator/",
    ):
        assert any(path.startswith(part) for path in changed), part


def test_each_side_sees_its_own_half_of_the_adversarial_loss():
    """The gradient of the whole loss is that of two losses, one for each side."""
    parts = dict(pixels=0.0, quantizer=0.0, adversarial=1.0)
    model = WHOLE | dict(perceptual=None, blocks=())
    experiment = prepare(make_config(model, task=parts), one_device())
    params = random_values(experiment.shapes, 0.2)
    images = jax.numpy.array(pictures())

    def whole(params):
        (top, bottom), _ = experiment.task.loss(
            merge(experiment.graphdef, params), {"image": images}, None
        )
        return top / bottom

    def halves(params, generator):
        model = merge(experiment.graphdef, params)
        made = model(images).images
        if generator:
            return losses.hinge_generator(model.discriminator(made)).mean()
        made = jax.lax.stop_gradient(made)
        real = losses.hinge_real(model.discriminator(images)).mean()
        return (real + losses.hinge_made(model.discriminator(made)).mean()) / 2

    found, of_generator, of_judge = jax.jit(
        lambda p: (
            jax.grad(whole)(p),
            jax.grad(halves)(p, True),
            jax.grad(halves)(p, False),
        ),
        compiler_options=QUICK,
    )(params)
    seen = 0
    for path, gradient in found.items():
        expected = (of_judge if path.startswith("discriminator/") else of_generator)[path]
        np.testing.assert_allclose(gradient, expected, atol=1e-6)
        seen += float(np.abs(gradient).max()) > 0
    assert seen > len(found) / 2


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)], ids=str)
def test_the_mesh_changes_nothing(single, shape, monkeypatch):
    monkeypatch.setattr(sharding, "FSDP_MIN_SIZE", 2)
    mesh = sharding.make_mesh(sharding.MeshConfig(*shape))
    _, _, rows = steps(prepare(make_config(WHOLE, task=PARTS, trainable=FROZEN), mesh), 3)
    for name in ("loss", "pixels", "perceptual", "perplexity"):
        np.testing.assert_allclose(
            [row[name] for row in rows], [row[name] for row in single[2][:3]], rtol=2e-4
        )


@pytest.mark.parametrize(
    ("model", "task", "said"),
    [
        (MODEL, dict(perceptual=0.1), "perceptual=0.1, but config.model.perceptual is None"),
        (WHOLE, dict(perceptual=0.1), "adversarial=0.0, but config.model.discriminator is there"),
        (MODEL | dict(tokenizer=TOKENIZER | dict(image_size=16)), {}, "image.size=8, but .*=16"),
        (TOKENIZER | dict(name="vqgan"), {}, "the name 'tokenizer_trainer', but .* VQGANConfig"),
    ],
)
def test_what_does_not_agree(model, task, said):
    config = make_config(MODEL)
    with pytest.raises(ConfigError, match=said):
        ImageTokenizer(one_device(), **task).check(
            model_dataclass(model), ConfigDict(config.data.to_dict())
        )


def test_codes_must_be_frozen():
    with pytest.raises(ConfigError, match=r"tokenizer/quantizer/embedding"):
        prepare(make_config(trainable=((".*", True),)), one_device())


def test_weights_and_errors_that_are_none():
    with pytest.raises(ValueError, match=r"pixels=-1\.0: weights are 0 or more"):
        ImageTokenizer(one_device(), pixels=-1.0)
    with pytest.raises(ValueError, match="did you mean 'l1'"):
        ImageTokenizer(one_device(), error="L1")
    blind = model_dataclass(MODEL)
    with pytest.raises(ValueError, match="decodes=False"):
        dataclasses.replace(blind, tokenizer=dataclasses.replace(blind.tokenizer, decodes=False))
    with pytest.raises(ValueError, match="set both, or neither"):
        dataclasses.replace(blind, blocks=(1,))
