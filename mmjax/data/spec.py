"""What a data config may say: strict dataclasses made from mappings (or ml_collections
ConfigDicts)."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mmjax.config import split_name
from mmjax.data.augment import AUGMENTATIONS, Augmentation
from mmjax.data.image import PRESETS
from mmjax.registry import UnknownNameError, nearest


def plain(config: Any) -> Any:
    """ConfigDicts, tuples and lists inside one another -> dicts and lists."""
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    if isinstance(config, Mapping):
        return {key: plain(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [plain(value) for value in config]
    return config


def call_strictly(what: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """`function(**arguments)` where unknown or missing arguments name the nearest and the valid
    ones.

    Raises:
      UnknownNameError: an argument the function does not take.
      ValueError: a required argument is missing.
    """
    parameters = inspect.signature(function).parameters
    for key in arguments:
        if key not in parameters:
            raise UnknownNameError(f"{what} has no field {key!r}; {nearest(key, parameters)}")
    missing = [
        name
        for name, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty and name not in arguments
    ]
    if missing:
        raise ValueError(f"{what} needs {', '.join(missing)}; it has {sorted(arguments)}.")
    return function(**arguments)


def make_augmentation(config: Mapping[str, Any]) -> Augmentation:
    """`dict(name="random_erasing", share=0.1)` -> the augmentation."""
    name, arguments = split_name(config, "An augmentation")
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
    return call_strictly(f"augmentation {name!r}", AUGMENTATIONS[name], arguments)


@dataclass(frozen=True)
class ImageSpec:
    """`field` of the record, `preset` of the family, `size` in pixels, `augment`: dicts by name."""

    preset: str
    size: int
    field: str = "image"
    augment: tuple[Augmentation, ...] = ()

    def __post_init__(self):
        PRESETS[self.preset]  # raises for an unknown name
        if self.size < 1:
            raise ValueError(f"data image size {self.size} must be at least 1 pixel.")


@dataclass(frozen=True)
class TextSpec:
    """`field` of the record: a string, or a list of strings of which training draws one (evaluation
    takes the first). `also`: another such field, drawn instead with probability `also_share`.
    `max_len` in tokens."""

    max_len: int
    field: str = "text"
    also: str | None = None
    also_share: float = 0.0

    def __post_init__(self):
        if self.max_len < 2:
            raise ValueError(
                f"text max_len {self.max_len} leaves no room for a word: use 2 or more."
            )
        if not 0 <= self.also_share <= 1:
            raise ValueError(f"text also_share {self.also_share} must be in [0, 1].")


@dataclass(frozen=True)
class LabelSpec:
    """`field` of the record that holds the class index."""

    field: str = "label"


@dataclass(frozen=True)
class DataSpec:
    """One stream: its sources (mappings with name and weight) and what is made of each record."""

    sources: tuple[dict[str, Any], ...]
    image: ImageSpec | None = None
    text: TextSpec | None = None
    label: LabelSpec | None = None

    def __post_init__(self):
        if not self.sources:
            raise ValueError("data sources is empty: name at least one source.")
        if self.image is None and self.text is None:
            raise ValueError("A data stream needs `image` or `text`: it has neither.")


def parse(config: Any) -> DataSpec:
    """A ConfigDict such as `config.data.train` -> DataSpec; unknown keys name the nearest."""
    config = plain(config)
    parsed = dict(config)
    sources = config.get("sources", [])
    parsed["sources"] = tuple(sources if isinstance(sources, list) else [sources])
    if config.get("image") is not None:
        image = dict(config["image"])
        image["augment"] = tuple(make_augmentation(entry) for entry in image.get("augment") or ())
        parsed["image"] = call_strictly("data image", ImageSpec, image)
    if config.get("text") is not None:
        parsed["text"] = call_strictly("data text", TextSpec, config["text"])
    if config.get("label") is not None:
        parsed["label"] = call_strictly("data label", LabelSpec, config["label"])
    return call_strictly("A data stream", DataSpec, parsed)


@dataclass(frozen=True)
class LoadingSpec:
    """How batches are made: `workers` processes (0: threads of this process), `threads` in each,
    `prefetch` batches ahead, and the share of broken images above which the run stops."""

    workers: int = 0
    threads: int = 2
    prefetch: int = 2
    max_bad_share: float = 0.01

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 0:
                raise ValueError(f"data {field.name} must not be negative.")
