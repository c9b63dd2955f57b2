"""Images of Llama 3.2 Vision: tiles of a board that the image fits into, and the board's shape.

Of all boards of up to four tiles that one is taken on which the image need be scaled least. It lies
at the top left, scaled up to a tile at most, black around; it is not seen as a whole. All numbers
equal those of `MllamaImageProcessorPil` of transformers.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from PIL import Image

from mmjax.data.image import PRESETS, Preset, flatten, normalize_into
from mmjax.data.visual import LAYOUTS, Plan

PRESETS.register("mllama")(
    Preset("squash", Image.Resampling.BILINEAR, PRESETS["clip"].mean, PRESETS["clip"].std)
)


@functools.cache
def shapes(tiles: int) -> tuple[tuple[int, int], ...]:
    """All boards (down, across) of up to so many tiles, in the order of their numbers.

    Raises:
      ValueError: if there is none.
    """
    if tiles < 1:
        raise ValueError(f"tiles={tiles} must be at least 1.")
    sides = range(1, tiles + 1)
    return tuple((down, across) for down in sides for across in sides if down * across <= tiles)


def board(width: int, height: int, tiles: int, size: int) -> int:
    """The place in `shapes(tiles)` of an image's board, whose tiles have `size` pixels."""

    def scale(shape: tuple[int, int]) -> float:
        down, across = shape
        return min(down * size / height, across * size / width)

    # To be enlarged is better than to be shrunk, and either little; then few tiles.
    scales = [scale(shape) for shape in shapes(tiles)]
    larger = [factor for factor in scales if factor >= 1]
    best = min(larger) if larger else max(scales)
    fitting = [place for place, factor in enumerate(scales) if factor == best]
    return min(fitting, key=lambda place: math.prod(shapes(tiles)[place]))


def scaled(width: int, height: int, shape: tuple[int, int], size: int) -> tuple[int, int]:
    """(width, height) that an image has on a board."""
    down, across = shape
    high = min(max(height, size), down * size)
    wide = min(max(width, size), across * size)
    if wide / width < high / height:
        return wide, min(math.floor(height * (wide / width)) or 1, high)
    return min(math.floor(width * (high / height)) or 1, wide), high


def lay_out(width: int, height: int, tiles: int, size: int) -> Plan:
    """The plan of an image: one token, whose place is the number of the board's shape.

    Args:
      width, height: of the image in pixels.
      tiles: pictures of an image; those that its board has not are zeros.
      size: side of a tile in pixels.
    """
    return Plan(tiles, (np.array([board(width, height, tiles, size)], np.int32),))


def cut(image: Image.Image, tiles: int, size: int, resample: Image.Resampling) -> list[Image.Image]:
    """The tiles of an image's board, row by row."""
    down, across = shape = shapes(tiles)[board(*image.size, tiles, size)]
    canvas = Image.new("RGB", (across * size, down * size))
    canvas.paste(image.resize(scaled(*image.size, shape, size), resample))
    return [
        canvas.crop((left, top, left + size, top + size))
        for top in range(0, down * size, size)
        for left in range(0, across * size, size)
    ]


@LAYOUTS.register("mllama")
class Tiled:
    """See the module's docstring. For a `Mllama` whose boards have all shapes.

    Args:
      preset: a name in `mmjax.data.image.PRESETS`; of it mean, deviation and resampling are used.
        "mllama" is that of the published models.
      size: side of a tile in pixels.
      tiles: of an image, at most: `TiledViTConfig.tiles`.

    Raises:
      ValueError: if there are no tiles.
    """

    newlines = False
    drawn = None

    def __init__(self, preset: str, size: int, tiles: int = 4):
        self._preset, self.size, self.frames = PRESETS[preset], size, tiles
        # Places of an image, of which one is taken: `MllamaConfig.image_tokens`.
        self.tokens = len(shapes(tiles))

    def plan(self, width: int, height: int) -> Plan:
        return lay_out(width, height, self.frames, self.size)

    def pictures(self, image: Image.Image) -> np.ndarray:
        views = cut(flatten(image), self.frames, self.size, self._preset.resample)
        out = np.zeros((self.frames, self.size, self.size, 3), np.float32)
        for view, pixels in zip(views, out, strict=False):
            normalize_into(view, self._preset, pixels)
        return out
