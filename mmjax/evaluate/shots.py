"""Few-shot prompts: which examples stand, with their answers, before a question.

Alayrac et al., "Flamingo: a Visual Language Model for Few-Shot Learning" (2022). The examples are
questions of another data set, the support set, drawn at random or the most similar ones (RICES,
retrieval-based in-context example selection; Yang et al., 2022). How prompts are written is said in
`mmjax.evaluate.support`.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from mmjax.data.questions import Question
from mmjax.evaluate.metrics import slices
from mmjax.evaluate.support import Seen, Support, with_shots
from mmjax.registry import Registry

__all__ = ["CHOICES", "Choosing", "FewShot", "few_shot", "with_shots"]

# Questions at a time whose similarities to the whole support set are held.
_CHUNK = 256
# Beside the seed, of the order of examples that are equally similar.
_TIES = 2


@dataclasses.dataclass(frozen=True)
class Choosing:
    """What examples are chosen of, and by.

    Attributes:
      questions: that are asked.
      support: what examples are taken from.
      count: examples of each question.
      seed: of what is drawn.
      embed: vectors of images, [N, D] float32 of unit norm.
    """

    questions: Sequence[Question]
    support: Support
    count: int
    seed: int
    embed: Callable[[Sequence[Seen]], np.ndarray]

    def take(self, question: Question, rows: Iterable[int]) -> list[int]:
        """The first rows that may be the question's examples: whose record and image are others.

        Raises:
          ValueError: if they are too few.
        """
        own, taken = self.support.entry_of(question), []
        for row in map(int, rows):
            entry = self.support.entry(row)
            if entry is None or entry.record == own.record:
                continue
            if own.image and entry.image == own.image:
                continue
            taken.append(row)
            if len(taken) == self.count:
                return taken
        raise ValueError(
            f"{self.count} examples were asked for, but the support set of {len(self.support)} "
            f"questions has {len(taken)} that are not of the record or the image of "
            f"{question.id}: lower `shots`, raise `shots_pool`, or give more data in `shots_from`."
        )


# -> of each question the rows of its examples, in the order of the prompt.
Choice = Callable[[Choosing], list[list[int]]]
CHOICES: Registry[Choice] = Registry("choice of examples")


@CHOICES.register("random")
def draw(choosing: Choosing) -> list[list[int]]:
    """Others for each question, the same ones always; the fewer are among the more."""
    rows = []
    for question in choosing.questions:
        rng = np.random.default_rng([zlib.crc32(question.id.encode()), choosing.seed])
        rows.append(choosing.take(question, rng.permutation(len(choosing.support))))
    return rows


@CHOICES.register("rices")
def most_similar(choosing: Choosing) -> list[list[int]]:
    """Those with the most similar images, the most similar one last; of equal ones, as several
    questions about one image are, any."""
    support, questions = choosing.support, choosing.questions
    order = np.random.default_rng([choosing.seed, _TIES]).permutation(len(support))
    order = np.array([row for row in order if support.entry(row) is not None], np.int64)
    if not len(order):
        return [choosing.take(question, ()) for question in questions]
    others = choosing.embed([support.seen(int(row)) for row in order])
    own = choosing.embed([support.seen_of(question) for question in questions])
    rows = []
    for part in slices(len(questions), _CHUNK):
        for question, similar in zip(questions[part], own[part] @ others.T, strict=True):
            nearest = falling(similar, 2 * choosing.count)
            rows.append(choosing.take(question, (order[index] for index in nearest))[::-1])
    return rows


def falling(values: np.ndarray, first: int) -> Iterator[int]:
    """Indices by falling value; all are sorted only if more than the first ones are wanted.

    Args:
      values: [N]
      first: so many.
    """
    first = min(first, len(values))
    split = np.argpartition(-values, first - 1)
    for part in (split[:first], split[first:]):
        yield from part[np.argsort(-values[part], kind="stable")]


@dataclasses.dataclass(frozen=True)
class FewShot:
    """What stands before a question.

    Attributes:
      count: examples.
      by: how they are chosen: of `CHOICES`.
      seed: of what is drawn.
      text_only: whether their images are left out.
      between: a text after each, for templates of documents.
    """

    count: int
    by: str = "random"
    seed: int = 0
    text_only: bool = False
    between: str = ""


def few_shot(
    questions: Sequence[Question],
    support: Support,
    shots: FewShot,
    embed: Callable[[Sequence[Seen]], np.ndarray],
) -> list[Question]:
    """Each question after its examples, whose images are read when they are looked at.

    Args:
      embed: vectors of images, [N, D] float32 of unit norm; used by "rices".

    Raises:
      ValueError: if there are too few examples, or images to compare are missing.
    """
    chosen = CHOICES[shots.by](Choosing(questions, support, shots.count, shots.seed, embed))
    write = functools.partial(support.prompt, text_only=shots.text_only, between=shots.between)
    return [write(question, rows) for question, rows in zip(questions, chosen, strict=True)]
