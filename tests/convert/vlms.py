"""One comparison for all vision-language models: logits, generation, round trips."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import parity
from towers import QUICK, long, same_files, saved_without_origin

import mmjax.convert
from mmjax import params
from mmjax.data.visual import TEXT, Plan
from mmjax.models import VLMConfig

VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 24,
    "patch_size": 8,
}
# Of Llama and its like.
LANGUAGE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
IMAGE_TOKEN = 49
# An image of one picture, in the rows of a `stream`.
IMAGE = "image"
# Rows of unequal length, with one image, two (one of them first), and none.
ROWS = ([3, IMAGE, 4], [IMAGE, 2, IMAGE, 5], [6])
NEW_TOKENS = 6


class Stream(NamedTuple):
    """Rows of text and images, padded on the left.

    Attributes:
      tokens, mask, place: [B, T]; see `VLM.run`.
      images: [B, I, H, W, C]; rows with fewer pictures end with some of zeros.
      pictures: [P, H, W, C] of each image, row after row.
    """

    tokens: np.ndarray
    mask: np.ndarray
    place: np.ndarray
    images: np.ndarray
    pictures: list[np.ndarray]

    @property
    def theirs(self) -> dict[str, Any]:
        """What models of transformers are called with, of which each image is one picture."""
        import torch

        pixels = np.concatenate(self.pictures).transpose(0, 3, 1, 2)
        return {
            "input_ids": long(self.tokens),
            "attention_mask": long(self.mask),
            "pixel_values": torch.tensor(pixels),
        }


def stream(config: VLMConfig, rows: Sequence[Sequence[int | str | Plan]], seed=0) -> Stream:
    """Random text and images.

    Args:
      rows: of each row what stands in it: a number of random tokens, `IMAGE`, or the plan of an
        image.
    """
    rng = np.random.default_rng(seed)
    size = config.encoder.image_size
    shape = (size, size, config.encoder.channels)
    whole = Plan(1, (np.arange(config.image_tokens),))
    laid, pictures, images = [], [], []
    for row in rows:
        tokens, places, mine = [], [], []
        for item in row:
            if isinstance(item, int):
                top = min(config.image_token, config.vocab_size)
                tokens += rng.integers(3, top, item).tolist()
                places += [TEXT] * item
                continue
            plan = whole if item == IMAGE else item
            place = np.concatenate(plan.pieces)
            before = sum(map(len, mine)) * config.places
            places += np.where(place < 0, place, place + before).tolist()
            tokens += [config.image_token] * len(place)
            mine.append(rng.normal(size=(plan.pictures, *shape)).astype(np.float32))
        laid.append((tokens, places))
        pictures += mine
        images.append(np.concatenate([np.zeros((0, *shape), np.float32), *mine]))
    length, count = max(len(tokens) for tokens, _ in laid), max(map(len, images))
    out = Stream(
        np.zeros((len(rows), length), np.int32),
        np.zeros((len(rows), length), bool),
        np.full((len(rows), length), TEXT, np.int32),
        np.zeros((len(rows), count, *shape), np.float32),
        pictures,
    )
    for index, (tokens, places) in enumerate(laid):
        start = length - len(tokens)
        out.tokens[index, start:], out.place[index, start:] = tokens, places
        out.mask[index, start:] = True
        out.images[index, : len(images[index])] = images[index]
    return out


def check(
    reference: Any,
    directory: Any,
    rows: Sequence[Sequence[int | str | Plan]] = ROWS,
    theirs: Callable[[Stream], dict[str, Any]] = lambda stream: stream.theirs,
    derived: bool = True,
    origin: bool = True,
    batch: Stream | None = None,
    generator: bool = False,
) -> None:
    """Everything that a family must show for one config.

    Args:
      reference: a model of transformers, which is given random weights.
      directory: a scratch directory.
      rows: see `stream`.
      theirs: what the reference is called with.
      batch: instead of what `stream` makes of the rows.
      generator: whether it is `mmjax.generate` that generates, which takes longer to compile.
      derived: whether places are left to the model where logits are compared.
      origin: whether the round trip is that of a model that knows where it came from.
    """
    import torch

    family = type(reference).__name__
    source = parity.save_hf(reference, directory / "source")
    model = mmjax.convert.from_pretrained(source)
    config = model.config
    batch = stream(config, rows) if batch is None else batch
    inputs = theirs(batch)
    given, decoder, where = {}, {}, batch.mask
    if model.encoder_decoder:
        tokens = np.random.default_rng(1).integers(0, config.vocab_size, (len(rows), 5))
        given, decoder = {"decoder_tokens": tokens}, {"decoder_input_ids": long(tokens)}
        where = np.ones(tokens.shape, bool)
    with torch.no_grad():
        expected = reference(**inputs, **decoder).logits
        written = reference.generate(
            **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
        )
    place = None if derived else batch.place
    logits = forward(model, batch.tokens, batch.images, batch.mask, place=place, **given)
    parity.close(family, "logits", logits, expected, where)
    parity.same_argmax(logits, expected, where)
    ours = (_generate if generator else greedy)(model, batch)
    np.testing.assert_array_equal(ours, written[:, -NEW_TOKENS:])
    if origin:
        call = lambda model: model(**inputs, **decoder).logits  # noqa: E731
        parity.check_round_trip(source, directory / "target", call)
        same_files(source, directory / "target")
    else:
        saved_without_origin(model, source, directory / "target")


def forward(model, *inputs, **options) -> jax.Array:
    """One call of the model, compiled without much optimisation."""
    graph, arrays = params.split(model)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(arrays, inputs, options):
        return params.merge(graph, arrays)(*inputs, **options)

    return run(arrays, inputs, options)


def _generate(model, batch: Stream) -> np.ndarray:
    return mmjax.generate(
        model,
        batch.tokens,
        batch.images,
        batch.mask,
        place=batch.place,
        max_new_tokens=NEW_TOKENS,
    )


def greedy(model, batch: Stream) -> np.ndarray:
    """The most probable tokens [B, N] that follow."""
    graph, arrays = params.split(model)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(arrays, batch):
        model = params.merge(graph, arrays)
        length = batch.tokens.shape[1] + NEW_TOKENS
        logits, cache = model.prefill(
            batch.tokens, batch.mask, length=length, images=batch.images, place=batch.place
        )

        def step(carry, _):
            logits, cache = carry
            token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            return model.step(token, cache), token

        return jax.lax.scan(step, (logits, cache), length=NEW_TOKENS)[1].T

    return run(arrays, batch._replace(pictures=[]))
