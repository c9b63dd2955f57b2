"""The image half of a Hugging Face processor: `preprocessor_config.json` to numpy batches.

The results equal those of transformers' PIL-based processors (`CLIPImageProcessorPil` and its like,
image_processing_backends.PilBackend) bit for bit, with channels last. Transformers is not called.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from mmjax.data.image import (
    MAX_PIXELS,
    PRESETS,
    CorruptImageError,
    check_loaded,
    open_image,
    to_rgb,
)
from mmjax.data.image_options import (
    ALL_OPTIONS,
    PATCH_OPTIONS,
    SIZE_OPTIONS,
    TARGETS,
    ImageOptions,
    ProcessorConfigError,
    parse_options,
)
from mmjax.data.sources import existing
from mmjax.patches import Patches
from mmjax.registry import Registry

ImageInput = str | os.PathLike | bytes | np.ndarray | Image.Image
_NO_PADDING = (0, 0)


@dataclass(frozen=True)
class Recipe:
    """An image processor class of transformers.

    options: its defaults where they differ from `ImageOptions`; run: RGB images -> a batch;
    obeys: the options that have a meaning for it.
    """

    options: Mapping[str, Any]
    run: Callable[[list[Image.Image], ImageOptions], np.ndarray | Patches]
    obeys: frozenset[str]


def _resize(image: Image.Image, height: int, width: int, options: ImageOptions) -> Image.Image:
    if height * width > MAX_PIXELS:
        raise CorruptImageError(
            f"An image of {image.width} x {image.height} pixels would become {width} x {height}: "
            "its sides are too unequal for this processor."
        )
    if not height or not width:
        raise CorruptImageError(
            f"An image of {image.width} x {image.height} pixels would vanish: {width} x {height}."
        )
    return image.resize((width, height), options.resample)


def _center_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """The middle; black around what is smaller (levels 0, before any normalisation)."""
    # Pillow crops beyond the edges with black. What is missing is split with the larger half
    # before the image, what is too much with the smaller half cut there: both are floors.
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


@functools.lru_cache(maxsize=16)
def _levels(
    rescale: float | None, mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> np.ndarray:
    """[256, 3] float32: what each grey level of each channel becomes.

    There are only 256 levels, so that every rounding of transformers can be repeated: the product
    in float64, everything else in float32.
    """
    values = np.arange(256, dtype=np.float64)
    if rescale is not None:
        values = values * rescale
    table = np.repeat(values.astype(np.float32)[:, None], 3, axis=1)
    if mean is not None:
        table = (table - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    table.setflags(write=False)
    return table


def _normalize(image: Image.Image, options: ImageOptions) -> np.ndarray:
    """[H, W, 3] float32."""
    table = _levels(
        options.rescale_factor if options.do_rescale else None,
        options.image_mean if options.do_normalize else None,
        options.image_std if options.do_normalize else None,
    )
    pixels = np.asarray(image)
    out = np.empty(pixels.shape, np.float32)
    for channel in range(3):
        out[..., channel] = table[:, channel][pixels[..., channel]]
    return out


def _whole_images(images: list[Image.Image], options: ImageOptions) -> np.ndarray:
    """[B, H, W, 3] float32."""
    batch = []
    for image in images:
        if options.do_resize:
            target = TARGETS[frozenset(options.size)]
            image = _resize(image, *target(options.size, image.height, image.width), options)
        if options.do_center_crop:
            image = _center_crop(image, options.crop_size["height"], options.crop_size["width"])
        pixels = _normalize(image, options)
        if options.do_pad:
            down = options.pad_size["height"] - pixels.shape[0]
            across = options.pad_size["width"] - pixels.shape[1]
            if min(down, across) < 0:
                raise ProcessorConfigError(
                    f"An image of {pixels.shape[1]} x {pixels.shape[0]} pixels is larger than "
                    f"pad_size {dict(options.pad_size)}."
                )
            pixels = np.pad(pixels, ((0, down), (0, across), _NO_PADDING))
        batch.append(pixels)
    sizes = {pixels.shape[:2] for pixels in batch}
    if len(sizes) > 1:
        raise ProcessorConfigError(
            f"The images of the batch end with different sizes, {sorted(sizes)}: give them one by "
            "one, or set do_center_crop, or a size with height and width."
        )
    return np.stack(batch)


def _fitting_size(height: int, width: int, patch: int, most: int) -> tuple[int, int]:
    """The largest size of (nearly) the same shape that has at most `most` patches.

    Each side is a whole number of patches, rounded up, at least one. The scale is found by
    bisection with the bounds and the tolerance of transformers, on which the result depends.
    """

    def scaled(scale: float) -> tuple[int, int]:
        rows, columns = (math.ceil(side * scale / patch) for side in (height, width))
        return max(rows, 1) * patch, max(columns, 1) * patch

    low, high, tolerance = 1e-6, 100.0, 1e-5
    while high - low >= tolerance:
        middle = (low + high) / 2
        rows, columns = scaled(middle)
        if (rows // patch) * (columns // patch) <= most:
            low = middle
        else:
            high = middle
    return scaled(low)


def _patch_lists(images: list[Image.Image], options: ImageOptions) -> Patches:
    patch, most = options.patch_size, options.max_num_patches
    patches = np.zeros((len(images), most, patch * patch * 3), np.float32)
    shapes = np.zeros((len(images), 2), np.int32)
    mask = np.zeros((len(images), most), bool)
    for i, image in enumerate(images):
        if options.do_resize:
            target = _fitting_size(image.height, image.width, patch, most)
            image = _resize(image, *target, options)
        rows, columns = image.height // patch, image.width // patch
        if image.height % patch or image.width % patch or rows * columns > most:
            raise ProcessorConfigError(
                f"An image of {image.width} x {image.height} pixels is not up to {most} whole "
                f"patches of {patch}: set do_resize."
            )
        pixels = _normalize(image, options).reshape(rows, patch, columns, patch, 3)
        count = rows * columns
        patches[i, :count] = pixels.swapaxes(1, 2).reshape(count, -1)
        shapes[i] = rows, columns
        mask[i, :count] = True
    return Patches(patches, shapes, mask)


_HALF = {"image_mean": PRESETS["vit"].mean, "image_std": PRESETS["vit"].std}
_SQUARE = {"height": 224, "width": 224}
_CROPPED = {
    "do_convert_rgb": True,
    "size": {"shortest_edge": 224},
    "default_to_square": False,
    "resample": Image.Resampling.BICUBIC,
    "do_center_crop": True,
    "crop_size": _SQUARE,
    "image_mean": PRESETS["clip"].mean,
    "image_std": PRESETS["clip"].std,
}
_SQUASHED = {
    "do_convert_rgb": True,
    "size": _SQUARE,
    "resample": Image.Resampling.BICUBIC,
    "image_mean": PRESETS["clip"].mean,
    "image_std": PRESETS["clip"].std,
}

RECIPES: Registry[Recipe] = Registry("image processor")
RECIPES.register("ViTImageProcessor")(
    Recipe({"size": _SQUARE} | _HALF, _whole_images, ALL_OPTIONS - PATCH_OPTIONS)
)
RECIPES.register("CLIPImageProcessor")(Recipe(_CROPPED, _whole_images, ALL_OPTIONS - PATCH_OPTIONS))
RECIPES.register("BitImageProcessor")(Recipe(_CROPPED, _whole_images, ALL_OPTIONS - PATCH_OPTIONS))
RECIPES.register("SiglipImageProcessor")(
    Recipe(
        {
            "do_convert_rgb": True,
            "size": _SQUARE,
            "default_to_square": False,
            "resample": Image.Resampling.BICUBIC,
        }
        | _HALF,
        _whole_images,
        ALL_OPTIONS - PATCH_OPTIONS,
    )
)
RECIPES.register("BlipImageProcessor")(
    Recipe(
        _SQUASHED | {"size": {"height": 384, "width": 384}},
        _whole_images,
        ALL_OPTIONS - PATCH_OPTIONS,
    )
)
RECIPES.register("IdeficsImageProcessor")(
    Recipe(_SQUASHED, _whole_images, ALL_OPTIONS - PATCH_OPTIONS)
)
RECIPES.register("ChameleonImageProcessor")(
    Recipe(
        _CROPPED
        | {
            **{"size": {"shortest_edge": 512}, "crop_size": {"height": 512, "width": 512}},
            **{"resample": Image.Resampling.LANCZOS, "rescale_factor": 0.0078},
            **{"image_mean": (1.0,) * 3, "image_std": (1.0,) * 3},
        },
        _whole_images,
        ALL_OPTIONS - PATCH_OPTIONS,
    )
)
RECIPES.register("Siglip2ImageProcessor")(
    Recipe(
        {"patch_size": 16, "max_num_patches": 256} | _HALF, _patch_lists, ALL_OPTIONS - SIZE_OPTIONS
    )
)


def recipe_name(declared: str) -> str:
    """The current name: CLIPFeatureExtractor or CLIPImageProcessorFast -> CLIPImageProcessor."""
    return (
        declared.replace("FeatureExtractor", "ImageProcessor")
        .removesuffix("Fast")
        .removesuffix("Pil")
    )


class ImageProcessor:
    """Called with one or many images; gives [B, H, W, 3] float32, or `Patches`.

    Args:
      declared: a class of transformers: a name in `RECIPES`, or an older form of one.
      config: the content of its `preprocessor_config.json`.

    Raises:
      UnknownNameError: a class or an option that is not known.
      ProcessorConfigError: a value that cannot be obeyed.
    """

    def __init__(self, declared: str, config: Mapping[str, Any]):
        self.name = recipe_name(declared)
        self._recipe = RECIPES[self.name]
        self._config = dict(config)
        self.options = self._parse({})

    def _parse(self, changes: Mapping[str, Any]) -> ImageOptions:
        recipe = self._recipe
        return parse_options(self.name, recipe.options, recipe.obeys, self._config | changes)

    def _options(self, changes: Mapping[str, Any]) -> ImageOptions:
        return self._parse(changes) if changes else self.options

    def read(self, image: ImageInput, **changes: Any) -> Image.Image:
        """An image as it is before it is resized: upright and RGB. See `__call__`."""
        return _rgb(image, self._options(changes))

    def __call__(
        self, images: ImageInput | Sequence[ImageInput], **changes: Any
    ) -> np.ndarray | Patches:
        """The batch.

        A path (or encoded bytes) is read as transformers reads a path: turned upright by its EXIF
        orientation, then converted to RGB, which drops transparency. A PIL image or an array is
        taken as it stands: `do_convert_rgb` puts transparency on white; without it the image must
        be RGB, as for transformers.

        Args:
          images: one image or several: paths, encoded bytes, PIL images, or uint8 arrays [H, W],
            [H, W, 1], [H, W, 3] or [H, W, 4].
          changes: options that replace those of the directory for this call.

        Raises:
          CorruptImageError: cannot be decoded, or sides so unequal that resizing would fill the
            memory.
          ProcessorConfigError: an option that cannot be obeyed, images that are not RGB where
            do_convert_rgb is not set, or that end with different sizes.
        """
        options = self._options(changes)
        several = isinstance(images, list | tuple)
        rgb = [_rgb(image, options) for image in (images if several else [images])]
        if not rgb:
            raise ProcessorConfigError("There are no images to process.")
        return self._recipe.run(rgb, options)


def _rgb(source: ImageInput, options: ImageOptions) -> Image.Image:
    image = _read(source)
    if options.do_convert_rgb:
        return to_rgb(image)
    if image.mode != "RGB":
        raise ProcessorConfigError(
            f"An image of mode {image.mode!r} is not RGB, and this processor does not convert: "
            "pass do_convert_rgb=True, or give the path."
        )
    return image


def _read(source: ImageInput) -> Image.Image:
    if isinstance(source, str | os.PathLike):
        if str(source).startswith(("http://", "https://", "data:")):
            raise ValueError(f"{str(source)[:60]!r}: download the image first, then give its path.")
        source = existing(source, "The image").read_bytes()
    if isinstance(source, bytes):
        return check_loaded(open_image(source)).convert("RGB")
    if isinstance(source, np.ndarray) and source.ndim == 3 and source.shape[2] == 4:
        return _on_white(source)
    if not isinstance(source, np.ndarray | Image.Image):
        raise ValueError(
            f"An image is a path, encoded bytes, a PIL image or an array, not a "
            f"{type(source).__name__}."
        )
    return open_image(source)


def _on_white(pixels: np.ndarray) -> Image.Image:
    """[H, W, 4] uint8; in the arithmetic that transformers has for arrays, not Pillow's."""
    if pixels.dtype != np.uint8:
        return open_image(pixels)  # says what is wrong
    alpha = pixels[..., 3:] / 255
    return Image.fromarray(np.round(alpha * pixels[..., :3] + (1 - alpha) * 255).astype(np.uint8))
