"""The same losses on one device and on eight, however they are arranged."""

import jax
import numpy as np
import pytest
import tiny

from mmjax import sharding
from mmjax.train.experiment import prepare

MESHES = {"data=8": (8, 1, 1), "fsdp=8": (1, 8, 1), "data=2,fsdp=2,tensor=2": (2, 2, 2)}


def make_mesh(shape, devices=None):
    config = sharding.MeshConfig(*shape)
    return sharding.make_mesh(config, devices)


@pytest.fixture(scope="module", autouse=True)
def shard_small_arrays():
    """Tiny parameters are sharded too, or the fsdp axis would not be tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "FSDP_MIN_SIZE", 2)
        yield


@pytest.fixture(scope="module")
def single():
    """Losses of ten steps on one device, by model."""
    cache = {}

    def losses(model):
        if model not in cache:
            mesh = make_mesh((1, 1, 1), jax.devices()[:1])
            cache[model] = tiny.steps(prepare(tiny.contrastive(model), mesh), 10)[1]
        return cache[model]

    return losses


@pytest.mark.parametrize("chunked", [False, True], ids=["dense", "chunked"])
@pytest.mark.parametrize(
    ("model", "mesh"),
    [
        *(("siglip", mesh) for mesh in MESHES),
        # The last of them has all axes.
        *(pytest.param("clip", mesh, marks=pytest.mark.slow) for mesh in list(MESHES)[:-1]),
        ("clip", list(MESHES)[-1]),
    ],
)
def test_losses_do_not_depend_on_the_mesh(single, model, mesh, chunked):
    experiment = prepare(tiny.contrastive(model, chunked=chunked), make_mesh(MESHES[mesh]))
    _, losses = tiny.steps(experiment, 10)
    np.testing.assert_allclose(losses[0], single(model)[0], rtol=1e-6)
    np.testing.assert_allclose(losses, single(model), rtol=1e-4)
