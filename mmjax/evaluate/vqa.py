"""Short answers to questions about images: VQA accuracy, names, POPE's questions about presence."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from mmjax.data.questions import Question
from mmjax.evaluate.answers import exact_match, same_words, says_yes, vqa_accuracy
from mmjax.evaluate.asking import GeneratingEvaluator
from mmjax.evaluate.base import EVALUATORS
from mmjax.evaluate.summary import Scoring, means


@EVALUATORS.register("vqa")
@dataclasses.dataclass(kw_only=True, eq=False)
class VQA(GeneratingEvaluator):
    """`accuracy`: VQA accuracy with the official normalisation, see `vqa_accuracy`; `exact_match`:
    but for case. Fields: see `GeneratingEvaluator`.
    """

    scoring = Scoring(
        means("accuracy", "exact_match"), main="accuracy", shares=("accuracy", "exact_match")
    )

    def count(self, questions: Sequence[Question], responses: Sequence[str]) -> np.ndarray:
        return np.array(
            [
                (vqa_accuracy(said, question.answers), exact_match(said, question.answers))
                for question, said in zip(questions, responses, strict=True)
            ]
        )

    def constant(self, question: Question, counts: Mapping[str, int]) -> str:
        return max(counts, key=counts.__getitem__)


@EVALUATORS.register("naming")
@dataclasses.dataclass(kw_only=True, eq=False)
class Naming(GeneratingEvaluator):
    """`accuracy`: how often the caption is a name that the image has, letter for letter; see
    `same_words`. The right answers of a question are all of its names. Fields: see
    `GeneratingEvaluator`.
    """

    scoring = Scoring(means("accuracy"), main="accuracy", shares=("accuracy",))

    def count(self, questions: Sequence[Question], responses: Sequence[str]) -> np.ndarray:
        return np.array(
            [
                [same_words(said, question.answers)]
                for question, said in zip(questions, responses, strict=True)
            ]
        )

    def constant(self, question: Question, counts: Mapping[str, int]) -> str:
        return max(counts, key=counts.__getitem__)


def _presence(sums: np.ndarray, questions: np.ndarray) -> dict[str, np.ndarray]:
    """Of true and false "yes", true and false "no"."""
    true_yes, false_yes, true_no, false_no = np.moveaxis(sums, -1, 0)

    def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
        # Without a single "yes" precision is 0, not undefined; without a question it is.
        return np.where(questions == 0, np.nan, part / np.maximum(whole, 1))

    return {
        "accuracy": share(true_yes + true_no, questions),
        "precision": share(true_yes, true_yes + false_yes),
        "recall": share(true_yes, true_yes + false_no),
        "f1": share(2 * true_yes, 2 * true_yes + false_yes + false_no),
        "yes_ratio": share(true_yes + false_yes, questions),
    }


@EVALUATORS.register("pope")
@dataclasses.dataclass(kw_only=True, eq=False)
class POPE(GeneratingEvaluator):
    """Whether an object is in the image, yes or no (Li et al. 2023, arXiv:2305.10355): does the
    model see what is not there?

    `accuracy`, `precision`, `recall` and `f1` of "yes", and `yes_ratio`, the share of "yes". Groups
    are the kinds of objects asked for in vain ("random", "popular", "adversarial"). What counts as
    "no" is said in `says_yes`. Fields: see `GeneratingEvaluator`.
    """

    scoring = Scoring(
        _presence, main="accuracy", shares=("accuracy", "precision", "recall", "f1", "yes_ratio")
    )

    def prepare(self, questions: Sequence[Question]) -> None:
        for question in questions:
            if question.answers[0].lower() not in ("yes", "no"):
                raise ValueError(
                    f"The evaluator 'pope' asks for yes or no, but {question.id} ({question.text}) "
                    f"has the answer {question.answers[0]!r}: choose other groups, or 'vqa'."
                )

    def count(self, questions: Sequence[Question], responses: Sequence[str]) -> np.ndarray:
        right = np.array([question.answers[0].lower() == "yes" for question in questions])
        said = np.array([says_yes(response) for response in responses])
        return np.stack([right & said, ~right & said, ~right & ~said, right & ~said], axis=1)

    def constant(self, question: Question, counts: Mapping[str, int]) -> str:
        return max(counts, key=counts.__getitem__)
