"""Models as a graph definition and a flat dictionary of arrays.

Everything outside the models (rules, sharding, optimizers, checkpoints) sees parameters as
`{"image/layers/attention/query/kernel": array}`: a plain pytree whose keys regular expressions
match.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

Params = dict[str, Any]


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """The static structure of a model and its variables by '/'-joined path."""
    graphdef, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    return graphdef, {"/".join(map(str, path)): variable.get_value() for path, variable in flat}


def merge(graphdef: nnx.GraphDef, params: Mapping[str, Any]) -> nnx.Module:
    """The inverse of `split`."""
    leaves = [(tuple(path.split("/")), nnx.Param(value)) for path, value in params.items()]
    return nnx.merge(graphdef, nnx.from_flat_state(leaves))


def abstract(make: Callable[[], nnx.Module]) -> tuple[nnx.GraphDef, Params]:
    """Structure and shapes of a model that is never allocated.

    Args:
      make: builds the model, e.g. `lambda: mmjax.build(config.model, rngs=nnx.Rngs(0))`.

    Returns:
      The graph definition and `{path: jax.ShapeDtypeStruct}`.
    """
    graphdef, shapes = split(nnx.eval_shape(make))
    return graphdef, {
        path: jax.ShapeDtypeStruct(shape.shape, shape.dtype) for path, shape in shapes.items()
    }


def count(params: Mapping[str, Any]) -> int:
    """The number of parameters."""
    return sum(leaf.size for leaf in params.values())
