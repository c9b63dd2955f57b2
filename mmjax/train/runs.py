"""The model of a finished run, or of what has the layout of one."""

from __future__ import annotations

import importlib
import json
import logging
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

_log = logging.getLogger(__name__)

# Describes a model whose checkpoint is of no run: experiments.convert writes it.
MODEL = "model.json"
CONFIG = "config.json"
# Has the files of its tokenizer and processor; of a run, the tokenizer that it trained.
COMPANIONS = "tokenizer"
# In the manifest of a run, and in what describes a model.
PLUGINS = "plugins"


def read_run(directory: str | Path, *, merged: bool = True) -> nnx.Module:
    """The model of a run (of its last checkpoint), or of what `experiments.convert` wrote as Orbax.

    Args:
      merged: whether adapters (LoRA) are merged into their kernels, or stay apart.

    Raises:
      CheckpointError, ConfigError: if there is none, or it is damaged.
    """
    directory = Path(directory).expanduser()
    described, run = directory / MODEL, directory / CONFIG
    stored = described if described.exists() else run
    if not stored.exists():
        raise ConfigError(f"{directory} has checkpoints, but neither {MODEL} nor {CONFIG}.")
    import_plugins(directory)
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


def import_plugins(directory: Path) -> None:
    """Imports the modules that registered what a run is made of, as its config did: connectors,
    forms, tasks of a user's own. One that cannot be imported from here is logged."""
    described, manifest = directory / MODEL, directory / "manifest.json"
    modules: list[str] = []
    if described.exists():
        modules = json.loads(described.read_text("utf-8")).get(PLUGINS, [])
    elif manifest.exists():
        modules = json.loads(manifest.read_text("utf-8"))[-1].get(PLUGINS, [])
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            _log.warning(
                "%s was trained with the module %r, which cannot be imported here (%s). If what it "
                "registered is missing, start the command where that module is, or set PYTHONPATH. "
                "What a config file registers belongs into a module that it imports.",
                directory,
                name,
                error,
            )


def _build(content: Mapping[str, Any]) -> nnx.Module:
    rngs = nnx.Rngs(0)
    model = build(content["model"], rngs=rngs)
    if content.get("lora") is not None:
        lora.add(model, dataclass_from(LoRAConfig, content["lora"], "config.lora"), rngs=rngs)
    return model
