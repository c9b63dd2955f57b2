"""Every connector in a VLM, Flamingo and Mllama train with the losses of one device on any mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from functional import QUICK, random_values
from small_connectors import SMALL

from mmjax import params, sharding
from mmjax.connectors import CONNECTORS
from mmjax.models import (
    MODELS,
    FlamingoConfig,
    LMConfig,
    MllamaConfig,
    TiledViTConfig,
    ViTConfig,
    VLMConfig,
)
from mmjax.models.flamingo import GatedConfig
from mmjax.nn.partition import activation_sharding
from mmjax.nn.rope import Rope

# Compiling is all that takes time here, so the default run has the mesh with all three axes only.
MESHES = [
    pytest.param((2, 2, 2), id="data=2,fsdp=2,tensor=2"),
    pytest.param((8, 1, 1), id="data=8", marks=pytest.mark.slow),
    pytest.param((1, 8, 1), id="fsdp=8", marks=pytest.mark.slow),
]
WIDTH, VOCAB, BATCH, STEPS, RATE = 32, 16, 8, 3, 0.2
TRANSFORMER = {"width": WIDTH, "depth": 1, "heads": 2, "mlp_width": 32, "norm_eps": 1e-6}


def vlm_config(name):
    """Of a connector's name, "flamingo" or "mllama"."""
    parts = dict(
        encoder=ViTConfig(
            image_size=8,
            patch_size=2,
            activation="gelu",
            pooling="none",
            position="learned",
            **TRANSFORMER,
        ),
        lm=LMConfig(
            vocab_size=VOCAB,
            max_len=64,
            activation="silu",
            tied=True,
            rope=Rope(10_000.0),
            **TRANSFORMER,
        ),
        image_token=VOCAB,
        features=(-1,),
    )
    if name in CONNECTORS:
        return VLMConfig(connector=SMALL[name], **parts)
    if name == "mllama":
        tiles = dict(global_depth=1, tiles=2, shapes=((1, 2),))
        parts["encoder"] = TiledViTConfig(8, 2, activation="gelu", **TRANSFORMER, **tiles)
        return MllamaConfig(connector=SMALL["linear"], looks=(0,), new_tokens=1, **parts)
    gated = GatedConfig(heads=2, head_dim=16)
    lm = dataclasses.replace(parts.pop("lm"), depth=2)
    return FlamingoConfig(
        connector=SMALL["perceiver"], lm=lm, gated=gated, every=2, after=1, new_tokens=1, **parts
    )


def make_batch(config):
    """Two images (a clip, where the model reads clips) in each row, before its text."""
    random = np.random.default_rng(0)
    visual = 2 * config.image_tokens // config.frames
    text = random.integers(0, VOCAB, (BATCH, 6), dtype=np.int32)
    places = np.full((BATCH, visual), config.image_token, np.int32)
    return {
        "images": random.standard_normal((BATCH, 2, 8, 8, 3), np.float32),
        "tokens": np.concatenate([places, text], axis=1),
        "weights": np.arange(visual + 6) >= visual + np.zeros((BATCH, 1)),
    }


def losses(graph, values, batch, mesh):
    """Of a few steps of gradient descent."""
    shardings = sharding.parameter_shardings(values, sharding.DEFAULT_RULES, mesh)
    values = sharding.place_like_sharding(values, shardings)
    batch = sharding.global_batch(batch, mesh)

    def loss(values, batch):
        logits = params.merge(graph, values)(batch["tokens"], batch["images"])
        targets = jnp.where(batch["weights"], batch["tokens"], 0)[:, 1:]
        each = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], targets)
        return jnp.sum(each * batch["weights"][:, 1:]) / jnp.sum(batch["weights"][:, 1:])

    def step(values, batch):
        with activation_sharding(sharding.activation_constraint(mesh)):
            value, gradients = jax.value_and_grad(loss)(values, batch)
        return value, jax.tree.map(lambda x, g: x - RATE * g, values, gradients)

    compiled = jax.jit(
        step, out_shardings=(None, shardings), donate_argnums=0, compiler_options=QUICK
    )
    result = []
    for _ in range(STEPS):
        value, values = compiled(values, batch)
        result.append(float(value))
    return result


@pytest.fixture(scope="module", autouse=True)
def shard_small_arrays():
    """Tiny parameters are sharded too, or the fsdp axis would not be tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "FSDP_MIN_SIZE", 2)
        yield


@pytest.fixture(scope="module")
def case():
    """What `losses` needs of a connector, and what it returns on one device."""
    cache = {}

    def get(name):
        if name not in cache:
            config = vlm_config(name)
            model = MODELS[config.name][1]
            graph, shapes = params.abstract(lambda: model(config, rngs=nnx.Rngs(0)))
            given = graph, random_values(shapes), make_batch(config)
            one = sharding.make_mesh(sharding.MeshConfig(1, 1, 1), jax.devices()[:1])
            cache[name] = given, losses(*given, one)
        return cache[name]

    return get


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", [*CONNECTORS, "flamingo", "mllama"])
def test_losses_do_not_depend_on_the_mesh(case, name, mesh):
    given, expected = case(name)
    assert expected[-1] < 0.9 * expected[0]
    actual = losses(*given, sharding.make_mesh(sharding.MeshConfig(*mesh)))
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(actual, expected, rtol=1e-4)
