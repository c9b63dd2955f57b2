"""Learning-rate schedules, as factors of the peak rate.

Each maker takes (total steps, **options) and returns a function of the step with values in [0, 1];
all but their options are computed from config, so a schedule can be drawn before training.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import optax

from mmjax.registry import Registry

Schedule = Callable[..., "jnp.ndarray"]
SCHEDULES: Registry[Callable[..., Schedule]] = Registry("schedule")


def _warm(schedule: Schedule, warmup: int) -> Schedule:
    """Linear from 0 during the first `warmup` steps, then `schedule` counted from there."""
    if warmup == 0:
        return schedule
    return optax.join_schedules([optax.linear_schedule(0.0, 1.0, warmup), schedule], [warmup])


def _check(steps: int, **spans: int) -> None:
    for name, span in spans.items():
        if span < 0 or span > steps:
            raise ValueError(
                f"optimizer.schedule.{name}={span} does not fit into train.steps={steps}."
            )


@SCHEDULES.register("constant")
def constant(steps: int, *, warmup: int = 0) -> Schedule:
    """1 after the warm-up."""
    _check(steps, warmup=warmup)
    return _warm(optax.constant_schedule(1.0), warmup)


@SCHEDULES.register("cosine")
def cosine(steps: int, *, warmup: int = 0, end: float = 0.0) -> Schedule:
    """Half a cosine from 1 to `end` over the steps after the warm-up (Loshchilov & Hutter,
    2017)."""
    _check(steps, warmup=warmup)
    return _warm(optax.cosine_decay_schedule(1.0, max(steps - warmup, 1), alpha=end), warmup)


@SCHEDULES.register("linear")
def linear(steps: int, *, warmup: int = 0, end: float = 0.0) -> Schedule:
    """A straight line from 1 to `end` over the steps after the warm-up."""
    _check(steps, warmup=warmup)
    return _warm(optax.linear_schedule(1.0, end, max(steps - warmup, 1)), warmup)


@SCHEDULES.register("rsqrt")
def rsqrt(steps: int, *, warmup: int, timescale: int, cooldown: int = 0) -> Schedule:
    """Inverse square root with a linear cooldown to 0 (Zhai et al., "Scaling Vision Transformers").

    Args:
      steps: all steps.
      warmup: steps of linear warm-up.
      timescale: after so many further steps the factor is 1/sqrt(2).
      cooldown: the last so many steps go linearly to 0.
    """
    _check(steps, warmup=warmup, cooldown=cooldown)

    def schedule(step):
        factor = jnp.sqrt(timescale / (timescale + jnp.maximum(step - warmup, 0)))
        if warmup:
            factor = jnp.minimum(factor, step / warmup)
        if cooldown:
            factor = factor * jnp.clip((steps - step) / cooldown, 0.0, 1.0)
        return factor

    return schedule
