"""Which name goes with an image, and which image with a name, by how probable the answers are.

The candidates are the right answer of a question and those of others.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mmjax.data.questions import Question
from mmjax.evaluate.asking import QuestionEvaluator, check_drawn, distinct
from mmjax.evaluate.base import EVALUATORS
from mmjax.evaluate.codes import ImageIds, drawing_model, drawing_prompt, lone_prompt
from mmjax.evaluate.controls import image_names
from mmjax.evaluate.likelihood import LikelihoodEvaluator, MultipleChoice, answer_log_probs
from mmjax.evaluate.summary import CHANCE, Scoring, means
from mmjax.params import Params


@dataclasses.dataclass(kw_only=True, eq=False)
class AmongOthers(QuestionEvaluator):
    """A `QuestionEvaluator` whose questions have the right answers of others as wrong ones.

    Attributes:
      others: so many wrong ones, drawn at random, the same ones always.
      others_from: a data config of questions that they are taken from; None: those that are asked.
    """

    others: int = 19
    others_from: Mapping[str, Any] | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.others < 1:
            raise ValueError(f"others={self.others} leaves nothing to choose from: give 1 or more.")
        if self.others_from is None and self.limit is not None and self.limit <= self.others:
            raise ValueError(
                f"limit={self.limit}: beside each question there are not others={self.others}. "
                "Lower that, raise `limit`, or give `others_from`."
            )

    def run(self, params: Params) -> dict[str, float]:
        """See `QuestionEvaluator`, and `chance/accuracy`."""
        return super().run(params) | {f"{CHANCE}/accuracy": 1 / (1 + self.others)}

    def choose_others(self, questions: Sequence[Question]) -> list[list[Question]]:
        """For each question others that have not its answers, nor answers or images alike.

        Raises:
          ValueError: if there are not so many.
        """
        pool = questions
        if self.others_from is not None:
            opened = self.context.open_questions(
                self.others_from, self.context.tokenizer, limit=None
            )
            pool = list(opened)
            check_drawn(pool, self.draws)
        names = image_names(pool)
        found = []
        for question, name in zip(questions, image_names(questions), strict=True):
            rng = np.random.default_rng(zlib.crc32(question.id.encode()))
            answers, images, chosen = set(question.answers), {name}, []
            for row in rng.permutation(len(pool)):
                if pool[row].answers[0] in answers or names[row] in images:
                    continue
                answers.add(pool[row].answers[0])
                images.add(names[row])
                chosen.append(pool[row])
                if len(chosen) == self.others:
                    break
            else:
                raise ValueError(
                    f"others={self.others}, but beside {question.id} only {len(chosen)} questions "
                    "have other answers and images: lower it, or raise `limit`."
                )
            found.append(chosen)
        return found


@EVALUATORS.register("name_choice")
@dataclasses.dataclass(kw_only=True, eq=False)
class NameChoice(AmongOthers, MultipleChoice):
    """How often an image's name is more probable than those of others: `accuracy` and
    `accuracy_per_token` as in `MultipleChoice`, the first right answer being the name. Fields: see
    `AmongOthers`.
    """

    def complete(self, questions: Sequence[Question]) -> list[Question]:
        return [
            question._replace(
                choices=tuple(one.answers[0] for one in (question, *others)),
                choice_ids=tuple(one.answer_ids for one in (question, *others)),
            )
            for question, others in zip(questions, self.choose_others(questions), strict=True)
        ]

    def constant(self, question: Question, counts: Mapping[str, int]) -> None:
        """Names are about as frequent as each other: none is the majority's."""


class Ranked(NamedTuple):
    """Scores of the candidates, the right one first: log probabilities of the image after its name,
    and how much they are above those of the image alone."""

    after_name: np.ndarray
    gain: np.ndarray


@EVALUATORS.register("picture_choice")
@dataclasses.dataclass(kw_only=True, eq=False)
class PictureChoice(AmongOthers, LikelihoodEvaluator):
    """How often the codes of the image that a name is of are more probable than those of others.

    `accuracy` is by log p(codes | name); simple images are probable after any name. What the name
    adds decides `accuracy_by_gain`: log p(codes | name) - log p(codes), for which images must have
    been learnt alone too (`alone` of the form "drawing"). The control "shuffled" asks for another
    image, as if it were right. Fields: see `AmongOthers`.
    """

    controls: Sequence[str] = ("shuffled",)
    draws = True
    scoring = Scoring(
        means("accuracy", "accuracy_by_gain"),
        main="accuracy",
        shares=("accuracy", "accuracy_by_gain"),
    )

    def __post_init__(self):
        super().__post_init__()
        if "blind" in self.controls or self.examples:
            raise ValueError(
                f"controls={tuple(self.controls)}, {self.examples} examples: images are what is "
                "asked for here, none is hidden and none stands before the name. Use controls="
                "('shuffled',), shots=0 and shots_text_only=0."
            )
        self._ids = ImageIds(self.context, self.batch_size)
        self._log_probs = self.context.compile(
            lambda model, batch: answer_log_probs(model.following("grammar"), batch)
        )
        self._others: dict[str, list[Question]] = {}

    def complete(self, questions: Sequence[Question]) -> Sequence[Question]:
        found = zip(questions, self.choose_others(questions), strict=True)
        self._others = {question.id: others for question, others in found}
        return questions

    def respond(self, params: Params, questions: Sequence[Question]) -> list[Ranked]:
        image = drawing_model(self.context, params).config.image
        # One that is shuffled may be among the others.
        candidates = []
        for question in questions:
            several = [question, *self._others[question.id]]
            first, _ = distinct(image_names(several))
            candidates.append([several[row] for row in first])
        flat = [one for several in candidates for one in several]
        first, which = distinct(image_names(flat))
        ids = self._ids(params, [flat[row].images for row in first])
        asked = [
            question._replace(
                ids=drawing_prompt(question, image),
                place=np.append(question.place, np.int32(-1)),
                images=question.images[:0],
            )
            for question in questions
        ]
        begin = lone_prompt(questions[0], image)
        alone = asked[0]._replace(ids=begin, place=np.full(len(begin), -1, np.int32))
        prompts = [one for one, several in zip(asked, candidates, strict=True) for _ in several]
        found = self.likelihoods(params, [*prompts, *[alone] * len(first)], [*ids[which], *ids])
        totals = np.array([said.total for said in found])
        after, before = totals[: len(flat)], totals[len(flat) :][which]
        ends = np.cumsum([len(several) for several in candidates])[:-1]
        parts = zip(np.split(after, ends), np.split(after - before, ends), strict=True)
        return [Ranked(*part) for part in parts]

    def count(self, questions: Sequence[Question], responses: Sequence[Ranked]) -> np.ndarray:
        return np.array(
            [[np.all(scores[0] > scores[1:]) for scores in said] for said in responses], np.float64
        )

    def text(self, question: Question, response: Ranked) -> str:
        scores = response.after_name
        return f"number {1 + np.sum(scores[1:] >= scores[0])} of {len(scores)}"
