"""A picture of questions with their images, what the model answers, and what is right."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.data.image import decode, flatten
from mmjax.data.questions import Question
from mmjax.evaluate.sheets import GREEN, GREY, RED, figure_class

ACROSS = 3
# Letters of an answer that are shown, and of a line.
_LONGEST, _LETTERS = 120, 34
# Colours and marks of what is right, wrong, or neither.
_VERDICTS = {True: (GREEN, " \N{CHECK MARK}"), False: (RED, " \N{BALLOT X}"), None: ("black", "")}


@dataclasses.dataclass(frozen=True)
class Card:
    """One question.

    Attributes:
      question: with its picture and the right answers.
      said: who answers ("model", "blind"), and what; None: was not asked.
      right: whether that is right, by who answers; empty where answers are neither right nor wrong.
    """

    question: Question
    said: Mapping[str, str | None]
    right: Mapping[str, bool]


def answer_sheet(
    cards: Sequence[Card], path: str | Path, *, title: str, questions: int, note: str = ""
) -> None:
    """Draw questions; the first answer of each is green where it is right and red where it is not.

    Args:
      cards: at least one question.
      path: of the PNG; its directory must exist.
      title: the data set and split the questions are from.
      questions: how many there are in all.
      note: a line at the bottom, e.g. ICONS_NOTE.
    """
    # In inches.
    picture, text, gap, top, bottom, line = 1.45, 2.6, 0.2, 0.95, 0.4, 0.17
    cell = picture + text + gap
    texts = [_lines(card) for card in cards]
    rows = [range(start, min(start + ACROSS, len(cards))) for start in range(0, len(cards), ACROSS)]
    heights = [max(picture, *(len(texts[i]) * line for i in row)) + gap for row in rows]
    width, height = 0.2 + ACROSS * cell, top + sum(heights) + bottom
    figure = figure_class()(figsize=(width, height), dpi=110, facecolor="white")

    def write(x: float, y: float, words: str, **style: Any) -> None:
        figure.text(x / width, 1 - y / height, words, va="center", parse_math=False, **style)

    write(0.2, 0.32, title, fontsize=14, weight="bold")
    write(0.2, 0.62, _legend(cards, questions), fontsize=9.5, color=GREY)
    y = top
    for row, tall in zip(rows, heights, strict=True):
        for column, number in enumerate(row):
            x = 0.2 + column * cell
            card = cards[number]
            where = (x / width, 1 - (y + picture) / height, picture / width, picture / height)
            axes = figure.add_axes(where)
            axes.imshow(_picture(card.question.picture), interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_anchor("N")
            colour, mark = _VERDICTS[card.right.get(next(iter(card.said)))]
            colour = colour if mark else "#cccccc"
            for spine in axes.spines.values():
                spine.set(edgecolor=colour, linewidth=2.5)
            for place, (words, style) in enumerate(texts[number]):
                write(x + picture + 0.12, y + (place + 0.5) * line, words, **style)
        y += tall
    write(0.2, height - 0.2, note, fontsize=9, color=GREY, style="italic")
    figure.savefig(path, metadata={"Software": None})


def spread(groups: Sequence[str], count: int) -> list[int]:
    """So many rows, the same number of each group as far as there are, evenly spread over each, so
    that nobody chose them; groups one after the other."""
    rows = {group: [i for i, g in enumerate(groups) if g == group] for group in sorted(set(groups))}
    share = dict.fromkeys(rows, 0)
    while sum(share.values()) < min(count, len(groups)):
        for group in rows:
            if share[group] < len(rows[group]) and sum(share.values()) < count:
                share[group] += 1
    return [
        rows[group][round(place)]
        for group, wanted in share.items()
        for place in np.linspace(0, len(rows[group]) - 1, wanted)
    ]


def _legend(cards: Sequence[Card], questions: int) -> str:
    text = f"{len(cards)} of {questions} questions, evenly spread over each group."
    right = {who: sum(card.right[who] for card in cards) for who in cards[0].right}
    shown = {"model": "the model", "blind": "the same model without the image"}
    if right:
        counts = (f"{shown[who]} {right[who]}" for who in cards[0].said)
        text += f" Right of these: {', '.join(counts)}."
    return text


def _lines(card: Card) -> list[tuple[str, dict[str, Any]]]:
    """The text beside the picture: each line and its style."""
    lines: list[tuple[str, dict[str, Any]]] = []

    def add(text: str, **style: Any) -> None:
        letters = _LETTERS if style.get("weight") != "bold" else _LETTERS - 4
        lines.extend((words, {"fontsize": 9.5} | style) for words in textwrap.wrap(text, letters))

    if card.question.group:
        add(card.question.group, fontsize=8, color=GREY)
    if card.question.text:
        add(_shortened(card.question.text), weight="bold")
    for number, (who, said) in enumerate(card.said.items()):
        if said is not None:
            colour, mark = _VERDICTS[card.right.get(who)]
            weight = "bold" if number == 0 else "normal"
            add(f"{who}: {_shortened(said)}{mark}", color=colour, weight=weight)
    add(f"right: {_shortened(' / '.join(dict.fromkeys(card.question.answers)))}", color=GREY)
    return lines


def _shortened(text: str) -> str:
    text = " ".join(text.split()) or "(nothing)"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST].rstrip()}\N{HORIZONTAL ELLIPSIS}"


def _picture(encoded: bytes | None) -> np.ndarray:
    if encoded is None:
        return np.full((8, 8, 3), 255, np.uint8)
    return np.asarray(flatten(decode(encoded)))
