"""Layouts of images: what they promise of a size is what they make of its pixels."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mmjax.data.image import preprocess
from mmjax.data.visual import LAYOUTS, visual_tokens

BOARD = dict(preset="siglip", size=16, tokens=2, rows=2, columns=3)
MARKERS = (("a", "b", "c"), ("d", "e", "f"))


def picture(width: int, height: int) -> Image.Image:
    levels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(levels)


def test_whole_is_what_the_preset_makes():
    layout = LAYOUTS["whole"](preset="clip", size=16, tokens=3)
    image = picture(40, 30)
    plan = layout.plan(40, 30)
    assert (plan.pictures, plan.tokens) == (1, 3)
    np.testing.assert_array_equal(layout.pictures(image)[0], preprocess(image, "clip", 16))


@pytest.mark.parametrize(
    ("size", "board"),
    [((16, 16), (1, 1)), ((20, 9), (1, 1)), ((48, 32), (2, 3)), ((300, 20), (1, 3))],
)
@pytest.mark.parametrize("thumbnail", [False, True])
def test_tiles_follow_the_size_of_the_image(size, board, thumbnail):
    layout = LAYOUTS["tiles"](**BOARD, thumbnail=thumbnail)
    rows, columns = board
    count = rows * columns + (thumbnail and rows * columns > 1)
    plan, pictures = layout.plan(*size), layout.pictures(picture(*size))
    assert plan.pictures == len(pictures) == count
    np.testing.assert_array_equal(np.concatenate(plan.pieces), np.arange(2 * count))


def test_tiles_are_cut_from_the_image():
    image = picture(48, 32)
    tiles = LAYOUTS["tiles"](**BOARD, thumbnail=True).pictures(image)
    for index in range(6):
        left, top = index % 3 * 16, index // 3 * 16
        part = preprocess(image.crop((left, top, left + 16, top + 16)), "siglip", 16)
        np.testing.assert_array_equal(tiles[index], part)
    np.testing.assert_array_equal(tiles[6], preprocess(image, "siglip", 16))


@pytest.mark.parametrize("size", [(48, 32), (10, 10), (90, 20)])
def test_a_board_always_has_its_tiles(size):
    """They are read together, and have as many places as the reader makes tokens of all."""
    layout = LAYOUTS["board"](**BOARD)
    image = picture(*size)
    assert layout.frames == layout.plan(*size).pictures == 6
    np.testing.assert_array_equal(np.concatenate(layout.plan(*size).pieces), [0, 1])
    whole = image.resize((48, 32), Image.Resampling.BICUBIC)
    expected = LAYOUTS["tiles"](**BOARD).pictures(whole)
    np.testing.assert_array_equal(layout.pictures(image), expected)
    assert visual_tokens(layout, 12) == 4 and visual_tokens(None, 0) == 0
    with pytest.raises(ValueError, match="0 x 3 tiles has none"):
        LAYOUTS["board"](**BOARD | dict(rows=0))


def test_markers_stand_before_their_tiles():
    layout = LAYOUTS["tiles"](**BOARD, markers=MARKERS, thumbnail=True)
    pieces = layout.plan(48, 32).pieces
    assert [piece for piece in pieces if isinstance(piece, str)] == list("abcdef")
    assert [piece.tolist() for piece in pieces[1:4:2]] == [[0, 1], [2, 3]]
    assert pieces[-1].tolist() == [12, 13]  # the thumbnail has none
    assert len(layout.plan(16, 16).pieces) == 1


def test_a_board_and_its_markers_must_agree():
    with pytest.raises(ValueError, match="2 rows of 3 texts"):
        LAYOUTS["tiles"](**BOARD, markers=MARKERS[:1])
    with pytest.raises(ValueError, match="has none"):
        LAYOUTS["tiles"](**{**BOARD, "rows": 0})
