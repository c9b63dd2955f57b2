"""Calling modules under jit, which is how they are meant to be called and faster to compile."""

from __future__ import annotations

from collections.abc import Callable

import jax
from flax import nnx

# Options of `jax.jit` for tests that run a program once or twice: the same operations in code that
# is less well optimised, for half the time to compile, or a fifth where the second option exists.
QUICK = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):
    QUICK["xla_cpu_use_fusion_emitters"] = False


def jitted(model: nnx.Module, function: Callable | None = None, **static) -> Callable:
    """`function(model, *arrays, **static)`, compiled; the model's own call if None."""
    graph, params = nnx.split(model)
    function = type(model).__call__ if function is None else function
    compiled = jax.jit(lambda params, *args: function(nnx.merge(graph, params), *args, **static))
    return lambda *args: compiled(params, *args)
