"""Questions about images for evaluation: prompts that end where the answer begins."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Question(NamedTuple):
    """One question, ready for the model.

    `id` names the record (and the question in it), `group` its kind of task ("" where the record
    does not say). `text` is the question, `answers` what counts as right (the first is the one the
    record gives), `choices` the options of multiple choice. `ids` [T] int32 is the prompt up to
    where the answer begins, unpadded; `place` [T] int32 the visual token that stands at each
    position, counted over the images one after the other, -1 for text. `images` [I, H, W, 3]
    float32, normalised; I may be 0. `picture`: the encoded bytes of the first image as the source
    has it, for sheets; None where there is none. `answer_ids` [U] int32 are the tokens of the first
    answer that training would supervise, its end included, and `choice_ids` those of each choice:
    `ids` and they, one after the other, are what training has.
    """

    id: str
    group: str
    text: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] | None
    ids: np.ndarray
    place: np.ndarray
    images: np.ndarray
    picture: bytes | None
    answer_ids: np.ndarray | None = None
    choice_ids: tuple[np.ndarray, ...] | None = None
