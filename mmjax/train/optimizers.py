"""Optimizers by name, with learning rate, weight decay and freezing by rules tables.

Every optimizer is the same chain: clip the global gradient norm, precondition, add decoupled weight
decay, multiply by the parameter's learning-rate factor, by the schedule and by the peak rate. The
preconditioners come from optax.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from optax import contrib

from mmjax import rules
from mmjax.params import Params
from mmjax.registry import Registry
from mmjax.train.schedules import SCHEDULES, Schedule

PRECONDITIONERS: Registry[Callable[..., optax.GradientTransformation]] = Registry("optimizer")
PRECONDITIONERS.register("adamw")(optax.scale_by_adam)
PRECONDITIONERS.register("lion")(optax.scale_by_lion)


@PRECONDITIONERS.register("sgd")
def sgd(*, momentum: float = 0.0, nesterov: bool = False) -> optax.GradientTransformation:
    return optax.trace(momentum, nesterov) if momentum else optax.identity()


@PRECONDITIONERS.register("adafactor")
def adafactor(
    *,
    b1: float = 0.9,
    decay_rate: float = 0.8,
    clip: float | None = 1.0,
    min_dim_size_to_factor: int = 32,
) -> optax.GradientTransformation:
    """Factored second moments (Shazeer & Stern, 2018) with a first moment in bfloat16.

    Without its relative step sizes, as in "Scaling Vision Transformers" (Zhai et al., 2022), so
    that learning rates mean the same as for Adam.
    """
    parts = [
        optax.scale_by_factored_rms(
            decay_rate=decay_rate, min_dim_size_to_factor=min_dim_size_to_factor
        )
    ]
    if clip is not None:
        parts.append(optax.clip_by_block_rms(clip))
    if b1:
        parts.append(optax.ema(b1, debias=False, accumulator_dtype=jax.numpy.bfloat16))
    return optax.chain(*parts)


# Dimensions of an array that are the rows of a matrix, and its columns.
_MATRICES = {3: (1, 2), 4: ((0, 1, 2), 3)}


def _sides(kernel: Any) -> tuple[int, int]:
    """Rows and columns of each matrix, see `_MATRICES`."""
    stacked = kernel.ndim == 3
    return math.prod(kernel.shape[1 if stacked else 0 : -1]), kernel.shape[-1]


@PRECONDITIONERS.register("muon")
def muon(
    *,
    beta: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    b1: float = 0.9,
    b2: float = 0.999,
    convolutions: bool = False,
) -> optax.GradientTransformation:
    """Momentum orthogonalised by Newton-Schulz for the matrices of layers, Adam for all else.

    Updates of matrices are scaled to Adam's usual size (0.2 RMS; Liu et al., "Muon is Scalable for
    LLM Training", 2025), so that one learning rate serves both. Stacked kernels [layers, in, out]
    are orthogonalised layer by layer; with `convolutions` also their kernels [k, k, in, out], as
    matrices [k * k * in, out].
    """

    def is_matrix(path: str, leaf: Any) -> bool:
        if not path.endswith("/kernel"):
            return False
        stacked = "layers" in path.split("/") and leaf.ndim == 3
        return stacked or (convolutions and leaf.ndim == 4)

    def labels(params: Params) -> dict[str, str]:
        return {path: "muon" if is_matrix(path, leaf) else "adam" for path, leaf in params.items()}

    # optax masks what belongs to the other part; those leaves have no dimensions.
    def dimensions(updates: Params) -> dict[str, Any]:
        return {
            path: contrib.MuonDimensionNumbers(*_MATRICES[leaf.ndim])
            if not isinstance(leaf, optax.MaskedNode)
            else leaf
            for path, leaf in updates.items()
        }

    matrices = optax.chain(
        contrib.scale_by_muon(
            beta=beta,
            nesterov=nesterov,
            ns_steps=ns_steps,
            weight_dimension_numbers=dimensions,
        ),
        optax.stateless(
            lambda updates, params: jax.tree.map(
                lambda update: update * 0.2 * max(_sides(update)) ** 0.5, updates
            )
        ),
    )
    return optax.partition({"muon": matrices, "adam": optax.scale_by_adam(b1, b2)}, labels)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How the trained parameters move.

    Attributes:
      name: adamw, lion, adafactor, sgd or muon.
      learning_rate: the peak rate.
      schedule: {"name": constant | cosine | linear | rsqrt, ...} with that schedule's options.
      weight_decay: decoupled, multiplied by the learning rate (as in AdamW of PyTorch and optax).
      clip_norm: gradients are scaled down to this global norm; None leaves them.
      ema: decay of the moving average of parameters that is evaluated; None keeps none.
      options: the preconditioner's own options, e.g. {"b2": 0.95}.
    """

    name: str
    learning_rate: float
    schedule: Mapping[str, Any]
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    ema: float | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for name in ("learning_rate", "weight_decay"):
            value = getattr(self, name)
            if not is_factor(value):
                raise ValueError(f"config.optimizer.{name} must be at least 0, not {value!r}.")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(
                f"config.optimizer.clip_norm must be above 0, or None, not {self.clip_norm!r}."
            )
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(
                f"config.optimizer.ema must be at least 0 and below 1, or None, not {self.ema!r}."
            )


def is_factor(value: Any) -> bool:
    """Whether it is a finite number of at least 0."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return number and 0 <= value < math.inf


def make_schedule(config: OptimizerConfig, steps: int) -> Schedule:
    """The factor of the peak learning rate at each step."""
    options = dict(config.schedule)
    name = options.pop("name", None)
    try:
        return SCHEDULES[name](steps, **options)
    except TypeError as error:
        raise ValueError(f"config.optimizer.schedule: {error}") from None


def make_optimizer(
    config: OptimizerConfig,
    schedule: Schedule,
    params: Params,
    *,
    lr_table: rules.Table,
    decay_table: rules.Table,
) -> optax.GradientTransformation:
    """The transformation of gradients of the trained parameters.

    Args:
      config: see there.
      schedule: factors in [0, 1] by step.
      params: the trained parameters, or their shapes.
      lr_table: rows of (pattern, factor of the learning rate).
      decay_table: rows of (pattern, factor of the weight decay).

    Raises:
      RuleError: if a table does not fit.
      ValueError: on an unknown optimizer or option.
    """
    rates = rules.match(lr_table, params, name="rules.learning_rate")
    decays = rules.match(decay_table, params, name="rules.weight_decay")
    try:
        precondition = PRECONDITIONERS[config.name](**dict(config.options))
    except TypeError as error:
        raise ValueError(f"config.optimizer.options of {config.name!r}: {error}") from None
    parts = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    parts.append(precondition)
    if config.weight_decay:
        parts.append(
            optax.stateless(
                lambda updates, params: {
                    path: update + config.weight_decay * decays[path] * params[path]
                    if decays[path]
                    else update
                    for path, update in updates.items()
                }
            )
        )
    if any(rate != 1.0 for rate in rates.values()):
        parts.append(
            optax.stateless(
                lambda updates, params: {
                    path: update * rates[path] for path, update in updates.items()
                }
            )
        )
    parts.append(optax.scale_by_schedule(lambda count: -config.learning_rate * schedule(count)))
    return optax.chain(*parts)
