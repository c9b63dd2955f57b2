"""The options of transformers' image processors: what a `preprocessor_config.json` may say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from PIL import Image

from mmjax.data.image import short_side
from mmjax.registry import UnknownNameError, nearest


class ProcessorConfigError(ValueError):
    """A processor's configuration, or an option of a call, that cannot be obeyed."""


@dataclass(frozen=True)
class ImageOptions:
    """The options of transformers' image processors, under their names.

    Sizes are mappings of pixels: height and width, shortest_edge (and longest_edge), or max_height
    and max_width. Mean and deviation are of one channel each, after rescaling.
    """

    do_convert_rgb: bool = False
    do_resize: bool = True
    size: Mapping[str, int] | None = None
    default_to_square: bool = True
    resample: int = Image.Resampling.BILINEAR
    do_center_crop: bool = False
    crop_size: Mapping[str, int] | None = None
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: tuple[float, ...] | None = None
    image_std: tuple[float, ...] | None = None
    do_pad: bool = False
    pad_size: Mapping[str, int] | None = None
    patch_size: int | None = None
    max_num_patches: int | None = None


ALL_OPTIONS = frozenset(field.name for field in fields(ImageOptions))
PATCH_OPTIONS = frozenset(["patch_size", "max_num_patches"])
SIZE_OPTIONS = frozenset(
    ["size", "default_to_square", "do_center_crop", "crop_size", "do_pad", "pad_size"]
)
# What a configuration may also say, without an effect on the result of the PIL-based processors.
_WITHOUT_EFFECT = {
    "image_processor_type",
    "feature_extractor_type",
    "processor_class",
    "auto_map",
    "data_format",
    "input_data_format",
    "return_tensors",
    "device",
    "disable_grouping",
    "image_seq_length",
    "_valid_processor_keys",
}


def _height_width(size: Mapping[str, int], height: int, width: int) -> tuple[int, int]:
    return size["height"], size["width"]


def _shortest(size: Mapping[str, int], height: int, width: int) -> tuple[int, int]:
    return short_side(height, width, size["shortest_edge"])


def _shortest_and_longest(size: Mapping[str, int], height: int, width: int) -> tuple[int, int]:
    short, long = min(height, width), max(height, width)
    side: float = size["shortest_edge"]
    if long / short * side > size["longest_edge"]:
        side = size["longest_edge"] * short / long
    if short == round(side):
        return height, width
    # The short side is rounded, the long one is cut.
    return (
        int(side * height / width) if height > width else round(side),
        int(side * width / height) if width >= height else round(side),
    )


def _within(size: Mapping[str, int], height: int, width: int) -> tuple[int, int]:
    scale = min(size["max_height"] / height, size["max_width"] / width)
    return int(height * scale), int(width * scale)


# The keys of a size -> (size, height, width) -> the (height, width) to resize to.
TARGETS = {
    frozenset(["height", "width"]): _height_width,
    frozenset(["shortest_edge"]): _shortest,
    frozenset(["shortest_edge", "longest_edge"]): _shortest_and_longest,
    frozenset(["max_height", "max_width"]): _within,
}


def _as_size(key: str, value: Any, square: bool) -> dict[str, int]:
    if isinstance(value, int) and not isinstance(value, bool):
        value = {"height": value, "width": value} if square else {"shortest_edge": value}
    elif isinstance(value, Sequence) and len(value) == 2:
        value = {"height": value[0], "width": value[1]}
    if not isinstance(value, Mapping):
        raise ProcessorConfigError(f"{key} is {value!r}: expected pixels, or a group of them.")
    size = {name: pixels for name, pixels in value.items() if pixels is not None}
    allowed = TARGETS if key == "size" else [frozenset(["height", "width"])]
    if frozenset(size) not in allowed:
        known = "; ".join(" and ".join(sorted(keys)) for keys in allowed)
        raise ProcessorConfigError(f"{key} has {sorted(size)}; it must have {known}.")
    return {name: _as_count(f"{key}.{name}", pixels) for name, pixels in size.items()}


def _as_count(key: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ProcessorConfigError(f"{key} is {value!r}: expected a whole number, at least 1.")
    return value


def _as_switch(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ProcessorConfigError(f"{key} is {value!r}: expected true or false.")
    return value


def _as_number(key: str, value: Any) -> float:
    if not isinstance(value, int | float):
        raise ProcessorConfigError(f"{key} is {value!r}: expected a number.")
    return value


def _as_channels(key: str, value: Any) -> tuple[float, ...]:
    channels = tuple(value) if isinstance(value, list | tuple) else (value,) * 3
    if len(channels) != 3 or not all(isinstance(level, int | float) for level in channels):
        raise ProcessorConfigError(f"{key} is {value!r}: expected one number, or three.")
    return channels


def _as_resampling(key: str, value: Any) -> Image.Resampling:
    try:
        return Image.Resampling(value)
    except ValueError as error:
        known = ", ".join(f"{item.value} ({item.name.lower()})" for item in Image.Resampling)
        raise ProcessorConfigError(f"{key} is {value!r}; known: {known}.") from error


# option -> (its name, its value) -> the value, or an error. Sizes need another option as well.
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    **{name: _as_switch for name in ALL_OPTIONS if name.startswith("do_")},
    "resample": _as_resampling,
    "rescale_factor": _as_number,
    "image_mean": _as_channels,
    "image_std": _as_channels,
    "patch_size": _as_count,
    "max_num_patches": _as_count,
}
_SIZES = ("size", "crop_size", "pad_size")
_NEEDS = {
    "do_resize": {"size", "resample"},
    "do_center_crop": {"crop_size"},
    "do_rescale": {"rescale_factor"},
    "do_normalize": {"image_mean", "image_std"},
    "do_pad": {"pad_size"},
}


def parse_options(
    name: str, defaults: Mapping[str, Any], obeys: frozenset[str], config: Mapping[str, Any]
) -> ImageOptions:
    """The options of the class `name`, which has these `defaults` and `obeys` these options.

    Raises:
      UnknownNameError: an option that is not among them; names the nearest.
      ProcessorConfigError: a value that cannot be obeyed.
    """
    given = dict(defaults)
    for key, value in config.items():
        if key in obeys:
            # In a file, null takes a default away.
            given[key] = False if value is None and key.startswith("do_") else value
        elif key not in _WITHOUT_EFFECT and value not in (None, False):
            raise UnknownNameError(
                f"{name}: the option {key!r} = {value!r} is not known; {nearest(key, obeys)}"
            )
    for key, check in _CHECKS.items():
        if given.get(key) is not None or key in PATCH_OPTIONS & obeys:
            given[key] = check(key, given[key])
    for key in _SIZES:
        if given.get(key) is not None:
            square = bool(given.get("default_to_square", True)) or key != "size"
            given[key] = _as_size(key, given[key], square)
    options = ImageOptions(**given)
    for switch, needs in _NEEDS.items():
        for key in needs & obeys:
            if getattr(options, switch) and getattr(options, key) is None:
                raise ProcessorConfigError(f"{name}: {switch} needs {key}.")
    return options
