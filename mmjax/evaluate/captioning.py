"""Captions: beside reference captions, and beside the image itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmjax.data.questions import Question
from mmjax.evaluate.asking import GeneratingEvaluator, distinct
from mmjax.evaluate.base import EVALUATORS
from mmjax.evaluate.caption_scores import CaptionScores
from mmjax.evaluate.metrics import slices
from mmjax.evaluate.summary import Scoring, means
from mmjax.search import open_embedder

# Of the paper: cosines of CLIP are small.
CLIP_WEIGHT = 2.5


@EVALUATORS.register("captioning")
@dataclasses.dataclass(kw_only=True, eq=False)
class Captioning(GeneratingEvaluator):
    """BLEU, METEOR, ROUGE-L and CIDEr of captions; see `CaptionScores` for what exactly they are.

    The right answers of a question are its reference captions. CIDEr weighs words by how rare they
    are among all references: figures of different data, or of part of it, do not compare. Fields:
    see `GeneratingEvaluator`.
    """

    max_new_tokens: int = 48
    scoring = Scoring(CaptionScores.of, main="CIDEr")

    def prepare(self, questions: Sequence[Question]) -> None:
        self._scores = CaptionScores([question.answers for question in questions])

    def count(self, questions: Sequence[Question], responses: Sequence[str]) -> np.ndarray:
        return np.array(
            [
                self._scores.count(said, question.answers)
                for question, said in zip(questions, responses, strict=True)
            ]
        )


@EVALUATORS.register("clipscore")
@dataclasses.dataclass(kw_only=True, eq=False)
class CLIPScore(GeneratingEvaluator):
    """How well captions fit their images (Hessel et al. 2021, arXiv:2104.08718), by a model of
    images and texts.

    `CLIPScore`: 2.5 * max(cosine of image and caption, 0). `RefCLIPScore`: the harmonic mean of
    that and the cosine of the caption and the nearest reference, or 0 if that is negative. Figures
    compare only if the model is the same; the paper's is CLIP ViT-B/32. Other fields: see
    `GeneratingEvaluator`.

    Attributes:
      weights: a directory of Hugging Face format with a CLIP, SigLIP or AltCLIP, or the work
        directory of a run.
      prefix: stands before each caption and reference, as in the paper. A caption too long for the
        model is cut.

    Raises:
      ValueError: if there is no such model there.
    """

    weights: str | Path
    prefix: str = "A photo depicts "
    max_new_tokens: int = 48
    scoring = Scoring(means("CLIPScore", "RefCLIPScore"), main="CLIPScore")

    def __post_init__(self):
        super().__post_init__()
        self._embedder = open_embedder(self.weights, batch_size=self.batch_size)
        self._pictures: dict[bytes, np.ndarray] = {}

    def prepare(self, questions: Sequence[Question]) -> None:
        for question in questions:
            if question.picture is None or not question.answers:
                raise ValueError(
                    f"The evaluator 'clipscore' needs images and reference captions, but "
                    f"{question.id} has not both."
                )
        # Pictures stay the same from one evaluation to the next.
        new = list({q.picture: None for q in questions if q.picture not in self._pictures})
        for part in slices(len(new), self.batch_size):
            self._pictures |= dict(zip(new[part], self._embedder.images(new[part]), strict=True))

    def count(self, questions: Sequence[Question], responses: Sequence[str]) -> np.ndarray:
        texts = [text for question in questions for text in question.answers]
        first, which = distinct([*responses, *texts])
        every = [self.prefix + [*responses, *texts][index] for index in first]
        vectors = self._embedder.texts(every, truncation=True)[which]
        captions, rest = vectors[: len(responses)], vectors[len(responses) :]
        rows, start = [], 0
        for question, caption in zip(questions, captions, strict=True):
            references = rest[start : start + len(question.answers)]
            start += len(references)
            seen = CLIP_WEIGHT * max(float(self._pictures[question.picture] @ caption), 0.0)
            told = max(float((references @ caption).max()), 0.0)
            rows.append((seen, 2 * seen * told / (seen + told) if seen and told else 0.0))
        return np.array(rows)
