"""The model of a finished run, or of what has the layout of one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from mmjax.config import ConfigError, dataclass_from
from mmjax.convert.family import Origin
from mmjax.factory import build
from mmjax.nn import lora
from mmjax.nn.lora import LoRAConfig
from mmjax.params import abstract, merge
from mmjax.train.checkpoints import restore_params

# Describes a model whose checkpoint is of no run: experiments.convert writes it.
MODEL = "model.json"
CONFIG = "config.json"
# Has the files of its tokenizer and processor; of a run, the tokenizer that it trained.
COMPANIONS = "tokenizer"


def read_run(directory: Path, *, merged: bool = True) -> nnx.Module:
    """The model of a run (of its last checkpoint), or of what `experiments.convert` wrote as Orbax.

    Args:
      merged: whether adapters (LoRA) are merged into their kernels, or stay apart.

    Raises:
      CheckpointError, ConfigError: if there is none, or it is damaged.
    """
    described, run = directory / MODEL, directory / CONFIG
    stored = described if described.exists() else run
    if not stored.exists():
        raise ConfigError(f"{directory} has checkpoints, but neither {MODEL} nor {CONFIG}.")
    content = json.loads(stored.read_text("utf-8"))
    graph, shapes = abstract(lambda: _build(content))
    where = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    targets = {
        path: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)
        for path, shape in shapes.items()
    }
    _, params = restore_params(directory / "checkpoints", targets)
    model = merge(graph, params)
    if content.get("origin"):
        model.origin = Origin(**content["origin"])
    return lora.merge(model) if merged else model


def _build(content: Mapping[str, Any]) -> nnx.Module:
    rngs = nnx.Rngs(0)
    model = build(content["model"], rngs=rngs)
    if content.get("lora") is not None:
        lora.add(model, dataclass_from(LoRAConfig, content["lora"], "config.lora"), rngs=rngs)
    return model
