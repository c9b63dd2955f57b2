"""AnyRes: an image as itself, small, and as tiles of a board that has nearly its shape.

LLaVA-NeXT (Liu et al., 2024). The board is that one of a few ("pinpoints") which keeps most of the
image's pixels. The image is scaled into it, black around; in the stream, rows of visual tokens that
are black only are left out ("unpadding"), and a learned token ends each row. All numbers equal
those of `LlavaNextProcessor` and `LlavaNextForConditionalGeneration` of transformers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from mmjax.data.image import PRESETS, flatten, normalize_into
from mmjax.data.visual import LAYOUTS, NEWLINE, Plan

# Of LLaVA-NeXT, whose tiles have 336 pixels.
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def check_pinpoints(pinpoints: Sequence[Sequence[int]], size: int) -> None:
    """Raises ValueError if there are none, or one is no whole number of tiles of this side."""
    if not pinpoints:
        raise ValueError("AnyRes needs pinpoints: (height, width) of each board, in pixels.")
    for height, width in pinpoints:
        if height < size or width < size or height % size or width % size:
            raise ValueError(
                f"The pinpoint ({height}, {width}) is no whole number of tiles of {size} pixels."
            )


def best_pinpoint(width: int, height: int, pinpoints: Sequence[Sequence[int]]) -> tuple[int, int]:
    """(height, width) of the board that keeps most of an image's pixels, the smallest of those."""

    def merit(pinpoint: Sequence[int]) -> tuple[int, int]:
        high, wide = pinpoint
        scale = min(wide / width, high / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - high * wide

    high, wide = max(pinpoints, key=merit)
    return high, wide


def lay_out(
    width: int, height: int, pinpoints: Sequence[Sequence[int]], size: int, grid: int
) -> Plan:
    """The plan of an image.

    Args:
      width, height: of the image in pixels.
      pinpoints: (height, width) of each board.
      size: side of a tile in pixels.
      grid: visual tokens along a side of a tile.
    """
    high, wide = best_pinpoint(width, height, pinpoints)
    rows, columns = high // size, wide // size
    each = grid * grid
    tiles = each * (1 + np.arange(rows * columns, dtype=np.int32))
    board = tiles[:, None] + np.arange(each, dtype=np.int32)
    board = board.reshape(rows, columns, grid, grid).swapaxes(1, 2)
    board = board.reshape(rows * grid, columns * grid)
    down, across = board.shape
    if width / height > across / down:
        black = (down - _scaled(height, across / width)) // 2
        board = board[black : down - black]
    else:
        black = (across - _scaled(width, down / height)) // 2
        board = board[:, black : across - black]
    lines = np.pad(board, ((0, 0), (0, 1)), constant_values=NEWLINE)
    pieces = (np.arange(each, dtype=np.int32), lines.reshape(-1))
    return Plan(1 + rows * columns, pieces)


def _scaled(side: int, factor: float) -> int:
    return int(round(side * factor, 7))  # 7: so that rounding errors do not cost a row


def cut(
    image: Image.Image, pinpoints: Sequence[Sequence[int]], size: int, resample: Image.Resampling
) -> list[Image.Image]:
    """The image, squashed to a square of `size` pixels, and its tiles, row by row."""
    high, wide = best_pinpoint(*image.size, pinpoints)
    across, down = wide / image.width, high / image.height
    if across < down:
        inner = wide, min(math.ceil(image.height * across), high)
    else:
        inner = min(math.ceil(image.width * down), wide), high
    board = Image.new("RGB", (wide, high))
    board.paste(image.resize(inner, resample), ((wide - inner[0]) // 2, (high - inner[1]) // 2))
    tiles = [
        board.crop((left, top, left + size, top + size))
        for top in range(0, high, size)
        for left in range(0, wide, size)
    ]
    return [image.resize((size, size), resample), *tiles]


@LAYOUTS.register("anyres")
class AnyRes:
    """See the module's docstring. For a VLM with `newline=True`.

    Args:
      preset: a name in `mmjax.data.image.PRESETS`; of it mean, deviation and resampling are used.
      size: side of a tile in pixels.
      tokens: visual tokens of a tile, which are a square.
      pinpoints: (height, width) of each board in pixels, whole numbers of tiles.

    Raises:
      ValueError: if the tokens are no square, or the tiles do not fit the pinpoints.
    """

    frames = 1
    newlines = True
    drawn = None

    def __init__(self, preset: str, size: int, tokens: int, pinpoints: Sequence[Sequence[int]]):
        self._preset, self.size, self.tokens = PRESETS[preset], size, tokens
        self._pinpoints, self._grid = pinpoints, math.isqrt(tokens)
        if self._grid**2 != tokens:
            raise ValueError(f"AnyRes needs tiles of a square of visual tokens, not of {tokens}.")
        check_pinpoints(pinpoints, size)

    def plan(self, width: int, height: int) -> Plan:
        return lay_out(width, height, self._pinpoints, self.size, self._grid)

    def pictures(self, image: Image.Image) -> np.ndarray:
        views = cut(flatten(image), self._pinpoints, self.size, self._preset.resample)
        out = np.empty((len(views), self.size, self.size, 3), np.float32)
        for view, pixels in zip(views, out, strict=True):
            normalize_into(view, self._preset, pixels)
        return out
