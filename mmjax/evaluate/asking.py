"""What evaluators of questions about images share: asking, controls, and what is written."""

from __future__ import annotations

import abc
import collections
import dataclasses
import json
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from mmjax.data.questions import Question
from mmjax.evaluate.answer_sheet import Card, answer_sheet, spread
from mmjax.evaluate.base import Evaluator
from mmjax.evaluate.context import EvalContext
from mmjax.evaluate.controls import CONTROLS, image_names
from mmjax.evaluate.shots import CHOICES, FewShot, few_shot
from mmjax.evaluate.similarity import EmbedderFeatures, ModelFeatures
from mmjax.evaluate.summary import (
    BLIND,
    CHANCE,
    MACRO,
    MAJORITY,
    MODEL,
    Scoring,
    summarise,
    table,
)
from mmjax.generation import Generator, text_only
from mmjax.generation.prompts import bucket
from mmjax.models.unified import Unified
from mmjax.params import Params, merge
from mmjax.sharding import batch_shards

# What is said to a question: a text, or numbers.
Response = Any


@dataclasses.dataclass(kw_only=True, eq=False)
class QuestionEvaluator(Evaluator):
    """Asks each question, asks it again as the controls have it, and compares.

    Scores are of all questions (`accuracy`), of each group (`counting/accuracy`) and the mean over
    groups (`macro/accuracy`). Each has a 95% interval, `accuracy_low` to `accuracy_high`: images
    are drawn with replacement, each with all of its questions; that of a share of right answers is
    at least as wide as Wilson's, which knows that no error among few questions proves little.
    Controls are `blind/accuracy` and `shuffled/accuracy`; `majority/accuracy` is what the most
    frequent right answer of each group would get. `gain` is what images are worth: how much better
    the main score of the model is than the blind one, with an interval from the same draws.

    The mesh shares the work of each batch; every process holds all questions and all results.

    Attributes:
      data: a data config of questions; see `mmjax.data.open_questions`.
      limit: ask so many questions; None: all.
      batch_size: rows at a time; a multiple of the mesh's shards.
      controls: of `CONTROLS`; without "blind" there is no gain. They change the images of examples
        too.
      shots: how many examples, with their answers, stand before each question. None is of the
        question's own record or image.
      shots_from: a data config of the questions that examples are taken from. They are written as
        `data` says: as turns of one conversation, or, where its template has a `chunk`, as one
        document.
      shots_by: how they are chosen: of `CHOICES`, "random" or "rices".
      shots_pool: take them from so many questions; None: all.
      shots_seed: which questions those are, and which examples are drawn of them. Published
        figures are often means over several seeds: an evaluation for each.
      shots_weights: by what "rices" compares images: a directory of Hugging Face format with a
        CLIP, SigLIP or AltCLIP, or the work directory of a run. None: the mean of the features that
        the evaluated model's connector reads.
      shots_text_only: with shots=0, so many examples whose images are left out stand before each
        question; 2 in the zero-shot figures of Flamingo and OpenFlamingo.
      shots_between: a text after each example, for templates with a `chunk`; "\\n" in
        OpenFlamingo's evaluation.
      answers: the name of a file of all answers, one JSON object a line; None: none. It is written
        to the work directory at each run, and so is the sheet.
      sheet: the file name of a picture of questions and answers; None: none.
      sheet_rows: how many questions it shows.
      title: what the questions are, for the sheet and the printed table.
      note: a line under both, e.g. `mmjax.evaluate.ICONS_NOTE`.
      context: of a model that answers, and its tokenizer.

    Raises:
      ValueError: on a control that does not exist, options of examples that mean nothing, or a
        batch that the mesh cannot share.
    """

    data: Mapping[str, Any]
    context: EvalContext
    limit: int | None = None
    batch_size: int = 32
    controls: Sequence[str] = ("blind", "shuffled")
    shots: int = 0
    shots_from: Mapping[str, Any] | None = None
    shots_by: str = "random"
    shots_pool: int | None = None
    shots_seed: int = 0
    shots_weights: str | Path | None = None
    shots_text_only: int = 0
    shots_between: str = ""
    answers: str | None = None
    sheet: str | None = None
    sheet_rows: int = 12
    title: str = ""
    note: str = ""

    scoring: ClassVar[Scoring]
    draws: ClassVar[bool] = False  # whether images are asked for, not words

    def __post_init__(self):
        for name in self.controls:
            CONTROLS[name]  # an unknown one is told before training
        self._check_shots()
        shards = batch_shards(self.context.mesh)
        if self.batch_size < 1 or self.batch_size % shards:
            raise ValueError(
                f"A batch of {self.batch_size} questions does not divide over {shards} shards: "
                f"make batch_size a multiple of {shards}."
            )

        self._embed = None
        if self.examples and self.shots_by == "rices":
            self._embed = (
                ModelFeatures(self.context, self.batch_size)
                if self.shots_weights is None
                else EmbedderFeatures(self.shots_weights, self.batch_size)
            )

    @property
    def examples(self) -> int:
        """How many stand before each question, with or without images."""
        return self.shots or self.shots_text_only

    def _check_shots(self) -> None:
        CHOICES[self.shots_by]
        if min(self.shots, self.shots_text_only) < 0 or (self.shots and self.shots_text_only):
            raise ValueError(
                f"shots={self.shots}, shots_text_only={self.shots_text_only}: neither is negative, "
                "and one of them is 0."
            )
        if self.examples and self.shots_from is None:
            raise ValueError(
                f"{self.examples} examples: say with `shots_from` which data they are of; shots=0 "
                "takes none."
            )
        if self.shots_weights is not None and self.shots_by != "rices":
            raise ValueError(
                f"shots_by={self.shots_by!r} compares no images: leave `shots_weights` out, or use "
                "shots_by='rices'."
            )

    @classmethod
    def check_data(cls, data: Mapping[str, Any], context: EvalContext) -> None:
        """Reads one question: a mistake in the data config is told before training."""
        first_question(data, context, cls.draws)

    @abc.abstractmethod
    def respond(self, params: Params, questions: Sequence[Question]) -> list[Response]:
        """What the model says to each question."""

    @abc.abstractmethod
    def count(self, questions: Sequence[Question], responses: Sequence[Response]) -> np.ndarray:
        """[N, S], of each response what `scoring` makes scores of."""

    def complete(self, questions: Sequence[Question]) -> Sequence[Question]:
        """The questions with what all of them together give each.

        Raises:
          ValueError: if they are too few for that.
        """
        return questions

    def prepare(self, questions: Sequence[Question]) -> None:
        """Sees all questions before any is asked.

        Raises:
          ValueError: if they lack what is needed.
        """

    def constant(self, question: Question, counts: Mapping[str, int]) -> Response | None:
        """The response of the majority baseline.

        Args:
          counts: how often each answer is right in the question's group.

        Returns:
          None if there is no such baseline.
        """
        del question, counts
        return None

    def text(self, question: Question, response: Response) -> str:
        """The response as people read it."""
        del question
        return response

    def run(self, params: Params) -> dict[str, float]:
        """Scores by name; see the class.

        Raises:
          ValueError: if there are no questions, or they lack what is needed.
        """
        opened = self.context.open_questions(self.data, self.context.tokenizer, limit=self.limit)
        questions = list(opened)
        if not questions:
            raise ValueError(
                f"There are no questions to ask: {dict(self.data)}. Check its sources and splits, "
                "or leave this evaluation out of config.evals."
            )
        check_drawn(questions, self.draws)
        groups = [question.group for question in questions]
        reserved = sorted({MACRO, MAJORITY, CHANCE, *CONTROLS} & set(groups))
        if reserved:
            raise ValueError(
                f"Groups of questions are called {reserved}, as are parts of the scores' names: "
                "rename them."
            )
        questions = self.complete(questions)
        self.prepare(questions)
        _, clusters = distinct(image_names(questions))
        if self.examples:
            questions = self._with_examples(params, questions)
        responses = self._responses(params, questions)
        counts = {name: self._counts(questions, said) for name, said in responses.items()}
        if jax.process_index() == 0:
            self._write(questions, responses, counts)
        return summarise(self.scoring, counts, groups, clusters)

    def describe(self, scores: Mapping[str, float]) -> str:
        """A table of the groups: the model, the controls, the baseline."""
        lines = table(self.scoring, scores, (*self.controls, MAJORITY, CHANCE))
        return "\n".join(filter(None, (self.title, lines, self.note)))

    def _with_examples(self, params: Params, questions: Sequence[Question]) -> list[Question]:
        support = self.context.open_support(
            self.shots_from,
            self.data,
            self.context.tokenizer,
            pool=self.shots_pool,
            seed=self.shots_seed,
        )
        shots = FewShot(
            count=self.examples,
            by=self.shots_by,
            seed=self.shots_seed,
            text_only=self.shots_text_only > 0,
            between=self.shots_between,
        )
        return few_shot(questions, support, shots, lambda seen: self._embed(params, seen))

    def _responses(
        self, params: Params, questions: Sequence[Question]
    ) -> dict[str, list[Response | None]]:
        """By condition, what is said to each question; None where it is not asked."""
        asked: dict[str, Sequence[Question | None]] = {MODEL: questions}
        asked |= {name: CONTROLS[name](questions) for name in self.controls}
        for name, those in asked.items():
            if not any(those):
                raise ValueError(
                    f"The control {name!r} has nothing to ask: no two images are of one shape. "
                    "Leave it out of `controls`."
                )
        every = [question for those in asked.values() for question in those if question]
        said = iter(self.respond(params, every))
        responses = {
            name: [next(said) if question else None for question in those]
            for name, those in asked.items()
        }
        right = collections.defaultdict(collections.Counter)
        for question in questions:
            right[question.group].update(question.answers[:1])
        constant = [self.constant(question, right[question.group]) for question in questions]
        return responses if constant[0] is None else responses | {MAJORITY: constant}

    def _counts(
        self, questions: Sequence[Question], responses: Sequence[Response | None]
    ) -> np.ndarray:
        """[N, 1 + S]: 1 and what is counted; zeros where there is no response."""
        here = [row for row, response in enumerate(responses) if response is not None]
        counted = self.count([questions[row] for row in here], [responses[row] for row in here])
        counts = np.zeros((len(questions), 1 + counted.shape[1]))
        counts[here] = np.concatenate([np.ones((len(here), 1)), counted], axis=1)
        return counts

    def _write(
        self,
        questions: Sequence[Question],
        responses: Mapping[str, Sequence[Response | None]],
        counts: Mapping[str, np.ndarray],
    ) -> None:
        main = self.scoring.main
        conditions = [name for name in responses if name != MAJORITY]
        scores = {name: self.scoring.of(counts[name])[main] for name in conditions}

        def said(name: str, row: int) -> str | None:
            response = responses[name][row]
            return None if response is None else self.text(questions[row], response)

        if self.answers is not None:
            with open(self.context.workdir / self.answers, "w", encoding="utf-8") as file:
                for row, question in enumerate(questions):
                    entry = {"id": question.id, "group": question.group, "question": question.text}
                    entry |= {"right": question.answers, main: float(scores[MODEL][row])}
                    entry |= {name: said(name, row) for name in conditions}
                    entry |= {
                        f"{name}/{main}": float(scores[name][row])
                        for name in conditions
                        if name != MODEL and responses[name][row] is not None
                    }
                    file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        if self.sheet is not None:
            judged = main in self.scoring.shares
            cards = [
                Card(
                    question=questions[row],
                    said={name: said(name, row) for name in (MODEL, BLIND) if name in conditions},
                    right={name: scores[name][row] >= 0.5 for name in conditions if judged},
                )
                for row in spread([question.group for question in questions], self.sheet_rows)
            ]
            answer_sheet(
                cards,
                self.context.workdir / self.sheet,
                title=self.title or "Answers",
                questions=len(questions),
                note=self.note,
            )


@dataclasses.dataclass(kw_only=True, eq=False)
class GeneratingEvaluator(QuestionEvaluator):
    """A `QuestionEvaluator` of what the model writes, drawing nothing.

    An answer ends with the tokenizer's end token or the one that ends the data's answers.

    Attributes:
      max_new_tokens: of an answer; what is longer is cut.
      num_beams: above 1, the best answer of beam search; see `mmjax.generation.Generator`.
      length_penalty: of beam search: log probabilities are divided by length ** length_penalty.
      stop: texts before the first of which an answer ends, such as ("Question", "Answer", "Short")
        in OpenFlamingo's evaluation of VQA.
    """

    max_new_tokens: int = 16
    num_beams: int = 1
    length_penalty: float = 1.0
    stop: Sequence[str] = ()

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.stop, str) or not all(self.stop):
            raise ValueError(f"stop={self.stop!r} must be a list of texts, none of them empty.")
        if self.num_beams == 1 and self.length_penalty != 1.0:
            raise ValueError(
                f"length_penalty={self.length_penalty} is of beam search: give num_beams above 1."
            )

    def respond(self, params: Params, questions: Sequence[Question]) -> list[str]:
        context = self.context
        # As they lie: nothing is moved, and models of one structure share compiled programs.
        model = merge(context.graphdef, params)
        generator = Generator(model, mesh=context.mesh, rules=None)
        # Of a model that may write either, words are wanted.
        suppress = text_only(model.config) if isinstance(model, Unified) else None
        ends = {context.tokenizer.eos_id}
        ends |= {int(q.answer_ids[-1]) for q in questions if q.answer_ids is not None}
        # What is asked twice is answered once: without images many questions are the same.
        first, which = distinct(map(identity, questions, image_names(questions)))
        texts: dict[int, str] = {}
        for rows in batches([prompt_size(questions[row]) for row in first], self.batch_size):
            asked = [questions[first[row]] for row in rows]
            generated = generator(
                [question.ids for question in asked],
                **sight(asked),
                max_new_tokens=self.max_new_tokens,
                suppress=suppress,
                eos_id=sorted(ends - {None}),
                num_beams=self.num_beams,
                length_penalty=self.length_penalty,
                # Beams are at their ends before their texts are known.
                stop_strings=self.stop if self.num_beams == 1 else (),
                decode=context.tokenizer.decode,
            )
            for row, ids, length in zip(rows, generated.tokens, generated.lengths, strict=True):
                said = context.tokenizer.decode(ids[:length].tolist())
                texts[row] = before_first(self.stop, said)
        return [texts[row] for row in which]


def first_question(data: Mapping[str, Any], context: EvalContext, draws: bool) -> None:
    """Reads one question; raises ValueError on a mistake in the data config."""
    check_drawn([*context.open_questions(data, context.tokenizer, limit=1)], draws)


def check_drawn(questions: Sequence[Question], draws: bool) -> None:
    """Raises ValueError if images are asked for where words are wanted, or the other way round."""
    for question in questions:
        if question.drawn != draws:
            wanted, asked = ("an image", "words") if draws else ("words", "an image")
            forms = "is that of the form 'drawing'" if draws else "is not of the form 'drawing'"
            raise ValueError(
                f"The evaluator wants {wanted}, but {question.id} asks for {asked}: give data that "
                f"{forms}."
            )


def before_first(ends: Sequence[str], text: str) -> str:
    """The text up to the first of these; all of it if there is none."""
    places = [text.find(end) for end in ends if end in text]
    return text[: min(places)].rstrip() if places else text


def sight(questions: Sequence[Question]) -> dict[str, list[Any]]:
    """What a model that sees is given beside the tokens; nothing where there are no images."""
    if not any(len(question.images) for question in questions):
        return {}
    return {name: [getattr(q, name) for q in questions] for name in ("images", "place")}


def identity(question: Question, images: str) -> Hashable:
    """Equal for questions that are the same to the model."""
    return question.ids.tobytes(), question.place.tobytes(), images


def prompt_size(question: Question) -> tuple[int, int]:
    """Prompts of one size may share a batch without much padding."""
    return len(question.images), bucket(len(question.ids))


def distinct(keys: Iterable[Hashable]) -> tuple[list[int], list[int]]:
    """The index of each different key's first occurrence, and for each key which of them it is."""
    places: dict[Hashable, tuple[int, int]] = {}
    which = [places.setdefault(key, (len(places), i))[0] for i, key in enumerate(keys)]
    return [index for _, index in places.values()], which


def batches(sizes: Sequence[tuple[int, ...]], batch_size: int) -> Iterator[list[int]]:
    """Row numbers, by rising size, always `batch_size` of them: the last ones are repeated."""
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        yield rows + rows[-1:] * (batch_size - len(rows))
