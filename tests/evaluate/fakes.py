"""A model and a data loader of a few lines; `python fakes.py` is one of two processes."""

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mmjax.evaluate import EvalContext
from mmjax.params import split

VOCABULARY, SIZE = 32, 4


class Towers(nnx.Module):
    """Images and texts whose tokens are c are embedded alike if the parameters are `aligned`."""

    def __init__(self, aligned: bool):
        table = np.random.default_rng(0).normal(size=(VOCABULARY, SIZE * SIZE * 3))
        self.table = nnx.Param(jnp.asarray(table, jnp.float32))
        self.gain = nnx.Param(jnp.float32(aligned))

    def encode_image(self, images, *, rng=None):
        flat = images.reshape(len(images), -1) + (1 - self.gain[...])
        return flat / jnp.linalg.norm(flat, axis=-1, keepdims=True)

    def encode_text(self, tokens, mask=None, *, rng=None):
        embedded = self.table[...][tokens]
        weights = mask[..., None] / jnp.maximum(mask.sum(-1)[:, None, None], 1)
        return self.encode_image(jnp.sum(embedded * weights, axis=1))

    def __call__(self, images):
        logits = images.reshape(len(images), -1) @ self.table[...].T
        return SimpleNamespace(logits=logits, pooled=self.encode_image(images))


def pixels_of(concepts, noise=0.0, seed=1):
    """Images [N, SIZE, SIZE, 3] of concepts, which are tokens of the vocabulary."""
    table = np.asarray(Towers(True).table[...])
    images = table[np.asarray(concepts)].reshape(-1, SIZE, SIZE, 3)
    return images + noise * np.random.default_rng(seed).normal(size=images.shape).astype(np.float32)


@dataclasses.dataclass
class FakeBatch:
    arrays: dict
    valid: np.ndarray
    texts: list | None


class Tokenizer:
    """The word "w7" is token 7."""

    def encode(self, texts, max_len):
        ids, mask = np.zeros((len(texts), max_len), np.int32), np.zeros((len(texts), max_len), bool)
        truncated = 0
        for row, text in enumerate(texts):
            tokens = [int(word.strip("w.")) for word in text.split() if word.strip("w.").isdigit()]
            truncated += len(tokens) > max_len
            ids[row, : len(tokens)] = tokens[:max_len]
            mask[row, : len(tokens)] = True
        return SimpleNamespace(ids=ids, mask=mask, truncated=truncated)


def data(concepts, images=None, texts=True, labels=True):
    """A data config: in these tests it holds the examples themselves."""
    images = pixels_of(concepts) if images is None else images
    names = [f"w{concept}" for concept in concepts]
    return {
        "image": {"preset": "siglip"},
        "examples": {
            "image": images,
            **({"text": names} if texts is True else {"text": texts} if texts else {}),
            **({"label": np.asarray(concepts, np.int32)} if labels else {}),
        },
    }


def open_data(config, tokenizer, *, batch_size, process_index, process_count):
    """As mmjax.data.open_eval: the processes take turns of batch_size rows; the last are padded."""
    examples = config["examples"]
    total = len(examples["image"])
    stride = batch_size * process_count
    for first in range(0, total, stride):
        rows = np.arange(batch_size) + first + batch_size * process_index
        valid = rows < total
        rows = np.minimum(rows, total - 1)
        arrays = {"image": np.asarray(examples["image"], np.float32)[rows]}
        if "label" in examples:
            arrays["label"] = examples["label"][rows]
        texts = None
        if "text" in examples:
            texts = [examples["text"][i] if ok else "" for i, ok in zip(rows, valid, strict=True)]
            encoded = tokenizer.encode(texts, 3)
            arrays |= {"text": encoded.ids, "text_mask": encoded.mask}
        yield FakeBatch(arrays, valid, texts)


def make_context(workdir, *, devices=1, batch_size=8, aligned=True, task=None):
    """(context, params) of the fake model."""
    graphdef, params = split(Towers(aligned))
    grid = np.array(jax.devices()[:devices]).reshape(-1, 1, 1)
    context = EvalContext(
        graphdef=graphdef,
        mesh=Mesh(grid, ("data", "fsdp", "tensor")),
        task=task,
        tokenizer=Tokenizer(),
        workdir=Path(workdir),
        batch_size=batch_size,
        open_data=open_data,
        open_questions=lambda *_, **__: (),
    )
    return context, params


def retrieval_scores(context, params):
    """A small retrieval with distractors, noise and the baseline."""
    from mmjax.evaluate import make_evaluator

    config = dict(
        name="retrieval",
        queries=data(range(11), images=pixels_of(range(11), noise=2.0)),
        distractors=data(range(11, 20)),
        reference=data(range(11), images=pixels_of(range(11), noise=1.0, seed=2)),
    )
    return make_evaluator(config, context, "config.evals.fake").run(params)


def main(process: int, port: int, workdir: str) -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=process)
    context, params = make_context(workdir, devices=4)
    # Parameters of all processes as one global array each.
    from mmjax.sharding import place_like_sharding, replicated

    params = place_like_sharding(params, jax.tree.map(lambda _: replicated(context.mesh), params))
    scores = retrieval_scores(context, params)
    if process == 1:
        Path(workdir, "scores.json").write_text(json.dumps(scores))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
