"""Beam search, token for token that of `transformers` (`GenerationMixin._beam_search`).

Each row has `beams` running texts and as many finished ones. A step extends every running text by
every token and takes the best candidates: enough of them that after those which end here there are
still `beams` to go on with. Candidates that end replace finished texts with lower scores, where a
score is the sum of log probabilities over length ** length_penalty. Only the best `beams`
candidates may finish.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mmjax.generation.sampling import Number, Sampler, mark
from mmjax.typing import Array, Bool, Float, Int

# What is added to a log probability so that no real one is below it, as in the reference.
NEVER = -1e9

EARLY_STOPPING = (False, True, "never")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Search:
    """Options of the search.

    Attributes:
      length_penalty: exponent of the length by which scores are divided; above 0 longer texts win.
      steps: the most new tokens.
      beams: running texts per row.
      early_stopping: True: a row ends with `beams` finished texts. False: it ends when the best
        running one, were it to end now, would not beat the worst finished one. "never": the same
        with the score it could reach at full length.
    """

    length_penalty: Number
    steps: Number
    beams: int = dataclasses.field(metadata={"static": True})
    early_stopping: bool | str = dataclasses.field(metadata={"static": True})


class Beams(NamedTuple):
    """The state between steps. R = rows x beams running texts.

    Attributes:
      cache: of the R running texts.
      seen: [R, V], tokens that were there before, or None.
      step: number of tokens chosen.
      running: [B, beams, S], tokens of the running texts.
      running_scores: [B, beams], their log probabilities.
      finished: [B, beams, S], tokens of the finished texts, best first.
      scores, lengths, ended: [B, beams] of the finished texts; `ended` tells them from places that
        are still empty.
      improvable: [B], whether a running text may still beat a finished one.
      alive: whether there is anything left to do.
    """

    cache: Any
    seen: Array | None
    step: Array
    running: Array
    running_scores: Array
    finished: Array
    scores: Array
    lengths: Array
    ended: Array
    improvable: Array
    alive: Array


def begin(
    cache: Any, seen: Bool[Array, "b v"] | None, rows: int, search: Search, *, room: int, pad: Array
) -> Beams:
    """Beams that have no tokens yet; `room` is the length of their buffers."""
    shape = (rows, search.beams)
    origin = jnp.repeat(jnp.arange(rows, dtype=jnp.int32), search.beams)
    # All beams of a row are equal at first: only one of them counts.
    scores = jnp.full(shape, NEVER, jnp.float32)
    texts = jnp.full((*shape, room), pad, jnp.int32)
    return Beams(
        cache=cache.select(origin),
        seen=None if seen is None else seen[origin],
        step=jnp.zeros((), jnp.int32),
        running=texts,
        running_scores=scores.at[:, 0].set(0.0),
        finished=texts,
        scores=scores,
        lengths=jnp.zeros(shape, jnp.int32),
        ended=jnp.zeros(shape, bool),
        improvable=jnp.ones(shape[:1], bool),
        alive=jnp.ones((), bool),
    )


def advance(
    beams: Beams,
    logits: Float[Array, "r v"],
    sampler: Sampler,
    search: Search,
    eos: Int[Array, " e"],
) -> Beams:
    """The next token of every beam. `logits` are those of the running texts."""
    rows, count = beams.running_scores.shape
    vocabulary = logits.shape[-1]
    length = beams.step + 1

    log_probs = sampler.penalised(jax.nn.log_softmax(logits), beams.seen)
    totals = log_probs.reshape(rows, count, vocabulary) + beams.running_scores[:, :, None]
    wanted = min(max(2, 1 + eos.shape[0]), vocabulary) * count
    totals, places = jax.lax.top_k(totals.reshape(rows, count * vocabulary), wanted)
    parents, tokens = places // vocabulary, (places % vocabulary).astype(jnp.int32)
    texts = _pick(beams.running, parents).at[:, :, beams.step].set(tokens)
    ends = jnp.isin(tokens, eos) | (length >= search.steps)

    # Running texts: the best that do not end.
    going = totals + NEVER * ends
    going, best = jax.lax.top_k(going, count)
    parents, chosen = _pick(parents, best), _pick(tokens, best)
    running = _pick(texts, best)

    # Finished texts: those from before, and the best that end.
    finishes = ends & (jnp.arange(wanted) < count)
    scores = totals / length.astype(jnp.float32) ** search.length_penalty
    closed = ~beams.improvable
    if search.early_stopping is True:
        closed = closed | jnp.all(beams.ended, axis=1)
    scores = scores + NEVER * closed[:, None] + NEVER * ~finishes
    merged = jnp.concatenate([beams.scores, scores], axis=1)
    merged, best = jax.lax.top_k(merged, count)
    lengths = jnp.broadcast_to(length, scores.shape)
    ended = _pick(jnp.concatenate([beams.ended, finishes], axis=1), best)

    # Can a running text still beat the worst finished one?
    reach = length
    if search.early_stopping == "never":
        reach = jnp.where(search.length_penalty > 0, search.steps, length)
    hope = going[:, 0] / reach.astype(jnp.float32) ** search.length_penalty
    worst = jnp.where(ended, jnp.min(merged, axis=1, keepdims=True), NEVER)
    improvable = beams.improvable & jnp.any(hope[:, None] > worst, axis=1)
    alive = jnp.any(improvable) & ~jnp.all(ends)
    if search.early_stopping is True:
        alive = alive & ~jnp.all(ended)

    origin = (parents + count * jnp.arange(rows)[:, None]).reshape(-1)
    seen = None if beams.seen is None else mark(beams.seen[origin], chosen.reshape(-1))
    return Beams(
        cache=beams.cache.select(origin),
        seen=seen,
        step=length,
        running=running,
        running_scores=going,
        finished=_pick(jnp.concatenate([beams.finished, texts], axis=1), best),
        scores=merged,
        lengths=_pick(jnp.concatenate([beams.lengths, lengths], axis=1), best),
        ended=ended,
        improvable=improvable,
        alive=alive,
    )


def last_tokens(beams: Beams) -> Int[Array, " r"]:
    """The newest token of each running text."""
    return beams.running[:, :, beams.step - 1].reshape(-1)


def _pick(x: Array, places: Int[Array, "b n"]) -> Array:
    """[B, M, ...] -> [B, N, ...]"""
    return jnp.take_along_axis(x, places.reshape(*places.shape, *[1] * (x.ndim - 2)), axis=1)
