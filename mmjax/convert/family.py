"""What it takes to convert one class of transformers: a `Family`, and the registry of all."""

from __future__ import annotations

import dataclasses
import importlib
import json
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flax import nnx

from mmjax.convert.table import ConversionError, Row
from mmjax.registry import Registry, nearest

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Source(NamedTuple):
    """What a model's config is made from.

    Attributes:
      config: of transformers, all defaults filled in.
      names: canonical names of the checkpoint's tensors; some options show only there.
      directory: of the checkpoint; None when a config is only tried out.
    """

    config: PretrainedConfig
    names: frozenset[str]
    directory: Path | None


@dataclasses.dataclass(frozen=True)
class Family:
    """The two-way conversion of one class of transformers.

    Attributes:
      model_type: as in `config.json`.
      model: our module, built as `model(config, rngs=rngs)`; see `module`.
      from_hf: source -> the config of our module. Raises ValueError where an option of theirs
        changes what is computed in a way that ours does not have.
      to_hf: config of our module -> config of transformers. A config is saved by a family only if
        `from_hf` leads back to it.
      rows: config of our module -> the table of modules.
      renames: (regular expression, replacement) pairs, applied one after the other, that lead
        from names of older checkpoints to those that transformers writes today.
      module_names: pairs like `renames` that lead from today's names of tensors to those by which a
        model of transformers has them, where it writes others.
      ignored: config of our module -> patterns over whole canonical names of tensors that are
        knowingly not used.
      aliases: further class names whose checkpoints this family reads (their heads being ignored).
      variants: classes of our configs that are those of another module than `model`.
      generation: entries of `generation_config.json` that say what a model is; they are read as if
        they stood in `config.json`, and written where they belong.
    """

    model_type: str
    model: type[nnx.Module]
    from_hf: Callable[[Source], Any]
    to_hf: Callable[[Any], PretrainedConfig]
    rows: Callable[[Any], Sequence[Row]]
    renames: Sequence[tuple[str, str]] = ()
    module_names: Sequence[tuple[str, str]] = ()
    ignored: Callable[[Any], Sequence[str]] = lambda config: ()
    aliases: Sequence[str] = ()
    variants: Mapping[type, type[nnx.Module]] = dataclasses.field(default_factory=dict)
    generation: Sequence[str] = ()

    def module(self, config: Any) -> type[nnx.Module]:
        """The class of our model for a config of this family."""
        return self.variants.get(type(config), self.model)


# By name of the class in transformers ("architectures" in config.json).
FAMILIES: Registry[Family] = Registry("architecture")
# By model type: why models that people will ask for are not converted, and what to take instead.
REFUSED: dict[str, str] = {}


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a model was read from; a static attribute `origin` of models that were.

    Attributes:
      architecture: the class in transformers.
      config: its `config.json`, as text.
      directory: the checkpoint's.
    """

    architecture: str
    config: str
    directory: str


def families() -> Registry[Family]:
    """All families; their modules are imported at the first call."""
    import mmjax.convert.families as package

    for module in pkgutil.iter_modules(package.__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"{package.__name__}.{module.name}")
    return FAMILIES


def read_json(path: Path) -> dict[str, Any]:
    """Raises ConversionError if there is no such file, or no JSON object in it."""
    if not path.is_file():
        raise ConversionError(f"{path.parent} is no checkpoint: it has no {path.name}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ConversionError(f"{path} is not JSON ({error}): copy it again.") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds no JSON object: copy it again.")
    return content


def find(content: dict[str, Any], where: str) -> tuple[str, Family]:
    """The name and family of the class that a `config.json` names.

    Without a class, or with one whose model type is known while it is not, the first family of the
    model type is taken: whether it fits, the tensors show.

    Raises:
      ConversionError: if the model type is unknown or `REFUSED`; the nearest known one is named, or
        the reason.
    """
    known = families()
    for name in content.get("architectures") or ():
        for key in known:
            if name == key or name in known[key].aliases:
                return key, known[key]
    model_type = content.get("model_type")
    if model_type in REFUSED:
        raise ConversionError(f"{where} has model_type={model_type!r}: {REFUSED[model_type]}")
    types = {known[name].model_type for name in known}
    if model_type not in types:
        raise ConversionError(
            f"{where} has model_type={model_type!r}, which mmjax does not convert; "
            f"{nearest(str(model_type), types)}\nTo add a family, write one file in "
            "mmjax/convert/families."
        )
    name = next(name for name in known if known[name].model_type == model_type)
    return name, known[name]


def transformers_config(content: dict[str, Any], where: str) -> PretrainedConfig:
    """The config object of transformers for the content of a `config.json`."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[content["model_type"]].from_dict(content)
    except (KeyError, TypeError, ValueError, AttributeError, StrictDataclassError) as error:
        raise ConversionError(
            f"transformers cannot read the config.json of {where}: {error}"
        ) from error
