"""The model of a finished run, or of what has the layout of one."""

from __future__ import annotations

import json
from pathlib import Path

import jax
from flax import nnx

from mmjax.config import ConfigError
from mmjax.convert.family import Origin
from mmjax.factory import build
from mmjax.params import abstract, merge
from mmjax.train.checkpoints import restore_params

# Describes a model whose checkpoint is of no run: experiments.convert writes it.
MODEL = "model.json"
CONFIG = "config.json"


def read_run(directory: Path) -> nnx.Module:
    """The model of a run (of its last checkpoint), or of what `experiments.convert` wrote as Orbax.

    Raises:
      CheckpointError, ConfigError: if there is none, or it is damaged.
    """
    described, run = directory / MODEL, directory / CONFIG
    stored = described if described.exists() else run
    if not stored.exists():
        raise ConfigError(f"{directory} has checkpoints, but neither {MODEL} nor {CONFIG}.")
    content = json.loads(stored.read_text("utf-8"))
    graph, shapes = abstract(lambda: build(content["model"], rngs=nnx.Rngs(0)))
    where = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    targets = {
        path: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)
        for path, shape in shapes.items()
    }
    _, params = restore_params(directory / "checkpoints", targets)
    model = merge(graph, params)
    if content.get("origin"):
        model.origin = Origin(**content["origin"])
    return model
