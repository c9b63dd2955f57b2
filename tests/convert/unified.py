"""One comparison for all models of one stream of text and image codes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import parity
from towers import QUICK, long, quick, same_files, saved_without_origin
from vlms import IMAGE, NEW_TOKENS, Stream, greedy

import mmjax.convert
from mmjax import params
from mmjax.data.visual import TEXT
from mmjax.models import Unified, UnifiedConfig, UnifiedOutput

# Rows of unequal length, with one image, two (one after the other), and none.
ROWS = ([3, IMAGE, 4], [1, IMAGE, IMAGE, 2], [6])


def stream(
    config: UnifiedConfig,
    rows: Sequence[Sequence[int | str]] = ROWS,
    *,
    size: tuple[int, int],
    words: tuple[int, int],
    seed: int = 0,
) -> Stream:
    """Random text and images, padded on the left.

    Args:
      rows: of each row what stands in it: a number of random tokens, or `IMAGE`.
      size: of the images, (height, width).
      words: the ids of text are from the first to before the second.
    """
    rng = np.random.default_rng(seed)
    image, factor = config.image, config.image.tokenizer.factor
    count = size[0] // factor * (size[1] // factor + (image.row is not None))
    before, after = [image.begin], [image.end]
    laid = []
    for row in rows:
        tokens = []
        for item in row:
            if item == IMAGE:
                tokens += before + [config.image_token] * count + after
            else:
                tokens += rng.integers(*words, item).tolist()
        laid.append(tokens)
    length = max(map(len, laid))
    images = max(sum(item == IMAGE for item in row) for row in rows)
    tokens = np.zeros((len(rows), length), np.int32)
    mask = np.zeros(tokens.shape, bool)
    pixels = np.zeros((len(rows), images, *size, image.tokenizer.channels), np.float32)
    pictures = []
    for index, row in enumerate(laid):
        tokens[index, length - len(row) :], mask[index, length - len(row) :] = row, True
        mine = sum(item == IMAGE for item in rows[index])
        pixels[index, :mine] = rng.normal(size=(mine, *pixels.shape[2:]))
        pictures.append(pixels[index, :mine])
    here = mask & (tokens == config.image_token)
    place = np.where(here, np.cumsum(here, axis=1) - 1, TEXT).astype(np.int32)
    return Stream(tokens, mask, place, pixels, pictures)


def check(
    reference: Any,
    directory: Any,
    batch: Callable[[UnifiedConfig], Stream],
    ids: Callable[[dict[str, Any]], Any],
    extra: Callable[[Stream], dict[str, Any]] = lambda batch: {},
    *,
    derived: bool = True,
    generator: bool = False,
    gradients: bool = False,
    origin: bool = True,
) -> None:
    """Everything that a family must show for one config: ids of codes, logits, tokens that are
    written, gradients, round trips.

    Args:
      reference: a model of transformers, which is given random weights.
      directory: a scratch directory.
      batch: our config -> what both are given.
      ids: what the reference is called with -> its ids of the images, one after the other.
      extra: what the reference is given besides.
      derived: whether places are left to the model where logits are compared.
      generator: whether it is `mmjax.generate` that generates, which takes longer to compile.
      gradients: whether to compare those too.
      origin: whether the round trip is that of a model that knows where it came from.
    """
    import torch

    family = type(reference).__name__
    source = parity.save_hf(reference, directory / "source")
    loaded = mmjax.convert.from_pretrained(source)
    given = batch(loaded.config)
    model = loaded.sized(*given.images.shape[2:4])
    inputs = given.theirs | extra(given)
    with torch.no_grad():
        expected = reference(**inputs).logits
        codes = np.array(ids(inputs)).reshape(-1)
        written = reference.generate(
            **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, eos_token_id=None
        )
    place = None if derived else given.place
    out = quick(model, given.tokens, given.images, given.mask, place, function=_run)
    np.testing.assert_array_equal(out.tokens[given.place >= 0], codes)
    assert len(np.unique(codes)) > 3, "ids that are all the same show nothing"
    parity.close(family, "logits", out.logits, expected, given.mask)
    parity.same_argmax(out.logits, expected, given.mask)
    np.testing.assert_array_equal(
        (_generate if generator else greedy)(model, given), written[:, -NEW_TOKENS:]
    )
    if gradients:
        check_gradients(family, reference, model, given, inputs)
    if origin:
        call = lambda model: model(**inputs).logits  # noqa: E731
        parity.check_round_trip(source, directory / "target", call)
        same_files(source, directory / "target")
    else:
        saved_without_origin(loaded, source, directory / "target")
        again = mmjax.convert.from_pretrained(directory / "target")
        assert again.config == loaded.config


def check_gradients(
    family: str, reference: Any, model: Any, given: Stream, inputs: dict[str, Any]
) -> None:
    """Of a random sum of all logits that are not masked."""
    import torch

    theirs = reference(**inputs).logits
    counts = given.mask[..., None] & (theirs.detach().numpy() > np.finfo(np.float32).min)
    weights = np.random.default_rng(1).normal(size=theirs.shape).astype(np.float32) * counts
    torch.where(torch.tensor(counts), theirs * torch.tensor(weights), 0.0).sum().backward()
    graph, arrays = params.split(model)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def slopes(arrays, tokens, images, mask):
        def loss(arrays):
            logits = params.merge(graph, arrays)(tokens, images, mask)
            return jnp.sum(jnp.where(counts, logits * weights, 0.0))

        return jax.grad(loss)(arrays)

    found = slopes(arrays, given.tokens, given.images, given.mask)
    parity.check_gradients(family, model, found, reference)


def _run(model: Unified, tokens: Any, images: Any, mask: Any, place: Any) -> UnifiedOutput:
    return model.run(tokens, images, mask, place=place)


def _generate(model: Any, batch: Stream) -> np.ndarray:
    return mmjax.generate(
        model,
        batch.tokens,
        batch.images,
        batch.mask,
        place=batch.place,
        max_new_tokens=NEW_TOKENS,
    )


def sizes(batch: Stream) -> dict[str, Any]:
    """Of each picture, as Emu3 is told."""
    return {"image_sizes": long([one.shape[:2] for one in np.concatenate(batch.pictures)])}
