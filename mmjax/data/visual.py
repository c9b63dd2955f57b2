"""How an image becomes pictures for the encoder and places in a stream of tokens.

A layout knows both before a pixel is decoded: from the size of an image it says how many pictures
there will be, and what stands in the text for it. So token budgets are known up front.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from mmjax.data.image import PRESETS, fit, flatten, normalize_into
from mmjax.registry import Registry

# What a place says of a position that is no visual token's; as in `mmjax.models.vlm`.
TEXT, NEWLINE = -1, -2


class Plan(NamedTuple):
    """What an image becomes.

    Attributes:
      pictures: how many the encoder sees: the image, its tiles, both.
      pieces: what stands for it in the stream, one after the other: text (special tokens such as
        "<row_1_col_2>"), or an int32 array of places: which visual token of this image, counted
        over its pictures, stands at each position, or `NEWLINE`.
    """

    pictures: int
    pieces: tuple[str | np.ndarray, ...]

    @property
    def tokens(self) -> int:
        """Visual tokens and newlines, without the text among them."""
        return sum(len(piece) for piece in self.pieces if not isinstance(piece, str))


class Layout(Protocol):
    """See the module's docstring."""

    def plan(self, width: int, height: int) -> Plan:
        """For an upright image of this many pixels."""

    def pictures(self, image: Image.Image) -> np.ndarray:
        """[pictures, H, W, 3] float32, normalised, of a decoded, upright image."""


LAYOUTS: Registry[type[Layout]] = Registry("image layout")


@LAYOUTS.register("whole")
class Whole:
    """The image is one picture.

    Args:
      preset: a name in `mmjax.data.image.PRESETS`.
      size: side of the picture in pixels.
      tokens: visual tokens of a picture: `VLMConfig.image_tokens`.
    """

    def __init__(self, preset: str, size: int, tokens: int):
        self._preset, self._size = PRESETS[preset], size
        self._plan = Plan(1, (np.arange(tokens, dtype=np.int32),))

    def plan(self, width: int, height: int) -> Plan:
        return self._plan

    def pictures(self, image: Image.Image) -> np.ndarray:
        out = np.empty((1, self._size, self._size, 3), np.float32)
        normalize_into(fit(image, self._preset, self._size), self._preset, out[0])
        return out


@LAYOUTS.register("tiles")
class Tiles:
    """The image, resized to a fixed board of tiles, row by row; each tile is a picture.

    Args:
      preset, size, tokens: of a tile; see `Whole`.
      rows, columns: of the board.
      thumbnail: whether the whole image follows as one more picture, as in InternVL.
    """

    def __init__(
        self,
        preset: str,
        size: int,
        tokens: int,
        rows: int,
        columns: int,
        thumbnail: bool = False,
    ):
        if rows < 1 or columns < 1:
            raise ValueError(f"A board of {rows} x {columns} tiles has none: give 1 or more.")
        self._preset, self._size = PRESETS[preset], size
        self._rows, self._columns, self._thumbnail = rows, columns, thumbnail
        count = rows * columns + thumbnail
        self._plan = Plan(count, (np.arange(count * tokens, dtype=np.int32),))

    def plan(self, width: int, height: int) -> Plan:
        return self._plan

    def pictures(self, image: Image.Image) -> np.ndarray:
        size, preset = self._size, self._preset
        out = np.empty((self._plan.pictures, size, size, 3), np.float32)
        board = flatten(image)
        if board.size != (self._columns * size, self._rows * size):
            board = board.resize((self._columns * size, self._rows * size), preset.resample)
        for index in range(self._rows * self._columns):
            left, top = index % self._columns * size, index // self._columns * size
            tile = board.crop((left, top, left + size, top + size))
            normalize_into(tile, preset, out[index])
        if self._thumbnail:
            normalize_into(fit(image, preset, size), preset, out[-1])
        return out
