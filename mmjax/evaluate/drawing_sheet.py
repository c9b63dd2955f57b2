"""A picture of texts and what was drawn of each."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmjax.evaluate.sheets import GREEN, GREY, figure_class

# In inches: a picture, the text beside it, what is above and below, a picture with its score.
_CELL, _LABEL, _TOP, _BOTTOM, _PITCH = 1.2, 2.1, 1.15, 0.4, 1.52
_GAP = 0.1
DPI = 110


class Picture(NamedTuple):
    """[H, W, 3] uint8, the cosine of its text, and whether that is nearer than all others."""

    pixels: np.ndarray
    cosine: float
    right: bool


def drawing_sheet(
    rows: Sequence[tuple[str, Mapping[str, Picture]]],
    path: str | Path,
    *,
    title: str,
    texts: int,
    note: str = "",
) -> None:
    """Draw texts with their pictures; those whose text is the nearest are framed in green.

    Args:
      rows: texts, at least one, with as many pictures each, by what stands above the column.
      path: of the PNG; its directory must exist.
      title: the data set and split the texts are from.
      texts: how many there are in all.
      note: a line at the bottom, e.g. ICONS_NOTE.
    """
    columns = list(rows[0][1])
    width, height = sheet_size(len(rows), len(columns))
    figure = figure_class()(figsize=(width, height), dpi=DPI, facecolor="white")

    def write(x: float, y: float, words: str, **style: Any) -> None:
        figure.text(x / width, 1 - y / height, words, va="center", parse_math=False, **style)

    write(0.2, 0.32, title, fontsize=14, weight="bold")
    legend = textwrap.wrap(
        f"{len(rows)} of {texts} texts, evenly spread. Below each picture its cosine with the "
        "text; green: the nearest of all texts.",
        int(width * 14),
    )
    write(0.2, 0.66, "\n".join(legend), fontsize=9, color=GREY)
    for number, name in enumerate(columns):
        x = _LABEL + number * (_CELL + _GAP) + _CELL / 2
        write(x, _TOP - 0.12, name, fontsize=9, ha="center")
    for line, (text, pictures) in enumerate(rows):
        y = _TOP + line * _PITCH
        words = "\n".join(textwrap.wrap(text, 22)[:5])
        write(_LABEL - 0.12, y + _CELL / 2, words, fontsize=10.5, ha="right")
        for number, picture in enumerate(pictures.values()):
            x = _LABEL + number * (_CELL + _GAP)
            where = (x / width, 1 - (y + _CELL) / height, _CELL / width, _CELL / height)
            axes = figure.add_axes(where)
            axes.imshow(picture.pixels, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set(
                    edgecolor=GREEN if picture.right else "#cccccc",
                    linewidth=3.0 if picture.right else 0.8,
                )
            style = {"color": GREEN, "weight": "bold"} if picture.right else {"color": GREY}
            score = f"{picture.cosine:.3f}"
            write(x + _CELL / 2, y + _CELL + 0.13, score, fontsize=8.5, ha="center", **style)
    write(0.2, height - 0.2, note, fontsize=9, color=GREY, style="italic")
    figure.savefig(path, metadata={"Software": None})


def sheet_size(rows: int, columns: int) -> tuple[float, float]:
    """(width, height) in inches."""
    return _LABEL + columns * (_CELL + _GAP) + 0.2, _TOP + rows * _PITCH + _BOTTOM
