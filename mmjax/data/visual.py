"""How an image becomes pictures for the encoder and places in a stream of tokens.

A layout knows both before a pixel is decoded: from the size of an image it says how many pictures
there will be, and what stands in the text for it. So token budgets are known up front.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from mmjax.data.image import PRESETS, Preset, fit, flatten, normalize_into
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
    """See the module's docstring.

    Attributes:
      size: side of a picture in pixels.
      frames: pictures that the connector reads together; 1 for most.
      tokens: places for such a clip, or picture, in the text: `VLMConfig.image_tokens`.
      newlines: whether `NEWLINE` is among the places: for `VLMConfig.newline`.
      drawn: what stands for an image that is an answer, where that can be learnt as text is: codes,
        not vectors. None: as `plan`, and nothing of it is learnt.
    """

    size: int
    frames: int
    tokens: int
    newlines: bool
    drawn: Plan | None

    def plan(self, width: int, height: int) -> Plan:
        """For an upright image of this many pixels."""

    def pictures(self, image: Image.Image) -> np.ndarray:
        """[pictures, H, W, 3] float32, normalised, of a decoded, upright image."""


def visual_tokens(layout: Layout | None, pictures: int) -> int:
    """Places of so many pictures; none without a layout."""
    return 0 if layout is None else pictures // layout.frames * layout.tokens


LAYOUTS: Registry[type[Layout]] = Registry("image layout")


@LAYOUTS.register("whole")
class Whole:
    """The image is one picture.

    Args:
      preset: a name in `mmjax.data.image.PRESETS`.
      size: side of the picture in pixels.
      tokens: visual tokens of a picture: `VLMConfig.image_tokens`.
    """

    frames = 1
    newlines = False
    drawn = None

    def __init__(self, preset: str, size: int, tokens: int):
        self._preset, self.size, self.tokens = PRESETS[preset], size, tokens
        self._plan = Plan(1, (np.arange(tokens, dtype=np.int32),))

    def plan(self, width: int, height: int) -> Plan:
        return self._plan

    def pictures(self, image: Image.Image) -> np.ndarray:
        out = np.empty((1, self.size, self.size, 3), np.float32)
        normalize_into(fit(image, self._preset, self.size), self._preset, out[0])
        return out


@LAYOUTS.register("codes")
class Codes(Whole):
    """The image is one picture, of which an image tokenizer makes codes (`UnifiedConfig`).

    Args:
      preset, size: see `Whole`.
      tokens: ids of an image, ends of rows included: `UnifiedConfig.places`.
      begin, end: the special tokens around them; `end` "" for none.
    """

    def __init__(self, preset: str, size: int, tokens: int, begin: str, end: str):
        super().__init__(preset, size, tokens)
        self.begin, self.end = begin, end
        self._plan = self.drawn = self._within(np.arange(tokens, dtype=np.int32))

    def _within(self, places: np.ndarray) -> Plan:
        return Plan(1, (self.begin, places, *([self.end] if self.end else [])))


@LAYOUTS.register("decoupled")
class Decoupled(Codes):
    """An image that is read is visual tokens of an encoder, one that is drawn is codes
    (`JanusConfig`).

    Args:
      preset, size, begin, end: see `Codes`.
      read: visual tokens of an image: `JanusConfig.image_tokens`.
      codes: ids of one.
    """

    def __init__(self, preset: str, size: int, read: int, codes: int, begin: str, end: str):
        super().__init__(preset, size, read + codes, begin, end)
        places = np.arange(self.tokens, dtype=np.int32)
        self._plan, self.drawn = self._within(places[:read]), self._within(places[read:])


@LAYOUTS.register("tiles")
class Tiles:
    """The image is cut into tiles of the encoder's size, as many as its own size asks for.

    It is resized to the board of tiles nearest to its size; the tiles are pictures, row by row.
    (InternVL and Idefics3 cut images likewise, each by rules of its own.)

    Args:
      preset, size, tokens: of a tile; see `Whole`.
      rows, columns: the largest board.
      markers: text before the visual tokens of each tile of a board, [rows][columns], as Idefics3
        has "<row_1_col_2>"; an image of one tile has none.
      thumbnail: whether the whole image follows the tiles as one more picture, as in InternVL; an
        image of one tile has none.
    """

    frames = 1
    newlines = False
    drawn = None

    def __init__(
        self,
        preset: str,
        size: int,
        tokens: int,
        rows: int,
        columns: int,
        markers: Sequence[Sequence[str]] | None = None,
        thumbnail: bool = False,
    ):
        if rows < 1 or columns < 1:
            raise ValueError(f"A board of {rows} x {columns} tiles has none: give 1 or more.")
        if markers is not None and (
            len(markers) != rows or any(len(row) != columns for row in markers)
        ):
            raise ValueError(
                f"markers must be {rows} rows of {columns} texts, one for each tile of the board."
            )
        self._preset, self.size, self.tokens = PRESETS[preset], size, tokens
        self._rows, self._columns = rows, columns
        self._markers, self._thumbnail = markers, thumbnail

    def _board(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of tiles."""
        rows, columns = round(height / self.size), round(width / self.size)
        return min(max(rows, 1), self._rows), min(max(columns, 1), self._columns)

    def plan(self, width: int, height: int) -> Plan:
        rows, columns = self._board(width, height)
        several = rows * columns > 1
        count = rows * columns + (several and self._thumbnail)
        places = np.arange(count * self.tokens, dtype=np.int32)
        if self._markers is None or not several:
            return Plan(count, (places,))
        pieces: list[str | np.ndarray] = []
        for index, tile in enumerate(np.split(places, count)):
            if index < rows * columns:
                pieces.append(self._markers[index // columns][index % columns])
            pieces.append(tile)
        return Plan(count, tuple(pieces))

    def pictures(self, image: Image.Image) -> np.ndarray:
        size, preset = self.size, self._preset
        rows, columns = self._board(*image.size)
        tiles = cut(image, preset, size, rows, columns)
        if self.plan(*image.size).pictures == len(tiles):
            return tiles
        whole = np.empty((1, size, size, 3), np.float32)
        normalize_into(fit(image, preset, size), preset, whole[0])
        return np.concatenate([tiles, whole])


@LAYOUTS.register("board")
class Board:
    """The image is cut into as many tiles always, which the connector reads together (`frames`).

    Args:
      preset, size: of a tile; see `Whole`.
      tokens: of all of them: `VLMConfig.image_tokens`.
      rows, columns: of tiles.
    """

    newlines = False
    drawn = None

    def __init__(self, preset: str, size: int, tokens: int, rows: int, columns: int):
        if rows < 1 or columns < 1:
            raise ValueError(f"A board of {rows} x {columns} tiles has none: give 1 or more.")
        self._preset, self.size, self.tokens = PRESETS[preset], size, tokens
        self._rows, self._columns, self.frames = rows, columns, rows * columns
        self._plan = Plan(self.frames, (np.arange(tokens, dtype=np.int32),))

    def plan(self, width: int, height: int) -> Plan:
        return self._plan

    def pictures(self, image: Image.Image) -> np.ndarray:
        return cut(image, self._preset, self.size, self._rows, self._columns)


def cut(image: Image.Image, preset: Preset, size: int, rows: int, columns: int) -> np.ndarray:
    """[rows * columns, size, size, 3] float32, normalised: tiles of the resized image, row by
    row."""
    out = np.empty((rows * columns, size, size, 3), np.float32)
    board = flatten(image)
    if board.size != (columns * size, rows * size):
        board = board.resize((columns * size, rows * size), preset.resample)
    for index in range(rows * columns):
        left, top = index % columns * size, index // columns * size
        tile = board.crop((left, top, left + size, top + size))
        normalize_into(tile, preset, out[index])
    return out
