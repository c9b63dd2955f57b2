"""Few-shot prompts: examples with their answers before a question.

Alayrac et al., "Flamingo: a Visual Language Model for Few-Shot Learning" (2022).
The examples are questions of another data set, the support set, drawn at random or the most similar
ones (RICES, retrieval-based in-context example selection; Yang et al., 2022). In the prompt each
stands as training has it, with its images, its answer and what ends it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import jax
import numpy as np

from mmjax.data.questions import Question
from mmjax.evaluate.context import EvalContext
from mmjax.params import Params, merge
from mmjax.registry import Registry

# Pictures at a time whose features are compared.
_BATCH = 64

# (questions, support set, count, embed) -> of each question the rows of its examples, in the order
# of the prompt. `embed` gives the features of many questions' images, [N, D], of unit norm.
Embed = Callable[[Sequence[Question]], np.ndarray]
Choice = Callable[[Sequence[Question], Sequence[Question], int, Embed], list[Sequence[int]]]
CHOICES: Registry[Choice] = Registry("choice of examples")


@CHOICES.register("random")
def draw(
    questions: Sequence[Question], support: Sequence[Question], count: int, embed: Embed
) -> list[Sequence[int]]:
    """Others for each question, the same ones always; the fewer are among the more."""
    del embed
    return [
        np.random.default_rng(zlib.crc32(question.id.encode())).permutation(len(support))[:count]
        for question in questions
    ]


@CHOICES.register("rices")
def most_similar(
    questions: Sequence[Question], support: Sequence[Question], count: int, embed: Embed
) -> list[Sequence[int]]:
    """Those with the most similar images, the most similar one last; of equal ones, as several
    questions about one image are, any."""
    nearest = embed(questions) @ embed(support).T
    shuffled = np.random.default_rng(0).permutation(len(support))
    order = np.argsort(nearest[:, shuffled], axis=1, kind="stable")
    return list(shuffled[order[:, -count:]])


def with_shots(question: Question, shots: Sequence[Question]) -> Question:
    """The question after examples with their answers.

    Raises:
      ValueError: if an example has no answer in tokens.
    """
    ids, places, images = [], [], []
    visual = 0
    for number, one in enumerate((*shots, question)):
        begin = one.begin if number else 0  # a stream begins once
        said = one.ids[begin:]
        place = one.place[begin:]
        places.append(np.where(place >= 0, place + visual, place))
        ids.append(said)
        images.append(one.images)
        visual += one.visual
        if one is not question:
            if one.answer_ids is None:
                raise ValueError(f"The example {one.id} has no answer.")
            ids.append(one.answer_ids)
            places.append(np.full(len(one.answer_ids), -1, np.int32))
    return question._replace(
        ids=np.concatenate(ids),
        place=np.concatenate(places),
        images=np.concatenate(images),
        visual=visual,
    )


def few_shot(
    questions: Sequence[Question],
    support: Sequence[Question],
    count: int,
    by: str,
    context: EvalContext,
    params: Params,
) -> list[Question]:
    """Each question after `count` examples of a support set.

    Args:
      by: of CHOICES.
      context, params: whose features of images "rices" compares: those that the connector reads.

    Raises:
      ValueError: if the support set is smaller.
    """
    if len(support) < count:
        raise ValueError(
            f"{count} examples were asked for, but the support set has {len(support)} questions: "
            "lower `shots`, or raise `shots_pool`."
        )
    # Compiled once, for both sets.
    run = jax.jit(lambda params, x: merge(context.graphdef, params).features(x).mean(axis=1))
    chosen = CHOICES[by](questions, support, count, lambda some: _embed(some, run, params))
    return [
        with_shots(question, [support[row] for row in rows])
        for question, rows in zip(questions, chosen, strict=True)
    ]


def _embed(
    questions: Sequence[Question], run: Callable[[Params, np.ndarray], jax.Array], params: Params
) -> np.ndarray:
    """[N, D] float32 of unit norm: the mean feature of each question's images.

    Args:
      run: parameters and pictures to the mean feature of each.
    """
    different = {id(question.images): question.images for question in questions}
    pictures = np.concatenate(list(different.values()))
    features = []
    for start in range(0, len(pictures), _BATCH):
        some = pictures[start : start + _BATCH]
        padded = np.pad(some, [(0, _BATCH - len(some)), (0, 0), (0, 0), (0, 0)])
        features.append(np.asarray(run(params, padded), np.float32)[: len(some)])
    features = np.concatenate(features)
    ends = np.cumsum([len(images) for images in different.values()])[:-1]
    means = [part.mean(axis=0) for part in np.split(features, ends)]
    rows = dict(zip(different, means, strict=True))
    found = np.stack([rows[id(question.images)] for question in questions])
    return found / np.linalg.norm(found, axis=1, keepdims=True)
