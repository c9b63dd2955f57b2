"""Calling modules under jit, which is how they are meant to be called and faster to compile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

# Options of `jax.jit` for tests that run a program once or twice: the same operations in code that
# is less well optimised, for half the time to compile, or a fifth where the second option exists.
QUICK = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):
    QUICK["xla_cpu_use_fusion_emitters"] = False


def random_values(shapes: Mapping[str, Any], deviation: float = 0.1) -> dict[str, np.ndarray]:
    """Parameters of which none is zero, and which take no time to compile."""
    random = np.random.default_rng(1)
    return {
        path: (path.endswith("scale") + deviation * random.standard_normal(x.shape)).astype("f")
        for path, x in shapes.items()
    }


def jitted(model: nnx.Module, function: Callable | None = None, **static) -> Callable:
    """`function(model, *arrays, **static)`, compiled; the model's own call if None."""
    graph, params = nnx.split(model)
    function = type(model).__call__ if function is None else function
    compiled = jax.jit(lambda params, *args: function(nnx.merge(graph, params), *args, **static))
    return lambda *args: compiled(params, *args)
