"""The step: accumulation equals the large batch, frozen means frozen, averages are averages."""

import jax
import numpy as np
import optax
import pytest
import tiny
import toy
from jax.sharding import Mesh

from mmjax import sharding
from mmjax.flops import matmul_flops
from mmjax.nn.partition import activation_sharding
from mmjax.params import merge
from mmjax.train.experiment import prepare
from mmjax.train.tasks import Contrastive

SGD = optax.sgd(1.0)


def mesh_of(count):
    return Mesh(np.array(jax.devices()[:count]).reshape(count, 1, 1), sharding.AXES)


def close(one, other, rtol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol), one, other)


@pytest.mark.parametrize("accumulate", [2, 4])
@pytest.mark.parametrize("task", ["weighted", "softmax", "softmax ring", "sigmoid", "sigmoid ring"])
def test_accumulation_equals_the_large_batch(task, accumulate):
    name, _, ring = task.partition(" ")
    if name == "weighted":
        task = toy.Weighted()
    else:
        task = Contrastive(mesh_of(2), loss=name, chunked=bool(ring))
    first, whole, (metrics,) = toy.train(task, SGD)
    _, parts, (accumulated,) = toy.train(task, SGD, accumulate=accumulate)
    close(parts.params, whole.params, 1e-6)
    close(accumulated, metrics, 1e-6)
    moved = optax.global_norm(jax.tree.map(lambda a, b: a - b, first.params, whole.params))
    np.testing.assert_allclose(moved, metrics["grad_norm"], rtol=1e-5)


def test_accumulation_of_a_real_model_on_a_mesh():
    """SigLIP around the ring of 2 x 2 shards with tensor parallelism, in 2 parts and in one."""
    losses = []
    shallow = dict(image=dict(depth=1), text=dict(depth=1))
    for accumulate in (1, 2):
        config = tiny.contrastive("siglip", chunked=True, train=dict(accumulate=accumulate))
        config.model.update(shallow)
        mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), sharding.AXES)
        losses.append(tiny.steps(prepare(config, mesh), 3)[1])
    np.testing.assert_allclose(losses[1][0], losses[0][0], rtol=1e-6)
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


def test_moving_average():
    averages = None
    for steps in range(4):
        _, last, _ = toy.train(toy.Weighted(), optax.sgd(0.1), steps=steps, ema=0.75)
        now = jax.device_get(last.trainable)
        averages = now if averages is None else {k: 0.75 * averages[k] + 0.25 * now[k] for k in now}
    close(last.ema, averages, 1e-6)
    assert not np.allclose(last.ema["image/kernel"], last.trainable["image/kernel"])
    np.testing.assert_array_equal(last.eval_params["image/kernel"], last.ema["image/kernel"])


def test_metrics_are_hand_computed():
    first, last, (metrics,) = toy.train(toy.Weighted(), optax.sgd(0.5))
    data, kernel = toy.batch(0), np.asarray(first.params["image/kernel"], np.float64)
    out = data["image"] @ kernel + np.asarray(first.params["image/bias"])
    loss = (data["weight"] * np.square(out - 1).sum(-1)).sum() / data["weight"].sum()
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["heavy"], (data["weight"] > 0.5).mean(), rtol=1e-6)
    before, after = jax.device_get(first.params), jax.device_get(last.params)
    moved = sum(np.square(after[path] - before[path]).sum() for path in before)
    np.testing.assert_allclose(0.5 * metrics["grad_norm"], moved**0.5, rtol=1e-6)
    squares = sum(np.square(leaf).sum() for leaf in before.values())
    np.testing.assert_allclose(metrics["param_norm"], squares**0.5, rtol=1e-6)


def locked(tower):
    return tiny.contrastive(
        "siglip", rules=dict(trainable=((f"{tower}.*", False), (".*", True))) if tower else {}
    )


def test_frozen_tower_is_untouched():
    experiment = prepare(locked("image"), mesh_of(1))
    before = jax.device_get(experiment.initial_state({}))
    state, _ = tiny.steps(experiment, 3)
    assert state.frozen and all(path.startswith("image/") for path in state.frozen)
    for path, leaf in state.frozen.items():
        np.testing.assert_array_equal(leaf, before.frozen[path])
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state.opt_state)]
    assert any("text/" in name for name in names) and not any("image/" in name for name in names)
    assert not np.allclose(
        state.trainable["text_projection/kernel"],
        before.trainable["text_projection/kernel"],
        atol=1e-6,
    )


def test_frozen_tower_costs_its_forward_pass_only():
    """The matmul FLOPs that freezing removes are exactly those of the tower's backward pass."""
    flops, memory = {}, {}
    for tower in (None, "image", "text"):
        experiment = prepare(locked(tower), mesh_of(1))
        arrays = sharding.global_batch(
            {name: tiny.batch()[name] for name in experiment.task.fields}, experiment.mesh
        )
        flops[tower] = experiment.step_flops(arrays)
        if tower != "text":
            analysis = experiment.lower_step(arrays).compile().memory_analysis()
            memory[tower] = analysis.temp_size_in_bytes
    with activation_sharding(sharding.activation_constraint(experiment.mesh)):
        image = matmul_flops(
            lambda params: merge(experiment.graphdef, params).encode_image(arrays["image"]),
            experiment.shapes,
        )
        text = matmul_flops(
            lambda params: merge(experiment.graphdef, params).encode_text(
                arrays["text"], arrays["text_mask"]
            ),
            experiment.shapes,
        )
    batch, width = 16, 32
    logits = 2 * batch**2 * width
    # Images need no gradient in any case: one product in the patch embedding's backward pass.
    patches = 2 * batch * (16 // 8) ** 2 * (8 * 8 * 3) * width
    assert flops[None] == 3 * (image + text + logits) - patches
    assert flops[None] - flops["image"] == 2 * image - patches + logits
    assert flops[None] - flops["text"] == 2 * text + logits
    assert memory["image"] < memory[None]
