"""A model from its config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import nnx

from mmjax.config import dataclass_from, split_name
from mmjax.models import MODELS


def build(config: Mapping[str, Any], *, rngs: nnx.Rngs) -> nnx.Module:
    """Build the model that `config.name` names from the other fields.

    Args:
      config: a ConfigDict or dict, e.g. `{"name": "vit", "width": 192, ...}`; nested models are
        nested groups.
      rngs: random streams for the initial parameters.

    Raises:
      UnknownNameError: if there is no such model; the nearest name is given.
      ConfigError: if a field is unknown or missing; all are listed.
    """
    name, fields = split_name(config, "config.model")
    config_class, model_class = MODELS[name]
    return model_class(dataclass_from(config_class, fields, "config.model"), rngs=rngs)
