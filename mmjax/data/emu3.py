"""Images of Emu3: each keeps nearly its own shape, and its sides become multiples of a code's.

All numbers equal those of `Emu3ImageProcessor` of transformers.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from mmjax.data.image import CorruptImageError
from mmjax.data.visual import Plan

# Times that an image may be longer than it is wide, or wider than long.
UNEQUAL = 200


class Grid(NamedTuple):
    """Of the ids of an image: rows of codes, and the end of each row.

    Attributes:
      factor: pixels along the side of a code.
      least, most: pixels of an image.
    """

    factor: int
    least: int
    most: int

    def fitted(self, width: int, height: int) -> tuple[int, int]:
        """(height, width) that an image is resized to.

        Raises:
          CorruptImageError: its sides are too unequal.
        """
        if max(width, height) > UNEQUAL * min(width, height):
            raise CorruptImageError(
                f"An image of {width} x {height} pixels has too unequal sides for this processor: "
                f"one may be {UNEQUAL} times the other."
            )
        factor, sides = self.factor, (height, width)
        rows, columns = (round(side / factor) for side in sides)
        pixels = rows * columns * factor**2
        if pixels > self.most:
            scale = math.sqrt(height * width / self.most)
            rows, columns = (max(1, math.floor(side / scale / factor)) for side in sides)
        elif pixels < self.least:
            scale = math.sqrt(self.least / (height * width))
            rows, columns = (math.ceil(side * scale / factor) for side in sides)
        return rows * factor, columns * factor

    def resized(self, image: Image.Image, resample: Image.Resampling) -> Image.Image:
        return image.resize(self.fitted(*image.size)[::-1], resample)

    def shape(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows, and ids of each, of an image of (height, width) pixels."""
        return size[0] // self.factor, size[1] // self.factor + 1

    def tokens(self, size: tuple[int, int]) -> int:
        """Ids of an image of (height, width) pixels."""
        return math.prod(self.shape(size))

    def lay_out(self, width: int, height: int, before: str, between: str, after: str) -> Plan:
        """The plan of an image: `before`, its rows and columns of codes, `between`, ids, `after`.

        Args:
          width, height: of the image in pixels.
        """
        rows, length = self.shape(self.fitted(width, height))
        ids = np.arange(rows * length, dtype=np.int32)
        return Plan(1, (f"{before}{rows}*{length - 1}{between}", ids, after))

    def padded(self, places: np.ndarray, own: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
        """The same ids in an image that was padded from (height, width) `own` to `size`."""
        length, longer = self.shape(own)[1], self.shape(size)[1]
        row, column = np.divmod(places, length)
        return (row * longer + np.where(column == length - 1, longer - 1, column)).astype(np.int32)
