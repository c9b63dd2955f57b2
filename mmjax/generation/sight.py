"""Prompts with images: which visual token stands where, and whether there are so many.

All is checked on the host, before anything is compiled. A row's images are followed by images of
zeros, up to one of few numbers, which nothing refers to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmjax.generation.prompts import (
    SHORTEST,
    Prompts,
    Tokens,
    align,
    bucket,
    check_rows,
    left_pad,
    read_rows,
)
from mmjax.generation.streams import check_streams
from mmjax.models.mllama import PLACE_MISSING, MllamaConfig
from mmjax.models.unified import UnifiedConfig
from mmjax.models.vlm import NEWLINE, TEXT, VLMConfig
from mmjax.typing import Array

# [B, I, H, W, C], or for each row an array [I, H, W, C] (or a list of such images) of its own.
Images = Array | np.ndarray | Sequence[Any]


def read_prompts(
    config: VLMConfig | UnifiedConfig,
    tokens: Tokens,
    images: Images | None,
    mask: Array | np.ndarray | None,
    place: Tokens | None,
    text: Tokens | None,
    text_mask: Array | np.ndarray | None,
) -> Prompts:
    """The prompts of a model that sees; see `Generator.__call__`.

    Raises:
      ValueError: if prompts, places and images do not agree with each other or with the model.
    """
    rows = read_rows(tokens, mask, "tokens")
    pictures = _read_images(config, images, len(rows))
    places = _read_places(config, rows, pictures, place, mask)
    check_rows(rows, config.vocab_size, config.limit, [row == TEXT for row in places])
    if isinstance(config, UnifiedConfig):
        check_streams(config, rows, places)
        if text is not None:
            raise ValueError("Unified models read nothing beside the stream: leave `text` out.")
    prompts = left_pad(rows, config.limit)
    if not any(map(len, pictures)):
        return prompts
    stacked = _stack(pictures, config.frames)
    sight = {"images": stacked, "place": align(places, prompts.valid, TEXT)}
    if text is not None:
        clips = stacked.shape[1] // config.frames
        sight |= _read_text(text, text_mask, len(rows), clips)
    return prompts._replace(sight=sight)


def _read_images(
    config: VLMConfig | UnifiedConfig, images: Images | None, rows: int
) -> list[np.ndarray]:
    """[I, H, W, C] float32 of each row."""
    shape = config.image_shape
    none = np.zeros((0, *shape), np.float32)
    if images is None:
        return [none] * rows
    wanted = f"[batch, images, {', '.join(map(str, shape))}], or a list of arrays, one for each row"
    if len(images) != rows:
        raise ValueError(f"images are of {len(images)} rows, tokens of {rows}: give {wanted}.")
    result = []
    for index, given in enumerate(images):
        row = np.asarray(given) if len(given) else none
        if row.shape[1:] != shape:
            raise ValueError(
                f"The images of prompt {index} have shape {row.shape}, but the model's are "
                f"{wanted}.{_advice(config, row)}"
            )
        if row.dtype.kind in "biu":
            raise ValueError(
                f"The images of prompt {index} are {row.dtype}: give normalised floats, as the "
                "model's processor makes them."
            )
        frames = config.frames
        if len(row) % frames:
            raise ValueError(
                f"Prompt {index} has {len(row)} images, but the model reads clips of {frames}: "
                f"give a multiple of {frames}."
            )
        result.append(row.astype(np.float32, copy=False))
    return result


def _advice(config: VLMConfig | UnifiedConfig, images: np.ndarray) -> str:
    """About images [I, H, W, C] of another size."""
    drawn = isinstance(config, UnifiedConfig) and config.places == config.image.length
    if images.ndim != 4 or not drawn or config.grid_positions:
        return ""
    height, width = images.shape[1:3]
    return f" To read this size take model.sized({height}, {width})."


def _read_places(
    config: VLMConfig | UnifiedConfig,
    rows: list[np.ndarray],
    pictures: list[np.ndarray],
    place: Tokens | None,
    mask: Array | np.ndarray | None,
) -> list[np.ndarray]:
    """Which visual token stands at each token of each row."""
    if place is None:
        if isinstance(config, MllamaConfig) and config.image_tokens > 1 and any(map(len, pictures)):
            raise ValueError(PLACE_MISSING)
        made = [len(row) // config.frames * config.image_tokens for row in pictures]
        places = [_places_of(config, row == config.image_token) for row in rows]
        for index, row in enumerate(places):
            count = int(np.sum(row != TEXT))
            if count != made[index]:
                raise ValueError(
                    f"{_disagreement(index, count, pictures, made)}. Each must stand where the id "
                    f"is image_token={config.image_token}, or give `place`."
                )
        return places
    places = read_rows(place, mask, "place")
    if [row.size for row in places] != [row.size for row in rows]:
        raise ValueError("place must have an entry for each token, and no others.")
    made = [len(row) // config.frames * config.places for row in pictures]
    for index, row in enumerate(places):
        count = int(row.max(initial=TEXT)) + 1
        if count > made[index] or (np.any(row != TEXT) and not made[index]):
            raise ValueError(f"{_disagreement(index, count, pictures, made)}.")
        lowest = NEWLINE if config.newline else TEXT
        if row.size and row.min() < lowest:
            raise ValueError(
                f"Prompt {index} has a place {row.min()}, but the lowest that means something to "
                f"this model is {lowest}: {TEXT} is text, {NEWLINE} the newline of models that "
                "learned one."
            )
    return places


def _disagreement(index: int, count: int, pictures: list[np.ndarray], made: list[int]) -> str:
    return (
        f"Prompt {index} has {count} places for visual tokens, its {len(pictures[index])} image(s) "
        f"make {made[index]}"
    )


def _places_of(config: VLMConfig | UnifiedConfig, here: np.ndarray) -> np.ndarray:
    """The first `image_tokens` places of each image, one image after the other."""
    image, slot = np.divmod(np.cumsum(here) - 1, config.image_tokens)
    return np.where(here, image * config.places + slot, TEXT)


def _stack(pictures: list[np.ndarray], frames: int) -> np.ndarray:
    """[B, I, H, W, C], I clips being a `bucket`."""
    count = bucket(max(map(len, pictures)) // frames, 1) * frames
    stacked = np.zeros((len(pictures), count, *pictures[0].shape[1:]), np.float32)
    for row, given in zip(stacked, pictures, strict=True):
        row[: len(given)] = given
    return stacked


def _read_text(
    text: Tokens, mask: Array | np.ndarray | None, rows: int, clips: int
) -> dict[str, np.ndarray]:
    """The question of each row, once for each of its clips; padded on the right."""
    questions = read_rows(text, mask, "text")
    if len(questions) != rows:
        raise ValueError(f"text has {len(questions)} rows, tokens {rows}: give one for each.")
    lengths = np.array([[row.size] for row in questions])
    valid = np.arange(bucket(int(lengths.max()), SHORTEST)) < lengths
    tokens = align(questions, valid, 0)
    return {"text": np.repeat(tokens, clips, axis=0), "text_mask": np.repeat(valid, clips, axis=0)}
