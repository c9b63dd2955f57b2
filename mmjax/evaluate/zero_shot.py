"""Zero-shot classification by class names (Radford et al. 2021, arXiv:2103.00020, section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mmjax.evaluate.base import EVALUATORS, Evaluator
from mmjax.evaluate.classification import require_labels
from mmjax.evaluate.context import EvalContext
from mmjax.evaluate.metrics import cosine_scores, slices, top_k
from mmjax.evaluate.prompts import class_names, templates
from mmjax.params import Params
from mmjax.sharding import global_batch


def mean_prompts(embeddings: np.ndarray, classes: int) -> np.ndarray:
    """[classes, D], unit norm: the mean of the embeddings of each class's prompts.

    Args:
      embeddings: [classes * prompts, D], unit norm; the prompts of one class stand together.
    """
    means = embeddings.reshape(classes, -1, embeddings.shape[-1]).mean(axis=1)
    return means / np.maximum(np.linalg.norm(means, axis=-1, keepdims=True), 1e-12)


@EVALUATORS.register("zero_shot")
class ZeroShot(Evaluator):
    """Images are classified by the text embedding nearest to them, one for each class.

    A class's embedding is the mean of the unit-norm embeddings of its prompts, made unit norm.

    Args:
      data: a data config with `label`, the index into the class names.
      classes: class names; see `mmjax.evaluate.prompts.class_names`.
      prompts: templates; see `mmjax.evaluate.prompts.templates`.
      max_len: tokens of a prompt, as in training.
      context: of a model with `encode_image` and `encode_text`, and a tokenizer.

    Raises:
      ValueError: if the run has no tokenizer, or prompts do not fit into max_len.
    """

    def __init__(
        self,
        *,
        data: Mapping[str, Any],
        classes: str | Sequence[str],
        prompts: str | Sequence[str],
        max_len: int,
        context: EvalContext,
    ):
        if context.tokenizer is None:
            raise ValueError(
                "The evaluator 'zero_shot' needs a tokenizer: set config.data.tokenizer."
            )
        self._data, self._context = data, context
        self._names, patterns = class_names(classes), templates(prompts)
        texts = [pattern.format(name) for name in self._names for pattern in patterns]
        encoded = context.tokenizer.encode(texts, max_len)
        if encoded.truncated:
            raise ValueError(
                f"{encoded.truncated} of {len(texts)} prompts are longer than {max_len} tokens: "
                "raise the evaluator's max_len, or choose shorter templates."
            )
        self._tokens, self._mask = encoded.ids, encoded.mask
        self._image = context.compile(lambda model, batch: model.encode_image(batch["image"]))
        self._text = context.compile(
            lambda model, batch: model.encode_text(batch["text"], batch["text_mask"])
        )

    def class_embeddings(self, params: Params) -> np.ndarray:
        """[classes, D], unit norm, float32."""
        context = self._context
        rows = []
        for part in slices(len(self._tokens), context.batch_size):
            # Every process holds all prompts and places those of its devices.
            missing = context.batch_size - (part.stop - part.start)
            batch = {
                "text": np.pad(self._tokens[part], ((0, missing), (0, 0)), mode="edge"),
                "text_mask": np.pad(self._mask[part], ((0, missing), (0, 0)), mode="edge"),
            }
            mine = context.batch_size // jax.process_count()
            first = mine * jax.process_index()
            batch = {name: x[first : first + mine] for name, x in batch.items()}
            encoded = self._text(params, global_batch(batch, context.mesh))
            rows.append(np.asarray(jax.device_get(encoded), np.float32)[: part.stop - part.start])
        return mean_prompts(np.concatenate(rows), len(self._names))

    def run(self, params: Params) -> dict[str, float]:
        """`top1`, `top5` (where there are more than 5 classes), `examples`, `chance/top1`.

        Raises:
          ValueError: if the data has no labels.
        """
        classes = self.class_embeddings(params)
        images = self._context.collect(self._image, params, self._data)
        labels = require_labels(images.labels, "zero_shot")
        logits = cosine_scores(images.outputs, classes)(slice(None))
        return top_k(logits, labels) | {
            "examples": float(len(labels)),
            "chance/top1": 1.0 / len(self._names),
        }
