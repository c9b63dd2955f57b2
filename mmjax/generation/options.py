"""Options of `Generator.__call__` become what programs take, once they are known to make sense."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.generation.beam import EARLY_STOPPING, Search
from mmjax.generation.sampling import Sampler
from mmjax.typing import Array


def check_length(valid: np.ndarray, least: int, new_tokens: int, limit: int | None) -> None:
    """Raises ValueError if there is no room for the new tokens, of which `least` are wanted."""
    if new_tokens < 1:
        raise ValueError(f"max_new_tokens={new_tokens} must be at least 1.")
    if not 0 <= least <= new_tokens:
        raise ValueError(f"min_new_tokens={least} must be from 0 to max_new_tokens={new_tokens}.")
    longest = int(valid.sum(axis=1).max())
    if limit is not None and longest + new_tokens > limit:
        raise ValueError(
            f"A prompt of {longest} tokens and max_new_tokens={new_tokens} exceed the model's "
            f"limit of {limit} positions: at most {max(limit - longest, 0)} tokens can follow."
        )


def end_tokens(eos_id: int | Sequence[int] | None, vocab_size: int) -> np.ndarray:
    """The end tokens [E], each once. None is none of them: unlike in transformers, which then takes
    the end tokens of the model's generation config, every row is as long as may be.

    Raises:
      ValueError: if one is outside of the vocabulary.
    """
    given = [] if eos_id is None else np.reshape(eos_id, -1).tolist()
    outside = [token for token in given if not 0 <= token < vocab_size]
    if outside:
        raise ValueError(f"eos_id={outside} is outside of a vocabulary of {vocab_size} tokens.")
    return np.array(list(dict.fromkeys(given)), np.int32)


def suppressed_tokens(suppress: Sequence[int] | None, vocab_size: int) -> np.ndarray | None:
    """[V], True at tokens that are never chosen; None if there are none of them.

    Raises:
      ValueError: if one is outside of the vocabulary, or nothing is left to choose from.
    """
    ids = np.reshape([] if suppress is None else suppress, -1)
    if not ids.size:
        return None
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(
            f"suppress has ids from {ids.min()} to {ids.max()}, but the vocabulary has "
            f"{vocab_size} tokens."
        )
    suppressed = np.zeros(vocab_size, bool)
    suppressed[ids] = True
    if suppressed.all():
        raise ValueError("suppress names every token: leave some to choose from.")
    return suppressed


def make_sampler(
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float | None,
    guidance: float | None,
    suppressed: np.ndarray | None,
) -> Sampler:
    """Raises ValueError on values that mean nothing, and options of sampling without sampling."""
    drawn = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    given = [name for name, value in drawn.items() if value is not None]
    if not temperature >= 0:
        raise ValueError(f"temperature={temperature} must be 0 (the most probable token) or above.")
    if temperature == 0 and given:
        raise ValueError(
            f"{', '.join(given)} choose from what is drawn, but temperature=0 takes the most "
            "probable token: give a temperature, such as 1.0."
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1.")
    for name, value in (("top_p", top_p), ("min_p", min_p)):
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{name}={value} is a probability: from 0 to 1.")
    if repetition_penalty is not None and not repetition_penalty > 0:
        raise ValueError(f"repetition_penalty={repetition_penalty} must be above 0 (1: none).")
    if guidance is not None and not np.isfinite(guidance):
        raise ValueError(f"guidance={guidance} must be a number (1: none).")

    def number(value: float | None) -> np.float32 | None:
        return None if value is None else np.float32(value)

    return Sampler(
        temperature=number(temperature or None),
        top_p=number(top_p),
        min_p=number(min_p),
        repetition_penalty=number(repetition_penalty),
        guidance=None if guidance == 1 else number(guidance),
        suppressed=suppressed,
        top_k=top_k,
    )


def make_search(
    num_beams: int, length_penalty: float, early_stopping: bool | str, new_tokens: int
) -> Search:
    if num_beams < 1:
        raise ValueError(f"num_beams={num_beams} must be at least 1.")
    if early_stopping not in EARLY_STOPPING:
        raise ValueError(f"early_stopping={early_stopping!r} must be one of {EARLY_STOPPING}.")
    return Search(
        length_penalty=np.float32(length_penalty),
        steps=np.int32(new_tokens),
        beams=num_beams,
        early_stopping=early_stopping if early_stopping == "never" else bool(early_stopping),
    )


def row_keys(key: Array | None, rows: int) -> Array:
    """A key for each row.

    Raises:
      ValueError: if there is no key, something else than one, or a number of keys that is not the
        number of rows.
    """
    if key is None:
        raise ValueError("temperature above 0 draws tokens: give key=jax.random.key(0).")
    if not isinstance(key, jax.Array | np.ndarray) or not (
        jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.dtype == np.uint32
    ):
        raise ValueError(f"key={key!r} is no random key: give key=jax.random.key(0).")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.ndim == 0:
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))
    if key.shape != (rows,):
        raise ValueError(
            f"key has shape {key.shape}: give one key, or one for each of {rows} rows."
        )
    return key
