"""The training state: what a step reads and writes, and what a checkpoint holds."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from mmjax import sharding
from mmjax.params import Params, split


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that changes during training, and the frozen parameters beside it.

    Gradients and optimizer state exist for `trainable` only.

    Attributes:
      step: updates done so far, int32 scalar.
      rng: key data (uint32) from which every step folds its own key.
      trainable: parameters that are trained, by path.
      frozen: parameters that are not; some may be learnt from statistics of batches.
      opt_state: the optimizer's.
      ema: moving averages of `trainable`; empty if none are kept.
    """

    step: Any
    rng: Any
    trainable: Params
    frozen: Params
    opt_state: Any
    ema: Params

    @property
    def params(self) -> Params:
        """All parameters as trained."""
        return {**self.trainable, **self.frozen}

    @property
    def eval_params(self) -> Params:
        """All parameters as evaluated: the moving averages where they are kept."""
        return {**self.trainable, **self.frozen, **self.ema}


def create(
    params: Params,
    trainable: Mapping[str, bool],
    tx: optax.GradientTransformation,
    *,
    seed: int,
    ema: bool,
) -> TrainState:
    """The state before the first step."""
    trained = {path: leaf for path, leaf in params.items() if trainable[path]}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        rng=jax.random.key_data(jax.random.key(seed)),
        trainable=trained,
        frozen={path: leaf for path, leaf in params.items() if not trainable[path]},
        opt_state=tx.init(trained),
        # Copies: the step donates its input, and one buffer cannot be given away twice.
        ema={path: jnp.copy(leaf) for path, leaf in trained.items()} if ema else {},
    )


def shardings(state: TrainState, parameters: Mapping[str, NamedSharding], mesh: Mesh) -> TrainState:
    """A sharding for every leaf of the state.

    Optimizer state that belongs to a parameter and has its shape lies where the parameter lies; the
    rest (counters, factored moments) is replicated.

    Args:
      state: arrays or shapes.
      parameters: the parameters' own shardings.
      mesh: the mesh.
    """
    shapes = {path: leaf.shape for path, leaf in state.params.items()}
    whole = sharding.replicated(mesh)

    def place(path, leaf):
        for key in path:
            name = key.key if isinstance(key, jax.tree_util.DictKey) else None
            if name in shapes and shapes[name] == leaf.shape:
                return parameters[name]
        return whole

    return jax.tree_util.tree_map_with_path(place, state)


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """Shapes that say where they lie: what Orbax and `jit(...).lower` take."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def initialise(
    make: Callable[[], nnx.Module],
    placed: Mapping[str, NamedSharding],
    loaded: Params,
) -> Params:
    """All parameters on the mesh: those loaded, and only the others initialised.

    Args:
      make: builds the model with its random streams.
      placed: the sharding of every parameter.
      loaded: parameters that came from elsewhere, already sharded.
    """
    missing = {path: where for path, where in placed.items() if path not in loaded}
    fresh = jax.jit(
        lambda: {path: leaf for path, leaf in split(make())[1].items() if path in missing},
        out_shardings=missing,
    )()
    return {path: loaded[path] if path in loaded else fresh[path] for path in placed}


def fingerprint(params: Params) -> str:
    """A hash of names and values, the same however the parameters are sharded."""

    def checksum(x):
        bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
        # Weighted by place, odd weights: values that swap places or signs that flip are seen.
        weight = jnp.ones((), jnp.uint32)
        for dim in range(x.ndim):
            place = jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim)
            weight = weight * (2 * place + 1) + jnp.uint32(2654435762) * place
        return jnp.sum(bits * weight, dtype=jnp.uint32)

    sums = jax.device_get(jax.jit(lambda params: jax.tree.map(checksum, params))(params))
    text = "".join(f"{path} {params[path].shape} {int(sums[path])}\n" for path in sorted(sums))
    return hashlib.sha256(text.encode()).hexdigest()
