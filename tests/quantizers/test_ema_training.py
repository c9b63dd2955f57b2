"""Codebooks of moving averages in the training step: on meshes, in parts, after a stop."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from functional import QUICK
from jax.sharding import Mesh

from mmjax import sharding
from mmjax.config import ConfigError
from mmjax.params import merge, split
from mmjax.quantizers import (
    EMACodebookConfig,
    ResidualConfig,
    counts,
    make_quantizer,
    perplexity,
)
from mmjax.train import state as states
from mmjax.train.checkpoints import CheckpointConfig, Checkpoints
from mmjax.train.experiment import base_config, prepare
from mmjax.train.step import make_step
from mmjax.train.tasks import StatefulTask

BATCH, PLACES, NUMBERS, STEPS, REVIVE = 16, 8, 6, 4, 8.0
EMA = EMACodebookConfig(12, 4, decay=0.8, revive=REVIVE, kmeans=3)
CONFIGS = {
    "residual": ResidualConfig(EMA, depth=2),
    "cosine": EMACodebookConfig(
        12, 4, decay=0.8, revive=REVIVE, kmeans=3, compare="cosine", unit=True
    ),
}
TX = optax.adam(1e-2)


class Line(nnx.Module):
    """Two linear maps, and a quantiser between them."""

    def __init__(self, config, rngs):
        self.before = nnx.Linear(NUMBERS, config.width, rngs=rngs)
        self.quantizer = make_quantizer(config, rngs=rngs)
        self.after = nnx.Linear(config.width, NUMBERS, rngs=rngs)


class Restore(StatefulTask):
    fields = ("numbers",)

    def loss_and_statistics(self, model, batch, rng):
        x = batch["numbers"]
        found = model.quantizer(model.before(x))
        loss = jnp.mean(jnp.square(model.after(found.vectors) - x)) + found.loss
        size = float(len(x))
        return ((loss * size, size), {}), (found.codes, found.statistics)

    def update(self, model, statistics, rng):
        codes, statistics = statistics
        values = model.quantizer.update(statistics, rng)
        mean = jnp.mean(perplexity(counts(codes, model.quantizer.config)))
        return {f"quantizer/{path}": value for path, value in values.items()}, {"perplexity": mean}

    def learnt(self, model):
        return tuple(f"quantizer/{path}" for path in model.quantizer.learnt)


class Run:
    """Training on a mesh.

    Attributes:
      first: the state before the first step.
    """

    def __init__(self, config, shape, accumulate=1):
        devices = np.array(jax.devices()[: int(np.prod(shape))])
        self.mesh = Mesh(devices.reshape(shape), sharding.AXES)
        graphdef, params = split(Line(config, nnx.Rngs(0)))
        placed = sharding.parameter_shardings(params, ((".*", "fsdp"),), self.mesh)
        trainable = {path: not path.startswith("quantizer") for path in params}
        state = states.create(params, trainable, TX, seed=0, ema=True)
        self.where = states.shardings(state, placed, self.mesh)
        self.first = sharding.place_like_sharding(state, self.where)
        step = make_step(Restore(), graphdef, TX, accumulate=accumulate, ema=0.9)
        whole = sharding.replicated(self.mesh)
        step = jax.jit(step, donate_argnums=0, out_shardings=(self.where, whole))
        self.step = step.lower(self.first, self.batch(0)).compile(QUICK)

    def batch(self, number):
        x = np.random.default_rng(number).normal(size=(BATCH, PLACES, NUMBERS))
        return sharding.global_batch({"numbers": x.astype(np.float32)}, self.mesh)

    def go(self, state, first=0, last=STEPS):
        """The state after some steps, and the metrics of each."""
        rows = []
        for number in range(first, last):
            batch = self.batch(number)
            with jax.transfer_guard("disallow"):
                state, metrics = self.step(state, batch)
            rows.append(jax.device_get(metrics))
        return state, rows

    def result(self):
        """(states before and after, metrics)"""
        first = jax.device_get(self.first)
        state, rows = self.go(self.first)
        return first, state, rows


@pytest.fixture(scope="module", autouse=True)
def shard_small_arrays():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "FSDP_MIN_SIZE", 2)
        yield


@pytest.fixture(scope="module", params=CONFIGS)
def single(request):
    """The name of a quantiser, and its result on one device."""
    first, last, rows = Run(CONFIGS[request.param], (1, 1, 1)).result()
    return request.param, first, jax.device_get(last), rows


def close(result, expected, tolerance):
    (_, state, rows), (_, _, last, wanted) = result, expected
    for row, other in zip(rows, wanted, strict=True):
        assert row.keys() == other.keys()
        for name, value in other.items():
            np.testing.assert_allclose(row[name], value, rtol=tolerance, err_msg=name)
    for path, value in last.params.items():
        np.testing.assert_allclose(state.params[path], value, tolerance, tolerance, err_msg=path)


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2)], ids=str)
def test_the_mesh_changes_nothing(single, shape):
    """Over k-means, revival and averages; and all copies of an array are the same."""
    result = Run(CONFIGS[single[0]], shape).result()
    close(result, single, 1e-4)
    for path, value in result[1].frozen.items():
        copies = collections.defaultdict(list)
        for shard in value.addressable_shards:
            copies[str(shard.index)].append(np.asarray(shard.data))
        assert sum(map(len, copies.values())) == 8
        for first, *others in copies.values():
            for other in others:
                np.testing.assert_array_equal(first, other, err_msg=path)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_accumulation_changes_nothing(single, shape):
    close(Run(CONFIGS[single[0]], shape, accumulate=2).result(), single, 1e-4)


def test_codes_are_learnt_beside_the_rest(single):
    name, first, last, rows = single
    assert last.frozen and all(path.startswith("quantizer") for path in last.frozen)
    for path, value in last.frozen.items():
        assert not np.allclose(value, first.frozen[path]), path
    found = [value for path, value in last.frozen.items() if path.endswith("count")]
    assert all((count == REVIVE).any() for count in found)  # some were just revived
    # The averages of what is trained know nothing of the codes, which are averages themselves.
    assert set(last.ema) == set(last.trainable) == {p for p in last.params if "quantizer" not in p}
    # Before k-means few codes are near: one, but for cosines.
    assert 1 <= rows[0]["perplexity"] < rows[1]["perplexity"] <= 12, name


def test_a_stop_changes_nothing(single, tmp_path):
    name, _, expected, rows = single
    run = Run(CONFIGS[name], (1, 1, 1))
    state, before = run.go(run.first, last=2)
    target = states.with_shardings(jax.eval_shape(lambda x: x, state), run.where)
    with Checkpoints(tmp_path, CheckpointConfig(every=1)) as saved:
        saved.save(2, state, {}, {})
    with Checkpoints(tmp_path, CheckpointConfig(every=1)) as saved:
        _, restored, _ = saved.restore(target)
    state, after = run.go(restored, first=2)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), expected)
    jax.tree.map(np.testing.assert_array_equal, before + after, rows)


def vqgan(quantizer, trainable):
    tokenizer = dict(
        image_size=4,
        quantizer=quantizer,
        width=4,
        multipliers=(1,),
        depth=1,
        latent=4,
        groups=2,
    )
    return base_config(
        task=dict(name="vq"),
        model=dict(name="tokenizer_trainer", tokenizer=tokenizer),
        data=dict(
            tokenizer=None,
            train=dict(
                sources=[dict(name="digits", split="train")], image=dict(preset="vit", size=4)
            ),
        ),
        optimizer=dict(name="adamw", learning_rate=1e-2, schedule=dict(name="constant", warmup=2)),
        rules=dict(trainable=trainable),
        train=dict(steps=10, batch_size=16),
        checkpoint=dict(every=100),
    )


def test_rules_must_not_train_codes():
    mesh = Run(EMA, (1, 1, 1)).mesh
    each = dict(name="ema", size=12, width=4)
    for quantizer in (each, dict(name="residual", each=each, depth=2)):
        frozen = ((r"tokenizer/quantizer/.*", False), (".*", True))
        assert prepare(vqgan(quantizer, frozen), mesh)
        for table in (((".*", True),), ((r".*/count", True), *frozen)):
            with pytest.raises(ConfigError, match="learnt from statistics") as error:
                prepare(vqgan(quantizer, table), mesh)
            assert "count" in str(error.value)
            assert ("embedding" in str(error.value)) == (len(table) == 1)


def test_evaluation_learns_nothing():
    """What evaluators call gives no statistics, and leaves codes as they are."""
    model = Line(EMA, nnx.Rngs(0))
    graphdef, params = split(model)
    batch = {"numbers": jnp.ones((BATCH, PLACES, NUMBERS))}
    result = Restore().loss(merge(graphdef, params), batch, None)
    assert jax.tree.structure(result) == jax.tree.structure(((0, 0), {}))
    jax.tree.map(np.testing.assert_array_equal, split(model)[1], params)
