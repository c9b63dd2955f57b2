"""Optimizers and schedules against PyTorch, optax and published formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from optax import contrib

from mmjax.train.optimizers import (
    PRECONDITIONERS,
    OptimizerConfig,
    make_optimizer,
    make_schedule,
)
from mmjax.train.schedules import SCHEDULES

ALL = ((".*", 1.0),)


def optimizer(params, name="adamw", lr=0.1, schedule=None, rates=ALL, decays=ALL, **fields):
    config = OptimizerConfig(
        name=name, learning_rate=lr, schedule=schedule or {"name": "constant"}, **fields
    )
    factors = make_schedule(config, 10)
    return make_optimizer(config, factors, params, lr_table=rates, decay_table=decays), factors


def some(seed=0, **shapes):
    random = np.random.default_rng(seed)
    return {
        name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()
    }


@pytest.mark.torch
@pytest.mark.parametrize(
    "name, options, torch_options",
    [
        ("adamw", dict(b2=0.95), dict(betas=(0.9, 0.95))),
        ("sgd", dict(momentum=0.9), dict(momentum=0.9)),
        ("sgd", dict(momentum=0.9, nesterov=True), dict(momentum=0.9, nesterov=True)),
    ],
)
def test_equals_torch(name, options, torch_options):
    """With a schedule, clipping, and learning rate and weight decay by pattern."""
    torch = pytest.importorskip("torch")
    start = some(a=(4, 3), b=(3,), c=(5,))
    rates = (("c", 0.1), (".*", 1.0))
    decays = (("a", 1.0), (".*", 0.0))
    decay = 0.3 if name == "adamw" else 0.0  # PyTorch's SGD has no decoupled decay
    schedule = {"name": "cosine", "warmup": 2, "end": 0.1}
    tx, factors = optimizer(
        start, name, schedule=schedule, rates=rates, decays=decays, weight_decay=decay,
        clip_norm=2.0, options=options,
    )  # fmt: skip
    theirs = {key: torch.nn.Parameter(torch.tensor(value)) for key, value in start.items()}
    groups = [
        dict(params=[theirs["a"]], weight_decay=decay, factor=1.0),
        dict(params=[theirs["b"]], weight_decay=0.0, factor=1.0),
        dict(params=[theirs["c"]], weight_decay=0.0, factor=0.1),
    ]
    cls = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[name]
    reference = cls(groups, lr=1.0, **torch_options)
    ours, state = start, tx.init(start)
    for step in range(6):
        grads = some(step + 1, a=(4, 3), b=(3,), c=(5,))
        updates, state = tx.update(grads, state, ours)
        ours = optax.apply_updates(ours, updates)
        for key, parameter in theirs.items():
            parameter.grad = torch.tensor(grads[key])
        torch.nn.utils.clip_grad_norm_(theirs.values(), 2.0)
        for group in reference.param_groups:
            group["lr"] = 0.1 * float(factors(step)) * group["factor"]
        reference.step()
    for key, parameter in theirs.items():
        np.testing.assert_allclose(ours[key], parameter.detach().numpy(), rtol=2e-5, atol=1e-6)


def test_lion_by_its_formula():
    """Chen et al., 2023: sign(b1 m + (1 - b1) g), then m = b2 m + (1 - b2) g."""
    start = some(x=(7,))
    tx, _ = optimizer(start, "lion", lr=0.01, weight_decay=0.5, clip_norm=None)
    ours, state = start, tx.init(start)
    x, m = start["x"].copy(), np.zeros(7, np.float32)
    for step in range(4):
        grads = some(step + 1, x=(7,))
        updates, state = tx.update(grads, state, ours)
        ours = optax.apply_updates(ours, updates)
        x -= 0.01 * (np.sign(0.9 * m + 0.1 * grads["x"]) + 0.5 * x)
        m = 0.99 * m + 0.01 * grads["x"]
    np.testing.assert_allclose(ours["x"], x, rtol=1e-5, atol=1e-7)


def test_muon_of_a_stack_is_muon_of_each_layer():
    start = some(
        **{"layers/up/kernel": (3, 8, 16), "head/kernel": (8, 4), "layers/up/bias": (3, 16)}
    )
    tx, _ = optimizer(start, "muon", lr=1.0, clip_norm=None)
    single = contrib.scale_by_muon(
        weight_dimension_numbers={
            "k": contrib.MuonDimensionNumbers(reduction_axis=0, output_axis=1)
        }
    )
    state = tx.init(start)
    states = [single.init({"k": start["layers/up/kernel"][layer]}) for layer in range(3)]
    adam, adam_state = optax.scale_by_adam(), optax.scale_by_adam().init(start["head/kernel"])
    for step in range(3):
        grads = {k: some(step + 1, x=v.shape)["x"] for k, v in start.items()}
        updates, state = tx.update(grads, state, start)
        for layer in range(3):
            layered = {"k": grads["layers/up/kernel"][layer]}
            wanted, states[layer] = single.update(layered, states[layer], layered)
            # Scaled to Adam's usual size (Liu et al., 2025).
            np.testing.assert_allclose(
                updates["layers/up/kernel"][layer], -0.2 * 16**0.5 * wanted["k"],
                rtol=1e-4, atol=1e-5,
            )  # fmt: skip
        wanted, adam_state = adam.update(grads["head/kernel"], adam_state)
        np.testing.assert_allclose(updates["head/kernel"], -wanted, rtol=1e-5)


@pytest.mark.parametrize("name", PRECONDITIONERS.names())
def test_every_optimizer_learns(name):
    stacked = some(**{"layers/kernel": (2, 40, 40), "bias": (40,)})
    target = some(9, **{"layers/kernel": (2, 40, 40), "bias": (40,)})

    def loss(params):
        return sum(jnp.mean(jnp.square(params[key] - target[key])) for key in params)

    tx, _ = optimizer(stacked, name, lr={"sgd": 30.0}.get(name, 0.05), clip_norm=None)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params, state = stacked, tx.init(stacked)
    for _ in range(20):
        params, state = step(params, state)
    assert loss(params) < 0.7 * loss(stacked)
    # The tests of the step use it too: with the whole chain, in a jitted step.
    assert all(np.isfinite(leaf).all() for leaf in params.values())


def test_zero_rate_and_zero_decay():
    """A factor of 0 in the tables means exactly that."""
    first = toy.train(toy.Weighted(), optax.sgd(0.1))[0].params
    tx, _ = optimizer(first, rates=(("image/bias", 0.0), (".*", 1.0)), weight_decay=0.1)
    _, last, _ = toy.train(toy.Weighted(), tx, steps=2)
    np.testing.assert_array_equal(last.params["image/bias"], first["image/bias"])
    # The text tower has no gradient here: it only decays, by 1 - rate x decay each step.
    np.testing.assert_allclose(
        last.params["text/kernel"], first["text/kernel"] * (1 - 0.1 * 0.1) ** 2, rtol=1e-6
    )


def test_schedules_at_known_points():
    def at(steps, *points, name, **options):
        schedule = SCHEDULES[name](steps, **options)
        return [float(schedule(point)) for point in points]

    np.testing.assert_allclose(at(100, 0, 5, 10, 99, name="constant", warmup=10), [0, 0.5, 1, 1])
    np.testing.assert_allclose(
        at(110, 0, 5, 10, 60, 110, name="cosine", warmup=10, end=0.2),
        [0, 0.5, 1, 0.6, 0.2],
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        at(110, 0, 10, 35, 60, 110, name="linear", warmup=10), [0, 1, 0.75, 0.5, 0], atol=1e-6
    )
    np.testing.assert_allclose(at(100, 0, 50, name="cosine"), [1, 0.5], rtol=1e-6)


def test_rsqrt_is_that_of_big_vision():
    """`create_learning_rate_schedule` there, with decay_type "rsqrt", written out."""
    steps, warmup, timescale, cooldown = 1000, 50, 100, 200
    schedule = SCHEDULES["rsqrt"](steps, warmup=warmup, timescale=timescale, cooldown=cooldown)
    for step in (0, 1, 25, 50, 51, 150, 500, 800, 801, 900, 999, 1000):
        wanted = 1 / np.sqrt(1 + (step - warmup) / timescale) if step >= warmup else 1.0
        wanted *= min(1.0, step / warmup) * min(1.0, (steps - step) / cooldown)
        np.testing.assert_allclose(float(schedule(step)), wanted, rtol=1e-6, atol=1e-9)
    assert float(schedule(150)) == pytest.approx(0.5**0.5)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(name="adamv"), "did you mean 'adamw'"),
        (dict(options=dict(beta3=1)), "beta3"),
        (dict(schedule=dict(name="cosin")), "did you mean 'cosine'"),
        (dict(schedule=dict(name="cosine", warmup=11)), "warmup=11 does not fit"),
        (dict(schedule=dict(name="rsqrt")), "schedule: missing a required .*'warmup'"),
        (dict(rates=(("nothing", 1.0),)), "matches no parameter"),
    ],
)
def test_bad_input(fields, message):
    with pytest.raises(ValueError, match=message):
        optimizer(some(x=(3,)), **fields)
