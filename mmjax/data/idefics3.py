"""Images of Idefics3 and SmolVLM: tiles of a board of the image's shape, then the whole, small.

Laurençon et al., "Building and better understanding vision-language models" (2024). The image is
scaled, up or down, to a long side in pixels, and then to whole tiles. In the text, tokens say where
a tile stands: "<row_1_col_2>". All numbers equal those of `Idefics3ImageProcessorPil` and
`Idefics3Processor` of transformers.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from mmjax.data.image import PRESETS, Preset, flatten, normalize_into
from mmjax.data.visual import LAYOUTS, Plan

# Beyond it transformers scales by another rule.
LONGEST = 4096
AROUND, WHOLE = "<fake_token_around_image>", "<global-img>"

PRESETS.register("idefics3")(Preset("squash", Image.Resampling.LANCZOS, (0.5,) * 3, (0.5,) * 3))


def scaled(width: int, height: int, longest: int) -> tuple[int, int]:
    """(width, height) of the image's shape whose long side is `longest`; the other one is even."""
    ratio = width / height
    if width >= height:
        short = int(longest / ratio)
        return longest, max(short + short % 2, 1)
    short = int(longest * ratio)
    return max(short + short % 2, 1), longest


def board(width: int, height: int, longest: int, size: int) -> tuple[int, int]:
    """(rows, columns) of tiles of `size` pixels that an image becomes."""
    width, height = scaled(width, height, longest)
    ratio = width / height
    if width >= height:
        columns = math.ceil(width / size)
        return math.ceil(int(columns * size / ratio) / size), columns
    rows = math.ceil(height / size)
    return rows, math.ceil(int(rows * size * ratio) / size)


def lay_out(width: int, height: int, longest: int, size: int, tokens: int, split: bool) -> Plan:
    """The plan of an image.

    Args:
      width, height: of the image in pixels.
      longest: long side that it is scaled to.
      size: side of a tile in pixels.
      tokens: visual tokens of a tile.
      split: whether it is cut into tiles at all.
    """
    rows, columns = board(width, height, longest, size) if split else (1, 1)
    tiles = rows * columns if rows * columns > 1 else 0
    pieces: list[str | np.ndarray] = []
    for tile in range(tiles):
        row, column = divmod(tile, columns)
        line = "\n" if tile and column == 0 else ""
        pieces.append(f"{line}{AROUND}<row_{row + 1}_col_{column + 1}>")
        pieces.append(np.arange(tile * tokens, (tile + 1) * tokens, dtype=np.int32))
    pieces.append(("\n\n" if tiles else "") + AROUND + WHOLE)
    pieces.append(np.arange(tiles * tokens, (tiles + 1) * tokens, dtype=np.int32))
    pieces.append(AROUND)
    return Plan(tiles + 1, tuple(pieces))


def cut(
    image: Image.Image, longest: int, size: int, split: bool, resample: Image.Resampling
) -> list[Image.Image]:
    """Tiles, row by row, and the whole; each a square of `size` pixels."""
    rows, columns = board(*image.size, longest, size) if split else (1, 1)
    image = image.resize(scaled(*image.size, longest), resample)
    if not split or rows * columns == 1:
        return [image.resize((size, size), resample)]
    # One resampling after the other, as in transformers.
    image = image.resize((columns * size, rows * size), resample)
    tiles = [
        image.crop((left, top, left + size, top + size))
        for top in range(0, rows * size, size)
        for left in range(0, columns * size, size)
    ]
    return [*tiles, image.resize((size, size), resample)]


def check_longest(longest: int) -> None:
    """Raises ValueError if images cannot be scaled to such a side."""
    if not 1 <= longest <= LONGEST:
        raise ValueError(f"longest={longest}: the long side of an image is 1 to {LONGEST} pixels.")


@LAYOUTS.register("idefics3")
class Idefics3:
    """See the module's docstring.

    Args:
      preset: a name in `mmjax.data.image.PRESETS`; of it mean, deviation and resampling are used.
        "idefics3" is that of the published models.
      size: side of a tile in pixels.
      tokens: visual tokens of a tile: `VLMConfig.image_tokens`.
      longest: long side, in pixels, that images are scaled to: 4 tiles in the published models.
      split: whether images are cut into tiles, or only the whole is seen.

    Raises:
      ValueError: if `longest` is out of range.
    """

    frames = 1
    newlines = False
    drawn = None

    def __init__(self, preset: str, size: int, tokens: int, longest: int, split: bool = True):
        check_longest(longest)
        self._preset, self.size, self.tokens = PRESETS[preset], size, tokens
        self._longest, self._split = longest, split

    def plan(self, width: int, height: int) -> Plan:
        return lay_out(width, height, self._longest, self.size, self.tokens, self._split)

    def pictures(self, image: Image.Image) -> np.ndarray:
        views = cut(flatten(image), self._longest, self.size, self._split, self._preset.resample)
        out = np.empty((len(views), self.size, self.size, 3), np.float32)
        for view, pixels in zip(views, out, strict=True):
            normalize_into(view, self._preset, pixels)
        return out
