"""Images and texts as unit vectors of one space, by a model of two towers and its processor."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from mmjax.convert import ConversionError, from_pretrained, open_checkpoint
from mmjax.data.image import decode, flatten
from mmjax.data.image_processor import ImageInput
from mmjax.data.load_processor import load_processor
from mmjax.data.sources import existing
from mmjax.models import SigLIP
from mmjax.nn.partition import activation_sharding
from mmjax.params import merge, split
from mmjax.sharding import (
    MeshConfig,
    activation_constraint,
    batch_sharding,
    batch_shards,
    make_mesh,
    replicated,
)

_TOWERS = ("encode_image", "encode_text")
# Texts of models that do not pad to one length are padded to a power of two, so that few shapes
# are compiled.
_SHORTEST = 16
# Of a directory of Hugging Face format.
_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".safetensors"}
# A large file is known by its size and this many parts of it, evenly spread.
_SAMPLES, _SAMPLE_BYTES = 16, 2**16


class Embedder:
    """Compiled once for batches of `batch_size` (the last one is padded), once for single items.

    Args:
      model: with `encode_image` and `encode_text`: CLIP, SigLIP, AltCLIP and their like.
      processor: called like `mmjax.data.processor.Processor`, of the same model.
      batch_size: images, or texts, at a time; made a multiple of the devices.
      identity: a fingerprint of the model, for indices made with it.
      directory: where the model is, for messages and indices.

    All devices of this process take part, each with a share of the batch.
    """

    def __init__(
        self,
        model: nnx.Module,
        processor: Any,
        *,
        batch_size: int = 32,
        identity: str = "",
        directory: str | Path = "",
    ):
        check_towers(type(model), directory)
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: expected at least 1.")
        self.processor = processor
        self.identity = identity
        self.directory = str(directory)
        self.judges_alone = isinstance(model, SigLIP)
        self._mesh = make_mesh(MeshConfig())
        shards = batch_shards(self._mesh)
        self.batch_size = -(-batch_size // shards) * shards
        self._graph, params = split(model)
        self._params = jax.device_put(params, replicated(self._mesh))
        scale, bias = jax.jit(lambda params: merge(self._graph, params).scale_and_bias())(params)
        self.scale, self.bias = float(scale), float(bias)
        self._image = self._compile(lambda model, images: model.encode_image(images))
        self._text = self._compile(lambda model, batch: model.encode_text(*batch))

    @classmethod
    def load(cls, directory: str | Path, *, batch_size: int = 32, dtype: Any = None) -> Embedder:
        """The embedder of a model directory of Hugging Face format.

        Args:
          dtype: of the computation, see `mmjax.from_pretrained`.

        Raises:
          ConversionError: no checkpoint there, or one without an image and a text tower.
          ValueError: no processor there, or one that does not fit; see `load_processor`.
        """
        check_towers(open_checkpoint(directory).family.model, directory)
        processor = load_processor(directory)  # what is missing is said before weights are read
        parts = {"preprocessor_config.json": processor.images, "tokenizer": processor.tokenizer}
        for name, part in parts.items():
            if part is None:
                raise ConversionError(
                    f"{directory} lacks its {name}: copy it from where the weights come from."
                )
        return cls(
            from_pretrained(directory, dtype=dtype),
            processor,
            batch_size=batch_size,
            identity=fingerprint(directory),
            directory=Path(directory).absolute(),
        )

    def prepare(self, source: ImageInput) -> Any:
        """One image as the model takes it, [1, ...]: upright, transparency on white.

        Raises:
          CorruptImageError, OSError: it cannot be read.
        """
        if isinstance(source, str | Path):
            source = existing(source, "The image").read_bytes()
        return self.processor(images=flatten(decode(source)))["images"]

    def images(self, sources: Iterable[ImageInput]) -> np.ndarray:
        """[N, D] float32, unit norm: of paths, encoded bytes, PIL images or uint8 arrays."""
        return self.prepared_images([self.prepare(source) for source in sources])

    def prepared_images(self, prepared: Sequence[Any]) -> np.ndarray:
        """[N, D] float32, unit norm; of what `prepare` gave."""
        return self._rows(self._image, prepared)

    def texts(self, texts: Sequence[str], *, truncation: bool = False) -> np.ndarray:
        """[N, D] float32, unit norm.

        Args:
          truncation: cut texts that are too long, which are otherwise an error.

        Raises:
          ValueError: a text that is too long, or none.
        """
        options = {"truncation": truncation}
        batch = self.processor(text=list(texts), **options)
        length, limit = batch["tokens"].shape[1], self.processor.max_length
        room = max(_SHORTEST, 1 << (length - 1).bit_length())
        room = room if limit is None else min(room, limit)
        if length not in (room, limit):
            options |= {"padding": "max_length", "max_length": room}
            batch = self.processor(text=list(texts), **options)
        pairs = [(batch["tokens"][i : i + 1], batch["mask"][i : i + 1]) for i in range(len(texts))]
        return self._rows(self._text, pairs)

    def probabilities(self, images: np.ndarray, texts: np.ndarray) -> np.ndarray:
        """[I, T]: how well texts describe images, by the model's own loss.

        A softmax over the texts, or (SigLIP, `judges_alone`) a sigmoid for each pair.
        """
        logits = self.scale * (images.astype(np.float64) @ texts.T) + self.bias
        if self.judges_alone:
            return 1 / (1 + np.exp(-logits))
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        return exponentials / exponentials.sum(axis=1, keepdims=True)

    def _compile(self, function: Callable[[nnx.Module, Any], jax.Array]) -> Callable:
        def run(params, batch):
            with activation_sharding(activation_constraint(self._mesh)):
                return function(merge(self._graph, params), batch)

        return jax.jit(run, out_shardings=replicated(self._mesh))

    def _rows(self, function: Callable, items: Sequence[Any]) -> np.ndarray:
        if not items:
            raise ValueError("There is nothing to embed.")
        size = self.batch_size if len(items) > 1 else batch_shards(self._mesh)
        done, running = [], []
        for start in range(0, len(items), size):
            part = list(items[start : start + size])
            part += part[-1:] * (size - len(part))
            batch = jax.tree.map(lambda *rows: np.concatenate(rows), *part)
            batch = jax.device_put(batch, batch_sharding(self._mesh))
            running.append(function(self._params, batch))
            if len(running) > 1:  # one batch computes while the next is put together
                done.append(np.asarray(running.pop(0), np.float32))
        done += [np.asarray(rows, np.float32) for rows in running]
        return np.concatenate(done)[: len(items)]


def check_towers(model: type, directory: str | Path) -> None:
    """Raises ConversionError if a class of models does not embed both images and texts."""
    if not all(hasattr(model, tower) for tower in _TOWERS):
        raise ConversionError(
            f"{directory} holds a {model.__name__}, which does not put images and texts into one "
            "space: give a CLIP, SigLIP or AltCLIP model."
        )


def fingerprint(root: str | Path, paths: Iterable[Path] | None = None) -> str:
    """Identifies a model by its configuration, its processor and its weights.

    Small files count whole, large ones with their size and samples of their content, so that it
    takes no time; where the directory is does not matter.

    Args:
      root: the model's directory.
      paths: the files; by default those of a directory of Hugging Face format.
    """
    root, hashed = Path(root), hashlib.sha256()
    if paths is None:
        paths = (path for path in root.iterdir() if path.suffix in _SUFFIXES)
    for path in sorted(paths):
        size = path.stat().st_size
        hashed.update(f"{path.relative_to(root).as_posix()} {size}\n".encode())
        with open(path, "rb") as file:
            if size <= _SAMPLES * _SAMPLE_BYTES:
                hashed.update(file.read())
                continue
            for i in range(_SAMPLES):
                file.seek(i * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                hashed.update(file.read(_SAMPLE_BYTES))
    return hashed.hexdigest()[:32]
