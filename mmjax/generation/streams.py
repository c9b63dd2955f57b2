"""Streams of text and image codes, taken apart: where their images are, and whether they are whole.

What a stream looks like is said in `mmjax.models.unified`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mmjax.generation.prompts import Prompts
from mmjax.models.unified import CodesConfig, UnifiedConfig
from mmjax.models.vlm import TEXT

# What an id is: of text, `row`, made of a given image, `begin`, `end`; or a code, of
# the quantiser with this number.
_WORD, _ROW, _GIVEN, _BEGIN, _END = -1, -2, -3, -4, -5


class Part(NamedTuple):
    """A piece of a stream.

    Attributes:
      ids: [L] int32, of a text; or of an image, without `begin` and `end`.
      is_image: whether it is one.
    """

    ids: np.ndarray
    is_image: bool


def split(config: UnifiedConfig, ids: np.ndarray | Sequence[int]) -> list[Part]:
    """The texts and images of a stream, in their order; no text is empty.

    Raises:
      ValueError: an image has another number of codes than images of this model, or no end; codes
        stand outside of an image.
    """
    ids = np.asarray(ids, np.int32)
    parts, missing = _read(config, ids, np.full(ids.shape, TEXT), "The stream")
    if missing:
        raise ValueError(
            f"The stream ends within an image, {missing} ids too early: raise max_new_tokens by as "
            f"much (an image takes {_whole(config.image)} ids), or cut the stream before its begin="
            f"{config.image.begin}."
        )
    return parts


def text_only(config: UnifiedConfig) -> list[int]:
    """The ids that have a meaning for images alone: for `suppress`, where text is wanted."""
    image = config.image
    held = [config.image_token] if config.image_token < config.vocab_size else []
    return [*image.all_ids.tolist(), *image.marks, *held]


def check_streams(
    config: UnifiedConfig, rows: Sequence[np.ndarray], places: Sequence[np.ndarray]
) -> None:
    """Raises ValueError if a prompt is no beginning of a stream, where the grammar matters.

    Args:
      rows: of ids.
      places: of each row, what stands there of its images; `TEXT` for ids that count.
    """
    if config.follow != "grammar":
        return
    for index, (ids, place) in enumerate(zip(rows, places, strict=True)):
        _read(config, ids, place, f"Prompt {index}")


def check_ends(config: UnifiedConfig, prompts: Prompts) -> None:
    """Raises ValueError if a prompt and its negative one end in different places of an image, where
    the tokens that may follow them have nothing in common.

    Args:
      prompts: as `pair` makes them.
    """
    if config.follow != "grammar":
        return
    ends = []
    places = prompts.sight.get("place", np.full(prompts.tokens.shape, TEXT))
    for ids, place, valid in zip(prompts.tokens, places, prompts.valid, strict=True):
        parts, missing = _read(config, ids[valid], place[valid], "A prompt")
        ends.append(len(parts[-1].ids) if missing else TEXT)
    for index, (own, other) in enumerate(zip(ends[::2], ends[1::2], strict=True)):
        if own != other:
            raise ValueError(
                f"Prompt {index} ends {_place(own)}, its negative one {_place(other)}: let them "
                f"end alike, both with begin={config.image.begin} to draw an image."
            )


def _place(since: int) -> str:
    return "in text" if since == TEXT else f"within an image, after {since} of its ids"


def _whole(image: CodesConfig) -> int:
    """Ids of an image, those around it included."""
    return 1 + image.length + (image.end is not None)


def _read(
    config: UnifiedConfig, ids: np.ndarray, place: np.ndarray, name: str
) -> tuple[list[Part], int]:
    """The parts, and how many ids the last image lacks.

    Args:
      place: see `check_streams`.
      name: of the stream, for errors.
    """
    image, kinds = config.image, _kinds_of(config, ids, place)
    pattern = np.tile(np.arange(image.depth), image.grid[1])
    pattern = np.tile(np.append(pattern, [_ROW] * (image.row is not None)), image.grid[0])
    parts, start, missing = [], 0, 0
    while start < len(ids):
        begins = np.flatnonzero(kinds[start:] == _BEGIN)
        begin = start + int(begins[0]) if begins.size else len(ids)
        _check_text(image, ids[start:begin], kinds[start:begin], name)
        parts += [Part(ids[start:begin], False)] * (begin > start)
        if begin == len(ids):
            break
        inside = slice(begin + 1, begin + 1 + image.length)
        here = kinds[inside]
        wrong = np.flatnonzero((here != pattern[: len(here)]) & (here != _GIVEN))
        if wrong.size:
            raise ValueError(
                f"{name} has an image whose id {wrong[0]} (of {image.length}) is "
                f"{ids[inside][wrong[0]]}, which cannot stand there: images of this model have "
                f"{_form(image)}. Give whole images, and generate with follow='grammar'."
            )
        parts.append(Part(ids[inside], True))
        start, missing = inside.stop, begin + _whole(image) - len(ids)
        if missing <= 0 and image.end is not None:
            if ids[start] != image.end:
                raise ValueError(
                    f"{name} has an image of {image.length} ids that is followed by {ids[start]}, "
                    f"not by end={image.end}: give whole images."
                )
            start += 1
    return parts, max(missing, 0)


def _check_text(image: CodesConfig, ids: np.ndarray, kinds: np.ndarray, name: str) -> None:
    wrong = kinds != _WORD
    if wrong.any():
        raise ValueError(
            f"{name} has the id {ids[wrong][0]} of an image where text stands: images are "
            f"begin={image.begin}, {_form(image)}"
            + ("." if image.end is None else f", end={image.end}.")
        )


def _form(image: CodesConfig) -> str:
    rows, columns = image.grid
    row = "" if image.row is None else f", row={image.row} after each row"
    depth = "" if image.depth == 1 else f" of {image.depth} codes"
    return f"{rows} x {columns} places{depth}{row}"


def _kinds_of(config: UnifiedConfig, ids: np.ndarray, place: np.ndarray) -> np.ndarray:
    """[T], what stands there; see `UnifiedConfig.places` of what is made of images."""
    given, own = place >= 0, config.places - config.image.length
    kinds = np.where(given, _WORD, _kinds(config)[np.where(given, 0, ids)])
    kinds[given & (place % config.places >= own)] = _GIVEN
    # Around images that are read, not drawn (Janus), `begin` and `end` are words.
    read = np.pad(given & (place % config.places < own), 1)
    kinds[(kinds == _BEGIN) & read[2:]] = _WORD
    kinds[(kinds == _END) & read[:-2]] = _WORD
    return kinds


@functools.lru_cache(maxsize=16)
def _kinds(config: UnifiedConfig) -> np.ndarray:
    """[V], what each id is."""
    image = config.image
    kinds = np.full(config.vocab_size, _WORD)
    kinds[image.all_ids] = np.arange(image.size) // image.tokenizer.quantizer.size
    for mark, kind in ((image.begin, _BEGIN), (image.end, _END), (image.row, _ROW)):
        if mark is not None:
            kinds[mark] = kind
    return kinds
