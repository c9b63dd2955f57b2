"""What every evaluator needs: data on the mesh, compiled model functions, results on the host."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from mmjax.evaluate.support import Support, open_support
from mmjax.nn.partition import activation_sharding
from mmjax.params import Params, merge
from mmjax.registry import Registry
from mmjax.sharding import activation_constraint, batch_shards, global_batch, replicated

ModelFunction = Callable[[nnx.Module, dict[str, jax.Array]], Any]
Compiled = Callable[[Params, dict[str, jax.Array]], Any]

# Arrays that are added to a batch: not padding; place of the row among all processes' rows.
VALID, ORIGIN = "valid", "origin"


class EvalBatch(NamedTuple):
    """A batch of fixed size, the last one padded.

    Attributes:
      arrays: global arrays, sharded over the batch. `valid` among them: bool, False for padding.
      valid: bool, the rows of this process.
      texts: the raw texts of this process's rows, or None where the data has no text.
    """

    arrays: dict[str, jax.Array]
    valid: np.ndarray
    texts: list[str] | None


@dataclasses.dataclass(frozen=True)
class Collected:
    """Outputs for a whole data set, on the host, padding dropped, the same on all processes.

    Attributes:
      outputs: pytree of [N, ...] arrays.
      labels: [N] int32, or None where the data has no label.
      texts: N raw texts, or None where the data has no text.
      images: N hashes of the preprocessed images, or None where the data has no image.
    """

    outputs: Any
    labels: np.ndarray | None
    texts: list[str] | None
    images: list[str] | None

    def __len__(self) -> int:
        return len(jax.tree.leaves(self.outputs)[0])


@dataclasses.dataclass(frozen=True)
class EvalContext:
    """Where evaluators run.

    Attributes:
      graphdef: the model's structure.
      mesh: where parameters and batches lie.
      task: the task being trained, for evaluators of its loss.
      tokenizer: of the run, or None.
      workdir: pictures are written here.
      batch_size: global; data is padded to a multiple of it.
      open_data: `(data_config, tokenizer, *, batch_size, process_index, process_count)` -> iterable
        over batches with `arrays`, `valid` and `texts`; normally `mmjax.data.open_eval`.
      open_questions: `(data_config, tokenizer, *, limit)` -> iterable over
        `mmjax.data.questions.Question`, on every process; normally `mmjax.data.open_questions`.
      open_support: see `mmjax.evaluate.support.open_support`.

    Raises:
      ValueError: if the batch size does not divide over the mesh and the processes.
    """

    graphdef: nnx.GraphDef
    mesh: Mesh
    task: Any
    tokenizer: Any
    workdir: Path
    batch_size: int
    open_data: Callable[..., Iterable]
    open_questions: Callable[..., Iterable]
    open_support: Callable[..., Support] = open_support

    def __post_init__(self):
        for parts, what in (
            (batch_shards(self.mesh), "shards"),
            (jax.process_count(), "processes"),
        ):
            if self.batch_size < 1 or self.batch_size % parts:
                raise ValueError(
                    f"An evaluation batch of {self.batch_size} does not divide over {parts} "
                    f"{what}: make it a multiple of {parts}."
                )

    def batches(self, data_config: Mapping[str, Any]) -> Iterator[EvalBatch]:
        """The whole data set, in a fixed order, each process reading its part."""
        for batch in self.open(data_config):
            valid = np.asarray(batch.valid, bool)
            arrays = global_batch({**batch.arrays, VALID: valid}, self.mesh)
            yield EvalBatch(arrays, valid, batch.texts)

    def open(self, data_config: Mapping[str, Any]) -> Iterable:
        """This process's part of a data set."""
        return self.open_data(
            data_config,
            self.tokenizer,
            batch_size=self.batch_size // jax.process_count(),
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def compile(self, function: ModelFunction) -> Compiled:
        """`function(model, batch)` as a compiled `(params, batch) -> outputs on every device`.

        Compile when the evaluator is made, not when it runs: all batches have one shape.
        """

        def run(params, batch):
            with activation_sharding(activation_constraint(self.mesh)):
                return function(merge(self.graphdef, params), _Fields(batch))

        return jax.jit(run, out_shardings=replicated(self.mesh))

    def gather(self, x: np.ndarray) -> np.ndarray:
        """Rows of all processes, [processes * rows, ...], on every process."""
        if jax.process_count() == 1:
            return np.asarray(x)
        return multihost_utils.process_allgather(np.asarray(x), tiled=True)

    def collect(
        self, compiled: Compiled, params: Params, data_config: Mapping[str, Any]
    ) -> Collected:
        """Run a compiled function over a data set.

        Args:
          compiled: from `compile`; its outputs are [B, ...].
          params: the model's parameters by path.
          data_config: like config.data.train.

        Raises:
          ValueError: if the data set is empty.
        """
        rows, texts, images = [], [], []
        for batch in self.open(data_config):
            # Which process a row of a global array comes from depends on the mesh: rows carry it.
            count = len(batch.valid)
            origin = np.arange(count, dtype=np.int32) + count * jax.process_index()
            local = {**batch.arrays, VALID: np.asarray(batch.valid, bool), ORIGIN: origin}
            arrays = global_batch(local, self.mesh)
            outputs = compiled(params, {k: v for k, v in arrays.items() if k != ORIGIN})
            beside = {k: arrays[k] for k in (VALID, ORIGIN, "label") if k in arrays}
            outputs, beside = jax.device_get((outputs, _replicate(self.mesh)(beside)))
            valid = beside.pop(VALID)
            origins = beside.pop(ORIGIN)[valid]
            rows.append(jax.tree.map(lambda x, valid=valid: x[valid], (outputs, beside)))
            if batch.texts is not None:
                texts += self._strings(batch.texts, origins)
            if "image" in batch.arrays:
                hashes = [hashlib.blake2b(x, digest_size=16).hexdigest() for x in local["image"]]
                images += self._strings(hashes, origins)
        if not sum(len(jax.tree.leaves(part)[0]) for part in rows):
            raise ValueError(
                f"The data to evaluate on is empty: {dict(data_config)}. Check its sources and "
                "splits, or leave this evaluation out of config.evals."
            )
        outputs, beside = jax.tree.map(lambda *parts: np.concatenate(parts), *rows)
        return Collected(outputs, beside.get("label"), texts or None, images or None)

    def pick(
        self, data_config: Mapping[str, Any], field: str, rows: Sequence[int]
    ) -> dict[int, np.ndarray]:
        """An array field of a few rows of a data set, numbered as `collect` orders them."""
        wanted, start, found = set(rows), 0, {}
        for batch in self.batches(data_config):
            kept = _replicate(self.mesh)({k: batch.arrays[k] for k in (field, VALID)})
            kept = jax.device_get(kept)
            here = kept[field][kept[VALID]]
            found |= {i: here[i - start] for i in wanted if start <= i < start + len(here)}
            start += len(here)
        return found

    def _strings(self, texts: Sequence[str], origins: np.ndarray) -> list[str]:
        """Of the strings of all processes those that `origins` numbers."""
        if jax.process_count() > 1:
            encoded = [text.encode() for text in texts]
            longest = int(self.gather(np.array([max(map(len, encoded))])).max())
            # Each row: four bytes of length, then the text, filled up with zeros.
            padded = [
                len(text).to_bytes(4, "little") + text.ljust(longest, b"\0") for text in encoded
            ]
            table = self.gather(np.stack([np.frombuffer(row, np.uint8) for row in padded]))
            texts = [
                row[4 : 4 + int.from_bytes(row[:4].tobytes(), "little")].tobytes().decode()
                for row in table
            ]
        return [texts[index] for index in origins]


class _Fields(dict):
    """A batch that says which field of the data config is missing."""

    def __missing__(self, name: str):
        raise ValueError(
            f"The evaluation needs {name!r}, but its data has only {', '.join(sorted(self))}: set "
            f"`{name.removesuffix('_mask')}` in its data config."
        )


def required(output: Any, what: str) -> Any:
    """An output of a model that not every model has.

    Raises:
      ValueError: if it is None.
    """
    if output is None:
        raise ValueError(
            f"The model has no {what}, which this evaluation needs: change config.model, or leave "
            "the evaluation out of config.evals."
        )
    return output


@functools.cache
def _replicate(mesh: Mesh) -> Callable[[Any], Any]:
    return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))


# How features of images are taken from a model: (model, batch) -> [B, D].
FEATURES: Registry[ModelFunction] = Registry("kind of image features")
# CLIP's and SigLIP's, after the projection, unit norm.
FEATURES.register("embedding")(lambda model, batch: model.encode_image(batch["image"]))
# Those of the image tower of CLIP or SigLIP, before the projection.
FEATURES.register("image_tower")(
    lambda model, batch: required(model.image(batch["image"]).pooled, "pooled features")
)
# A ViT's.
FEATURES.register("pooled")(
    lambda model, batch: required(model(batch["image"]).pooled, "pooled features")
)
