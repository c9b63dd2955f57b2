"""Training with adapters: what moves, what it costs, on a mesh, and where it may begin."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny
from functional import QUICK
from jax.sharding import PartitionSpec

import mmjax
from experiments import convert
from mmjax import sharding
from mmjax.config import ConfigError, to_json
from mmjax.nn import lora
from mmjax.params import merge, split
from mmjax.rules import RuleError
from mmjax.train.checkpoints import CheckpointError
from mmjax.train.experiment import load_initial, prepare
from mmjax.train.runs import read_run

RANK, STEPS = 4, 4
HEAD = {"head/kernel", "head/bias"}
ADAPTERS = dict(rank=RANK, alpha=8, targets=r"encoder/layers/.*/(query|value|up|down)")
DORA = dict(**ADAPTERS, dora=True)
# A head begins with zeros: were it frozen, nothing would have a gradient.
PARTS = dict(trainable=((".*/lora/.*|head/.*", True), (".*", False)))


def config(**groups):
    """A ViT that transformers has too."""
    stream = dict(sources=[dict(name="none")], image=dict(preset="vit", size=16), label={})
    result = tiny.classification(data=dict(train=stream), **{"rules": PARTS, **groups})
    result.model.update(pooling="cls", activation="gelu")
    result.optimizer.schedule.warmup = 0
    return result


def mesh_of(*shape):
    return sharding.make_mesh(sharding.MeshConfig(*shape), jax.devices()[: np.prod(shape)])


@pytest.fixture(scope="module")
def trained():
    """An experiment with DoRA on one device: itself, its first state, its last, the losses."""
    experiment = prepare(config(lora=DORA), mesh_of(1, 1, 1))
    state = experiment.initial_state({})
    first = jax.tree.map(np.array, jax.device_get(state))
    last = tiny.steps(experiment, STEPS, state=state, compiler_options=QUICK)
    return experiment, first, *last


def test_only_adapters_and_the_head_are_trained(trained):
    _, first, last, _ = trained
    assert {path for path in last.trainable if not lora.is_adapter(path)} == HEAD
    for path, value in last.frozen.items():
        np.testing.assert_array_equal(value, first.frozen[path])
    moved = {path for path, x in last.trainable.items() if np.any(x != first.trainable[path])}
    assert moved == set(last.trainable)
    leaves = jax.tree.leaves_with_path(last.opt_state)
    names = [jax.tree_util.keystr(path) for path, leaf in leaves if leaf.ndim]
    assert names and all("/lora/" in name or "head/" in name for name in names)


def test_the_mesh_does_not_matter(trained, monkeypatch):
    monkeypatch.setattr(sharding, "FSDP_MIN_SIZE", 2)
    experiment = prepare(config(lora=DORA), mesh_of(2, 2, 2))
    specs = {path: where.spec for path, where in experiment.placed.items()}
    assert specs["encoder/layers/mlp/up/lora/b"] == PartitionSpec(None, "fsdp", "tensor")
    assert specs["encoder/layers/mlp/down/lora/a"] == PartitionSpec(None, "tensor", "fsdp")
    _, losses = tiny.steps(experiment, STEPS, compiler_options=QUICK)
    np.testing.assert_allclose(losses, trained[-1], rtol=1e-5)
    assert np.ptp(losses) > 1e-3


def test_a_step_has_no_gradients_of_frozen_kernels():
    """Its matrix products, one by one."""
    batch, tokens, patches, width, hidden, depth = 16, 5, 4, 32, 64, 2
    rows = 2 * batch * tokens
    blocks = depth * rows * (4 * width * width + 2 * width * hidden)
    low_rank = depth * rows * RANK * (2 * (width + width) + 2 * (width + hidden))
    attention = depth * rows * 2 * tokens * width
    head = 2 * batch * width * 10
    patch = 2 * batch * patches * (8 * 8 * 3) * width
    experiment = prepare(config(lora=ADAPTERS), mesh_of(1, 1, 1))
    arrays = {name: tiny.batch()[name] for name in experiment.task.fields}
    flops = experiment.step_flops(arrays)
    assert flops == patch + 2 * blocks + 3 * (head + low_rank + attention)
    # DoRA also makes the products a @ b, of which it needs no gradient.
    products = depth * 2 * RANK * (2 * width * width + 2 * width * hidden)
    assert prepare(config(lora=DORA), mesh_of(1, 1, 1)).step_flops(arrays) == flops + products
    everything = prepare(config(lora=ADAPTERS, rules={}), mesh_of(1, 1, 1)).step_flops(arrays)
    assert everything == flops + patch + blocks


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory):
    """The work directory of that experiment, as far as others read it."""
    experiment, _, last, _ = trained
    directory = tmp_path_factory.mktemp("run")
    (directory / "config.json").write_text(to_json(experiment.config))
    state = {"trainable": last.trainable, "frozen": last.frozen}
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(directory / "checkpoints" / "3" / "state", state)
    return directory


def loaded(source, pattern="(.*)", **groups):
    groups = {"init": ((pattern, str(source), r"\1"),), **groups}
    return load_initial(prepare(config(**groups), mesh_of(1, 1, 1)))


def test_adapters_go_on_from_a_run_that_has_them(trained, run):
    params = loaded(run, lora=DORA)
    assert params.keys() == trained[2].params.keys()
    for path, value in trained[2].params.items():
        np.testing.assert_array_equal(params[path], value)
    with pytest.raises(ConfigError, match=r"lora\.alpha: 4 here, 8 there"):
        loaded(run, lora={**DORA, "alpha": 4})
    with pytest.raises(CheckpointError, match=r"of shape|has shape \(2, 32, 4\) there"):
        loaded(run, lora={**DORA, "rank": 2})
    with pytest.raises(CheckpointError, match="Merge them"):
        loaded(run, rules={})
    # Parts that have none there may be taken as ever.
    assert loaded(run, r"(head/.*)", rules={}).keys() == HEAD


def test_a_run_is_read_merged_and_a_merged_one_has_none(trained, run, tmp_path):
    experiment, _, last, _ = trained
    images = jnp.asarray(tiny.batch()["image"])
    logits = jax.jit(lambda model: model(images).logits, compiler_options=QUICK)
    expected = logits(merge(experiment.graphdef, last.params))
    np.testing.assert_allclose(logits(read_run(run)), expected, atol=1e-5)
    apart = split(read_run(run, merged=False))[1]
    assert apart.keys() == last.params.keys()
    target = tmp_path / "merged"
    assert convert.main(["--source", str(run), "--target", str(target), "--to", "orbax"]) == 0
    merged = split(read_run(run))[1]
    for path, value in loaded(target, rules={}).items():
        np.testing.assert_array_equal(value, merged[path])


@pytest.mark.parametrize("kind", ["orbax", "hf"])
def test_new_adapters_where_the_source_has_none(kind, run, tmp_path):
    model = read_run(run)
    if kind == "hf":
        mmjax.save_pretrained(model, tmp_path / "source")
    else:
        convert.write_orbax(model, tmp_path / "source", None, None)
    params, expected = loaded(tmp_path / "source", lora=DORA), split(model)[1]
    assert params.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(params[path], value)
    with pytest.raises(RuleError, match="takes adapters only, and its source has none"):
        loaded(tmp_path / "source", r"(.*/lora/.*)", lora=DORA)


def test_targets_that_do_not_exist_are_named():
    with pytest.raises(ValueError, match="did you mean 'encoder/layers/attention/query'"):
        prepare(config(lora={**DORA, "targets": "encoder/attention/query"}))
    with pytest.raises(ConfigError, match=r"config\.lora\.ranks is unknown; did you mean 'rank'"):
        config(lora={**DORA, "ranks": 4})
    assert json.loads(to_json(config()))["lora"] is None
