"""Sharding hints for activations, by logical names.

Layers name the dimensions of what they compute ("batch", "tokens", "embed", "heads", "mlp"); they
know no mesh. Whoever compiles a model on a mesh opens `activation_sharding` around the tracing and
says how each name maps to mesh axes. Outside of it `constrain` returns its input, so that a model
runs in a notebook as it is.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator

from mmjax.typing import Array

Constraint = Callable[[Array, tuple[str | None, ...]], Array]
_active: contextvars.ContextVar[Constraint | None] = contextvars.ContextVar(
    "activation_sharding", default=None
)


@contextlib.contextmanager
def activation_sharding(constraint: Constraint | None) -> Iterator[None]:
    """Within the block, `constrain(x, *names)` returns `constraint(x, names)`."""
    token = _active.set(constraint)
    try:
        yield
    finally:
        _active.reset(token)


def constrain(x: Array, *names: str | None) -> Array:
    """Say what the dimensions of `x` are; one name (or None) for each.

    Raises:
      ValueError: if the number of names is not the number of dimensions.
    """
    if len(names) != x.ndim:
        raise ValueError(f"{len(names)} names {names} for an array of shape {x.shape}.")
    constraint = _active.get()
    return x if constraint is None else constraint(x, names)
