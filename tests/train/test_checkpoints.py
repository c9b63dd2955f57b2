"""Checkpoints: exact, on any mesh, whole or not at all."""

import json
import shutil

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import Mesh

from mmjax import sharding
from mmjax.train.checkpoints import CheckpointConfig, CheckpointError, Checkpoints, restore_params
from mmjax.train.experiment import prepare
from mmjax.train.state import fingerprint

CONFIG = tiny.contrastive(
    "siglip", optimizer=dict(ema=0.9), train=dict(steps=10, batch_size=16), checkpoint=dict(every=5)
)


def mesh_of(*shape):
    devices = np.array(jax.devices()[: int(np.prod(shape))])
    return Mesh(devices.reshape(shape), sharding.AXES)


def run(experiment, state, first, last):
    """Steps first..last on their own batches; the state and the losses."""
    compiled, losses = None, []
    for step in range(first, last + 1):
        arrays = {name: tiny.batch(step)[name] for name in experiment.task.fields}
        arrays = sharding.global_batch(arrays, experiment.mesh)
        compiled = compiled or experiment.lower_step(arrays).compile()
        state, metrics = compiled(state, arrays)
        losses.append(float(metrics["loss"]))
    return state, losses


def equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(one), jax.device_get(other))


@pytest.fixture(scope="module")
def experiments():
    """On one device, and on eight with every axis in use and parameters large enough to be cut."""
    smallest, sharding.FSDP_MIN_SIZE = sharding.FSDP_MIN_SIZE, 1
    yield prepare(CONFIG, mesh_of(1, 1, 1)), prepare(CONFIG, mesh_of(2, 2, 2))
    sharding.FSDP_MIN_SIZE = smallest


@pytest.mark.parametrize("saver, reader", [(1, 0), (0, 1)], ids=["8 to 1", "1 to 8"])
def test_restores_on_another_mesh_and_goes_on(experiments, tmp_path, saver, reader):
    saver, reader = experiments[saver], experiments[reader]
    state, _ = run(saver, saver.initial_state({}), 1, 3)
    before = jax.device_get(state)
    with Checkpoints(tmp_path, saver.checkpoint) as saved:
        saved.save(3, state, {"position": 48}, {})
        # The step gives its buffers away while they are still being written.
        state, expected = run(saver, state, 4, 6)
    with Checkpoints(tmp_path, reader.checkpoint) as saved:
        step, restored, position = saved.restore(reader.abstract_state())
    assert (step, position) == (3, {"position": 48})
    equal(restored, before)
    assert fingerprint(restored.params) == fingerprint(before.params)
    for path, leaf in restored.params.items():
        assert leaf.sharding.is_equivalent_to(reader.placed[path], leaf.ndim)
    _, losses = run(reader, restored, 4, 6)
    np.testing.assert_allclose(losses[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    # Some parameters alone, as evaluation and config.init read them: the averages.
    _, some = restore_params(tmp_path, reader.target_params())
    equal(some, before.eval_params)


def test_fingerprint_sees_every_change(experiments):
    params = jax.device_get(experiments[0].initial_state({}).params)
    name = next(n for n in params if n.endswith("mlp/up/kernel"))
    changed = params[name].copy()
    changed[0, 3, 4] = -changed[0, 3, 4]
    swapped = params[name].copy()
    swapped[0, [1, 2]] = swapped[0, [2, 1]]
    prints = {fingerprint({**params, name: value}) for value in (params[name], changed, swapped)}
    assert len(prints) == 3


@pytest.fixture
def three(tmp_path):
    """A directory with the checkpoints of steps 1, 2, 3, and what to restore them to."""
    state = {"x": jax.numpy.arange(1000.0), "y": jax.numpy.ones(3)}
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    folder = tmp_path / "checkpoints"
    with Checkpoints(folder, CheckpointConfig(every=1, keep=3)) as saved:
        for step in (1, 2, 3):
            saved.save(step, tiny.only(state), {"step": step}, {})
    return folder, tiny.only(target)


def truncate_data(checkpoint):
    for file in checkpoint.glob("state/**/d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def truncate_position(checkpoint):
    (checkpoint / "data" / "metadata").write_text("{")


def remove_state(checkpoint):
    shutil.rmtree(checkpoint / "state")


def empty(checkpoint):
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


@pytest.mark.parametrize("damage", [truncate_data, truncate_position, remove_state, empty])
def test_damaged_checkpoint(three, damage):
    """The last whole one is used; the damaged is moved aside, and its step can be saved anew."""
    folder, target = three
    config = CheckpointConfig(every=1, keep=3)
    for _ in range(2):
        damage(folder / "3")
        with Checkpoints(folder, config) as saved:
            step, state, data = saved.restore(target)
            assert (step, data) == (2, {"step": 2})
            saved.save(3, state, {"step": 3}, {})
        assert (folder / "3").is_dir()
    assert len(list(folder.glob("corrupt-3*"))) == 2
    with Checkpoints(folder, config) as saved:
        assert saved.restore(target)[0] == 3


def test_leftovers_of_a_killed_save(three):
    folder, target = three
    shutil.copytree(folder / "3", folder / "4.orbax-checkpoint-tmp-17")
    (folder / "4.orbax-checkpoint-tmp-17" / "commit_success.txt").unlink(missing_ok=True)
    with Checkpoints(folder, CheckpointConfig(every=1)) as saved:
        step, state, data = saved.restore(target)
        assert step == 3
        # Orbax clears up in the background, and waits for that before it saves.
        saved.save(4, state, data, {})
    assert not list(folder.glob("*tmp*"))


def test_nothing_readable(three):
    folder, target = three
    for step in "123":
        truncate_data(folder / step)
    before = sorted(path.name for path in folder.iterdir())
    saved = Checkpoints(folder, CheckpointConfig(every=1))
    with pytest.raises(CheckpointError, match=r"(?s)None of the .*step 3.*step 1.*--workdir"):
        saved.restore(target)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_what_is_kept(tmp_path):
    state = tiny.only({"x": jax.numpy.ones(3)})
    config = CheckpointConfig(every=1, keep=2, keep_every=4, best="eval/a/score")
    scores = {1: 0.1, 2: 0.9, 3: 0.3, 5: 0.4, 6: 0.2}
    for steps in (range(1, 5), range(5, 10)):  # the second time as a resumed run
        with Checkpoints(tmp_path, config) as saved:
            for step in steps:
                metrics = {"eval/a/score": scores[step]} if step in scores else {}
                saved.save(step, state, {}, metrics)
    assert {int(path.name) for path in tmp_path.iterdir()} == {2, 4, 8, 9}


@pytest.mark.parametrize("fields", [dict(every=0), dict(every=1, keep=0)])
def test_config(fields):
    with pytest.raises(ValueError, match="must be at least 1"):
        CheckpointConfig(**fields)


def test_restore_params_names_what_is_wrong(three):
    folder, _ = three
    wrong = {
        "x": jax.ShapeDtypeStruct((7,), np.float32),
        "z": jax.ShapeDtypeStruct((3,), np.float32),
    }
    with pytest.raises(CheckpointError) as error:
        restore_params(folder, wrong)
    message = str(error.value)
    assert "'z' is not there" in message and "(1000,) there, (7,) here" in message
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*Train that run first"):
        restore_params(folder.parent / "nowhere", wrong)
    assert json.dumps(sorted(path.name for path in folder.iterdir())) == '["1", "2", "3"]'


def test_scores_that_come_after_the_checkpoint(tmp_path):
    """The best one stays, also if its evaluation failed at first and was made by a resumed run."""
    config = CheckpointConfig(every=1, keep=1, best="eval/a")
    state = tiny.only({"x": jax.numpy.ones(3)})
    with Checkpoints(tmp_path, config) as saved:
        saved.save(1, state, {}, {"eval/a": 0.5})
        saved.save(2, state, {}, {})
    with Checkpoints(tmp_path, config) as saved:
        saved.score(2, {"eval/a": 0.9})
        for step in (3, 4):
            saved.save(step, state, {}, {"eval/a": 0.1})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "4"]
