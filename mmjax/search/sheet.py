"""A picture of what was found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from mmjax.data.image import CorruptImageError, decode, flatten

_SIDE, _GAP, _LINE = 160, 12, 18  # pixels
_INK, _GREY = "#222222", "#777777"


def draw(found: Sequence[tuple[str, Sequence[tuple[float, Path]]]], path: str | Path) -> None:
    """Draws a row of images for each query, best first, scores below.

    Args:
      found: (query, [(score, file), ...]) of at least one query.
      path: of the picture; its suffix decides the format.

    Raises:
      ValueError: a suffix that is no image format.
      OSError: cannot be written.
    """
    columns = max(len(rows) for _, rows in found)
    pitch = 2 * _LINE + _SIDE + 2 * _GAP
    size = (columns * (_SIDE + _GAP) + _GAP, len(found) * pitch + _GAP)
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for line, (query, rows) in enumerate(found):
        top = line * pitch + _GAP
        pen.text((_GAP, top), query, _INK, font=font)
        for column, (score, file) in enumerate(rows):
            left = column * (_SIDE + _GAP) + _GAP
            sheet.paste(_thumbnail(file), (left, top + _LINE))
            pen.text((left, top + _LINE + _SIDE + 2), f"{score:.3f}", _GREY, font=font)
    sheet.save(path)


def _thumbnail(file: Path) -> Image.Image:
    """[_SIDE, _SIDE]; an empty frame where the file has gone since it was indexed."""
    try:
        image = ImageOps.contain(flatten(decode(file.read_bytes())), (_SIDE, _SIDE))
    except (OSError, CorruptImageError):
        image = Image.new("RGB", (1, 1), "white")
    return ImageOps.pad(image, (_SIDE, _SIDE), color="#eeeeee")
