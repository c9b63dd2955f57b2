"""Image-text retrieval, both ways, beside chance and beside a baseline that has learnt nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mmjax.data.image import denormalize
from mmjax.evaluate import sheets
from mmjax.evaluate.base import EVALUATORS, Evaluator
from mmjax.evaluate.baselines import PictureOfName
from mmjax.evaluate.context import Collected, EvalContext
from mmjax.evaluate.metrics import Score, cosine_scores, retrieval, retrieval_chance
from mmjax.params import Params

WAYS = {"text_to_image": "text -> image", "image_to_text": "image -> text"}


class _Side(NamedTuple):
    """Images or texts without repetition; the first `queries` of them are the ones asked about.

    Attributes:
      rows: the places of these among all collected rows.
      labels: what each is of.
    """

    rows: np.ndarray
    labels: np.ndarray
    queries: int


@EVALUATORS.register("retrieval")
class Retrieval(Evaluator):
    """Recall at k, mean and median rank, mAP of text -> image and image -> text.

    A candidate is right if its label is the query's, so that an image may have several texts and
    a text several images. Repeated images (one record for each caption) and repeated texts of one
    label count once. Without labels each record is a pair of its own.

        retrieval among the 200 held-out concepts:  queries=heldout
        ... with the seen ones as distractors:      queries=heldout, distractors=seen_views
        new views of seen concepts among all:       queries=seen_views, distractors=heldout

    Args:
      queries: a data config with image and text: each image asks for its texts, each text for its
        images.
      distractors: a data config whose images and texts are candidates beside the queries' own.
      reference: a data config of the training pictures and names, for the baseline "pixels" (see
        `mmjax.evaluate.baselines`); None leaves the baseline out. For small data: pixels of all
        images are held in memory.
      at: the k of recall at k.
      sheet: the file name of a picture of text queries and their top images, written to the work
        directory at each run; None writes none.
      sheet_rows: how many queries the picture shows.
      title: what the queries are, for the picture and the printed table.
      note: a line under both, e.g. `mmjax.evaluate.ICONS_NOTE`.
      context: of a model with `encode_image` and `encode_text`.
    """

    def __init__(
        self,
        *,
        queries: Mapping[str, Any],
        distractors: Mapping[str, Any] | None = None,
        reference: Mapping[str, Any] | None = None,
        at: Sequence[int] = (1, 5, 10),
        sheet: str | None = None,
        sheet_rows: int = 10,
        title: str = "",
        note: str = "",
        context: EvalContext,
    ):
        self._queries, self._distractors, self._reference = queries, distractors, reference
        self._at = tuple(at)
        self._sheet, self._sheet_rows = sheet, sheet_rows
        self._title, self._note = title, note
        self._context = context
        self._embed = context.compile(
            lambda model, batch: {
                "image": model.encode_image(batch["image"]),
                "text": model.encode_text(batch["text"], batch["text_mask"]),
            }
        )
        self._pixels = context.compile(lambda model, batch: batch["image"])
        # Chance and the baseline do not depend on the model: computed at the first run.
        self._beside: dict[str, float] | None = None

    def run(self, params: Params) -> dict[str, float]:
        """Scores by name, e.g. `text_to_image/R@1`, `chance/text_to_image/R@1`,
        `pixels/image_to_text/mAP`.

        Raises:
          ValueError: if data has no images or no texts, or only one of two data sets has labels.
        """
        found = self._collect(self._embed, params, self._data)
        images, texts = _sides(found)
        embedded = jax.tree.map(lambda *x: np.concatenate(x), *[part.outputs for part in found])
        of_image, of_text = embedded["image"][images.rows], embedded["text"][texts.rows]
        to_image = cosine_scores(of_text[: texts.queries], of_image)
        to_text = cosine_scores(of_image[: images.queries], of_text)
        scores = self._both_ways(to_image, to_text, images, texts)
        if self._beside is None:
            self._beside = self._chance(images, texts)
            if self._reference is not None:
                self._beside |= self._baseline(params, found, images, texts)
        if self._sheet is not None:
            self._draw(to_image, found, images, texts)
        return scores | self._beside

    @property
    def _data(self) -> list[Mapping[str, Any]]:
        return [data for data in (self._queries, self._distractors) if data is not None]

    def _collect(self, compiled, params, configs) -> list[Collected]:
        found = [self._context.collect(compiled, params, config) for config in configs]
        for part in found:
            if part.texts is None or part.images is None:
                raise ValueError(
                    "The evaluator 'retrieval' needs images and texts: set `image` and `text` in "
                    "the data configs of queries, distractors and reference."
                )
        return found

    def _both_ways(
        self, to_image: Score, to_text: Score, images: _Side, texts: _Side
    ) -> dict[str, float]:
        results = {
            "text_to_image": retrieval(
                to_image, texts.labels[: texts.queries], images.labels, at=self._at
            ),
            "image_to_text": retrieval(
                to_text, images.labels[: images.queries], texts.labels, at=self._at
            ),
        }
        return _flatten(results)

    def _chance(self, images: _Side, texts: _Side) -> dict[str, float]:
        results = {
            "chance/text_to_image": retrieval_chance(
                texts.labels[: texts.queries], images.labels, at=self._at
            ),
            "chance/image_to_text": retrieval_chance(
                images.labels[: images.queries], texts.labels, at=self._at
            ),
        }
        return _flatten(results)

    def _baseline(self, params, found, images: _Side, texts: _Side) -> dict[str, float]:
        (reference,) = self._collect(self._pixels, params, [self._reference])
        shown = self._collect(self._pixels, params, self._data)
        names = [text for part in found for text in part.texts]
        pictures = PictureOfName(
            pictures=reference.outputs,
            names=reference.texts,
            images=np.concatenate([part.outputs for part in shown])[images.rows],
            texts=[names[row] for row in texts.rows],
        )
        scores = self._both_ways(pictures.text_to_image, pictures.image_to_text, images, texts)
        return {
            f"pixels/{name}": value
            for name, value in scores.items()
            if not name.endswith(("/queries", "/candidates"))
        }

    def _draw(self, to_image: Score, found, images: _Side, texts: _Side) -> None:
        """The sheet: queries spread evenly over the list, so that nobody chose them."""
        asked = np.linspace(0, texts.queries - 1, min(self._sheet_rows, texts.queries))
        asked = np.unique(asked.round().astype(int))
        scores = np.stack([to_image(slice(q, q + 1))[0] for q in asked])
        right = texts.labels[asked, None] == images.labels[None]
        order = np.lexsort((right, -scores), axis=-1)
        top = order[:, : sheets.COLUMNS]
        best = np.array([row[right[i, row]][0] for i, row in enumerate(order)])
        shown = self._pictures(images.rows[np.unique(np.concatenate([top.ravel(), best]))], found)
        names = [text for part in found for text in part.texts]
        if jax.process_index() != 0:
            return
        rows = [
            sheets.Row(
                query=names[texts.rows[q]],
                images=[shown[images.rows[j]] for j in top[i]],
                scores=scores[i, top[i]].tolist(),
                right=right[i, top[i]].tolist(),
                answer=shown[images.rows[best[i]]],
                answer_rank=int(np.flatnonzero(order[i] == best[i])[0]) + 1,
                answer_score=float(scores[i, best[i]]),
            )
            for i, q in enumerate(asked)
        ]
        sheets.retrieval_sheet(
            rows,
            self._context.workdir / self._sheet,
            title=self._title or "Retrieval",
            candidates=len(images.labels),
            note=self._note,
        )

    def _pictures(self, rows: np.ndarray, found: list[Collected]) -> dict[int, np.ndarray]:
        """Display images [H, W, 3] uint8 by their place among all collected rows."""
        shown, start = {}, 0
        for config, part in zip(self._data, found, strict=True):
            wanted = [int(row) - start for row in rows if start <= row < start + len(part)]
            for row, image in self._context.pick(config, "image", wanted).items():
                shown[start + row] = denormalize(image, config["image"]["preset"])
            start += len(part)
        return shown

    def describe(self, scores: Mapping[str, float]) -> str:
        """A table: the model, the baseline and chance, both ways."""
        columns = [*(f"R@{k}" for k in self._at), "mAP", "mean_rank", "median_rank"]
        lines = [f"Retrieval: {self._title}"] if self._title else []
        for way, shown in WAYS.items():
            queries, candidates = scores[f"{way}/queries"], scores[f"{way}/candidates"]
            counts = f"{shown}: {queries:.0f} queries, {candidates:.0f} candidates"
            lines.append(f"{counts:<52}" + "".join(f"{c.replace('_', ' '):>13}" for c in columns))
            sources = {
                "model": "",
                "pixels (nearest seen picture)": "pixels/",
                "chance": "chance/",
            }
            for name, prefix in sources.items():
                if f"{prefix}{way}/R@{self._at[0]}" in scores:
                    cells = [
                        _cell(column, scores.get(f"{prefix}{way}/{column}")) for column in columns
                    ]
                    lines.append(f"  {name:<50}" + "".join(f"{cell:>13}" for cell in cells))
        return "\n".join([*lines, self._note] if self._note else lines)


def _cell(column: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1f}" if column.endswith("rank") else f"{100 * value:.1f}%"


def _flatten(results: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {f"{way}/{name}": x for way, scores in results.items() for name, x in scores.items()}


def _sides(found: list[Collected]) -> tuple[_Side, _Side]:
    """Images and texts without repetitions, the queries' own first."""
    sizes = [len(part) for part in found]
    if len({part.labels is None for part in found}) > 1:
        raise ValueError(
            "Of the queries and distractors of 'retrieval' only one has labels: set `label` in "
            "both data configs, or in neither."
        )
    if found[0].labels is None:
        labels = np.arange(sum(sizes))
    else:
        labels = np.concatenate([part.labels for part in found])

    def side(kind: str) -> _Side:
        keys = [key for part in found for key in getattr(part, kind)]
        first: dict[tuple[int, str], int] = {}
        for row, key in enumerate(zip(labels.tolist(), keys, strict=True)):
            first.setdefault(key, row)
        rows = np.array(sorted(first.values()))
        return _Side(rows, labels[rows], int(np.sum(rows < sizes[0])))

    return side("images"), side("texts")
