"""Pictures of texts, drawn by a model of text and image codes, and judged by an encoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mmjax.data.image import PRESETS, denormalize
from mmjax.data.questions import Question
from mmjax.evaluate.asking import batches, check_drawn, distinct, first_question, prompt_size
from mmjax.evaluate.base import EVALUATORS, Evaluator
from mmjax.evaluate.codes import ImageIds, drawing_model, drawing_prompt, lone_prompt
from mmjax.evaluate.context import EvalContext
from mmjax.evaluate.drawing_scores import drawing_scores
from mmjax.evaluate.drawing_sheet import Picture, drawing_sheet
from mmjax.evaluate.image_metrics import frechet_distance
from mmjax.evaluate.metrics import label_ranks
from mmjax.evaluate.summary import CHANCE
from mmjax.generation import Generator, Painter
from mmjax.generation.options import make_sampler
from mmjax.params import Params
from mmjax.search import open_embedder
from mmjax.sharding import batch_shards

REAL, AGAIN = "real", "reconstructed"
_SHOWN = {REAL: "real", AGAIN: "from its codes"}


@EVALUATORS.register("drawing")
@dataclasses.dataclass(kw_only=True, eq=False)
class Drawing(Evaluator):
    """Draws a picture of each text, with each strength of guidance, and asks an encoder of images
    and texts how well they fit.

    Scores are those of `drawing_scores`, `guidance_3/CLIPScore` for instance: CLIPScore is
    2.5 * max(cosine of picture and text, 0) (Hessel et al. 2021, arXiv:2104.08718), and R@1 the
    share of pictures whose text is nearer than all others of the data. Beside them those of the
    real pictures (`real/...`) and of what the tokenizer makes of their codes
    (`reconstructed/...`): what the encoder makes of good ones. (They are no bounds: a drawing that
    is more like its text than the real picture may score higher.) `frechet` is the Frechet distance
    of the encoder's features from those of the real pictures. Figures compare only if encoder,
    texts and real pictures are the same; they say little where the encoder knows the data badly.

    What guidance compares with is an image that has no text (`alone` of the form "drawing"). A
    picture depends on the seed, its text's number, and the guidance alone.

    Attributes:
      data: a data config of questions of the form "drawing".
      encoder: the work directory of a run of a CLIP or SigLIP, or a directory of Hugging Face
        format.
      limit: of so many texts; None: all.
      guidance: strengths of classifier-free guidance, see `Sampler.guided`; 1 is none.
      temperature, top_k, top_p: see `mmjax.generation.Generator`.
      seed: of what is drawn; temperature 0 draws nothing.
      batch_size: texts at a time; a multiple of the mesh's shards.
      prefix: stands before each text that the encoder reads.
      distractors: a data config of questions whose texts are candidates of R@1 too.
      sheet: the file name of a picture of texts and pictures, written to the work directory at each
        run; None: none.
      sheet_rows: how many texts it shows, evenly spread.
      title: what the texts are, for the sheet and the printed table.
      note: a line under both, e.g. `mmjax.evaluate.ICONS_NOTE`.
      context: of a model of the name "unified", and its tokenizer.

    Raises:
      ValueError: on options that mean nothing, an encoder that is none of images and texts, or a
        batch that the mesh cannot share.
    """

    data: Mapping[str, Any]
    context: EvalContext
    encoder: str | Path
    limit: int | None = None
    guidance: Sequence[float] = (1.0,)
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    batch_size: int = 32
    prefix: str = ""
    distractors: Mapping[str, Any] | None = None
    sheet: str | None = None
    sheet_rows: int = 10
    title: str = ""
    note: str = ""

    def __post_init__(self):
        if not self.guidance or len(set(self.guidance)) < len(self.guidance):
            raise ValueError(f"guidance={self.guidance} must be different numbers, such as (1, 3).")
        for strength in self.guidance:
            if strength < 0:
                raise ValueError(
                    f"guidance={strength} would draw what the text is not: give 0 or more (1: "
                    "none)."
                )
            make_sampler(
                self.temperature, self.top_k, self.top_p, None, None, float(strength), None
            )
        shards = batch_shards(self.context.mesh)
        if self.batch_size < 1 or self.batch_size % shards:
            raise ValueError(
                f"A batch of {self.batch_size} texts does not divide over {shards} shards: make "
                f"batch_size a multiple of {shards}."
            )
        self._preset = self.data["conversation"]["layout"]["preset"]
        self._embedder = open_embedder(self.encoder, batch_size=self.batch_size)
        self._ids = ImageIds(self.context, self.batch_size)
        # Texts and real pictures stay the same from one evaluation to the next.
        self._known: tuple[np.ndarray, np.ndarray] | None = None

    @classmethod
    def check_data(cls, data: Mapping[str, Any], context: EvalContext) -> None:
        first_question(data, context, draws=True)

    def run(self, params: Params) -> dict[str, float]:
        """Scores by name; see the class. `n` texts, and `chance/R@1`.

        Raises:
          ValueError: if the model draws nothing, or there are not two different texts.
        """
        model = drawing_model(self.context, params)
        questions = self._questions(self.data, self.limit)
        texts = [question.text for question in questions]
        shuffled = len(set(texts))
        if shuffled < 2:
            raise ValueError(
                f"Drawings need two different texts to be compared with, not {shuffled}: check the "
                "evaluator's data and limit."
            )
        more = [] if self.distractors is None else self._questions(self.distractors, None)
        candidates = list(dict.fromkeys([*texts, *(question.text for question in more)]))
        pictures = self._pictures(model, params, questions)
        if self._known is None:
            names = [self.prefix + text for text in candidates]
            self._known = (
                self._embedder.texts(names, truncation=True),
                self._embedder.images(list(pictures[REAL])),
            )
        names, real = self._known
        vectors = {
            made: real if made == REAL else self._embedder.images(list(some))
            for made, some in pictures.items()
        }
        right = [candidates.index(text) for text in texts]
        cosines = {made: some.astype(np.float64) @ names.T for made, some in vectors.items()}
        scores = drawing_scores(cosines, right, shuffled)
        for made in vectors:
            if made != REAL:
                scores[f"{made}/frechet"] = frechet_distance(vectors[made], real)
        if self.sheet is not None and jax.process_index() == 0:
            self._draw(texts, pictures, cosines, np.array(right))
        return scores | {"n": float(len(texts)), f"{CHANCE}/R@1": 1 / len(candidates)}

    def _questions(self, data: Mapping[str, Any], limit: int | None) -> list[Question]:
        opened = self.context.open_questions(data, self.context.tokenizer, limit=limit)
        questions = list(opened)
        check_drawn(questions, True)
        return questions

    def _pictures(
        self, model: Any, params: Params, questions: Sequence[Question]
    ) -> dict[str, np.ndarray]:
        """[N, H, W, 3] uint8, by how they were made."""
        preset, mesh = PRESETS[self._preset], self.context.mesh
        images = [question.images for question in questions]
        # As they lie: nothing is moved, and models of one structure share compiled programs.
        generator = Generator(model, mesh=mesh, rules=None)
        painter = Painter(
            model, mean=preset.mean, std=preset.std, mesh=mesh, batch_size=self.batch_size
        )
        pictures = {
            f"guidance_{strength:g}": painter(self._drawn(generator, questions, strength))
            for strength in self.guidance
        }
        pictures[AGAIN] = painter(self._ids(params, images))
        return pictures | {REAL: denormalize(np.concatenate(images), self._preset)}

    def _drawn(
        self, generator: Generator, questions: Sequence[Question], guidance: float
    ) -> np.ndarray:
        """[N, L], the ids of a picture of each text."""
        image = generator.model.config.image
        ids = np.zeros((len(questions), image.length), np.int32)
        key = jax.random.key(self.seed)
        for rows in batches([prompt_size(question) for question in questions], self.batch_size):
            asked = [questions[row] for row in rows]
            generated = generator(
                [drawing_prompt(question, image) for question in asked],
                max_new_tokens=image.length,
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                guidance=float(guidance),
                negative=[lone_prompt(question, image) for question in asked],
                key=jax.vmap(jax.random.fold_in, (None, 0))(key, np.array(rows)),
            )
            ids[rows] = generated.tokens
        return ids

    def _draw(
        self,
        texts: Sequence[str],
        pictures: Mapping[str, np.ndarray],
        cosines: Mapping[str, np.ndarray],
        right: np.ndarray,
    ) -> None:
        """The sheet: texts spread evenly over the list, so that nobody chose them."""
        first, _ = distinct(texts)
        shown = np.linspace(0, len(first) - 1, min(self.sheet_rows, len(first)))
        hits = {made: label_ranks(some, right) == 1 for made, some in cosines.items()}
        order = [REAL, AGAIN, *(made for made in pictures if made not in _SHOWN)]
        rows = []
        for row in [first[number] for number in shown.round().astype(int)]:
            drawn = {}
            for made in order:
                cosine = float(cosines[made][row, right[row]])
                drawn[_shown(made)] = Picture(pictures[made][row], cosine, bool(hits[made][row]))
            rows.append((texts[row], drawn))
        drawing_sheet(
            rows,
            self.context.workdir / self.sheet,
            title=self.title or "Drawings",
            texts=len(texts),
            note=self.note,
        )

    def describe(self, scores: Mapping[str, float]) -> str:
        """A table: how pictures were made, and how well they fit."""
        columns = ["CLIPScore", "shuffled/CLIPScore", "gain", "cosine", "R@1", "frechet"]
        made = [name[: -len("/R@1")] for name in scores if name.endswith("/R@1")]
        table = [["", *(name.replace("/CLIPScore", "") for name in columns)]]
        for name in made:
            cells = [_cell(scores, f"{name}/{column}") for column in columns]
            table.append([_shown(name), *cells])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(
                cell.rjust(width) if number else cell.ljust(width)
                for number, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in table
        ]
        return "\n".join(filter(None, (self.title, *lines, self.note)))


def _shown(made: str) -> str:
    return _SHOWN.get(made, made.replace("_", " "))


def _cell(scores: Mapping[str, float], name: str) -> str:
    if name not in scores:
        return ""
    share = name.endswith("/R@1")

    def number(name: str) -> str:
        return f"{100 * scores[name]:.1f}" if share else f"{scores[name]:.3f}"

    text = number(name) + "%" * share
    if f"{name}_low" in scores and not name.endswith(("cosine", "shuffled/CLIPScore")):
        text += f" [{number(f'{name}_low')}, {number(f'{name}_high')}]"
    return text
