"""What is compiled: reading prompts, and loops of steps. Everything else is in `generator`."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from mmjax import params, sharding
from mmjax import rules as tables
from mmjax.generation import beam
from mmjax.generation.beam import Beams, Search
from mmjax.generation.prompts import Prompts
from mmjax.generation.sampling import Sampler, mark
from mmjax.nn.partition import activation_sharding
from mmjax.typing import Array, Bool, Float, Int


class Structure:
    """What programs are compiled for besides shapes. Compared by identity, which is quick."""

    def __init__(self, graphdef: nnx.GraphDef, treedef: Any, mesh: Mesh | None):
        self.graphdef, self.treedef, self.mesh = graphdef, treedef, mesh

    @contextmanager
    def model(self, leaves: list[Array]) -> Iterator[nnx.Module]:
        """The model, to be traced within the block."""
        constraint = None if self.mesh is None else sharding.activation_constraint(self.mesh)
        with activation_sharding(constraint):
            yield nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, leaves))

    def share(self, state: State | Beams) -> State | Beams:
        """The same with all that the host wants to see, which is small, on every device."""
        if self.mesh is None:
            return state
        where = sharding.replicated(self.mesh)
        small = jax.lax.with_sharding_constraint(state._replace(cache=None, seen=None), where)
        return small._replace(cache=state.cache, seen=state.seen)


# Models of equal structure share compiled programs.
_structure = functools.lru_cache(maxsize=256)(Structure)


class Weights(NamedTuple):
    """A model as programs take it."""

    structure: Structure
    leaves: list[Array]


def weights(model: nnx.Module, mesh: Mesh | None) -> Weights:
    """The parameters as they are, and what is to be compiled for them."""
    graphdef, state = nnx.split(model)
    leaves, treedef = jax.tree.flatten(state)
    return Weights(_structure(graphdef, treedef, mesh), leaves)


def placed(model: nnx.Module, mesh: Mesh, rules: tables.Table) -> nnx.Module:
    """The model with its parameters laid on the mesh; those that are there already stay.

    Raises:
      RuleError, MeshError: if rules, parameters and mesh do not fit.
    """
    graphdef, leaves = params.split(model)
    where = sharding.parameter_shardings(leaves, rules, mesh)
    return params.merge(
        graphdef, {path: jax.device_put(leaf, where[path]) for path, leaf in leaves.items()}
    )


class Choice(NamedTuple):
    """How the next token is chosen.

    Attributes:
      sampler: see there.
      keys: [B] random keys, or None.
      eos: [E], tokens that end a text.
      pad: what follows them.
      least: tokens that a text has before one of these may end it, or None.
    """

    sampler: Sampler
    keys: Array | None
    eos: Array
    pad: Array
    least: Array | None

    def at(self, step: Int[Array, ""], logits: Float[Array, "r v"]) -> Sampler:
        """The sampler of the token after so many."""
        if self.least is None:
            return self.sampler
        ends = jnp.zeros((logits.shape[-1],), bool).at[self.eos].set(True)
        return self.sampler.without(ends & (step < self.least))


class State(NamedTuple):
    """Between two steps of greedy decoding or sampling. All but the cache is on every device.

    Attributes:
      cache: the model's; with guidance of 2 B rows, those of the negative prompts in between.
      seen: [B, V], tokens that were there before, or None.
      step: number of tokens chosen.
      token: [B], the last of them.
      tokens: [B, S], all of them.
      lengths: [B], how many of them belong to the text.
      done: [B], whether the text has ended.
    """

    cache: Any
    seen: Array | None
    step: Array
    token: Array
    tokens: Array
    lengths: Array
    done: Array


@functools.partial(jax.jit, static_argnames=("structure", "room"))
def start(
    structure: Structure,
    leaves: list[Array],
    prompts: Prompts,
    choice: Choice,
    *,
    room: int,
) -> State:
    """The state after the first token.

    Args:
      prompts: with guidance, each is followed by its negative one.
      room: the length of the cache and of the buffer.
    """
    rows = prompts.tokens.shape[0] // choice.sampler.copies
    with structure.model(leaves) as model:
        logits, cache = _prefill(model, prompts, room)
    state = State(
        cache=cache,
        seen=_seen(model, choice.sampler, prompts, logits.shape[1]),
        step=jnp.zeros((), jnp.int32),
        token=jnp.zeros((rows,), jnp.int32),
        tokens=jnp.full((rows, room), choice.pad, jnp.int32),
        lengths=jnp.zeros((rows,), jnp.int32),
        done=jnp.zeros((rows,), bool),
    )
    return _choose(structure, state, logits, choice)


@functools.partial(jax.jit, static_argnames=("structure",), donate_argnames=("state",))
def decode(
    structure: Structure,
    leaves: list[Array],
    state: State,
    choice: Choice,
    limit: Int[Array, ""],
) -> State:
    """The state at `limit` tokens, or where all texts have ended."""

    def step(state: State) -> State:
        with structure.model(leaves) as model:
            tokens = jnp.repeat(state.token, choice.sampler.copies)
            logits, cache = model.step(tokens, state.cache)
        return _choose(structure, state._replace(cache=cache), logits, choice)

    def more(state: State) -> Bool[Array, ""]:
        return (state.step < limit) & ~jnp.all(state.done)

    return jax.lax.while_loop(more, step, state)


def _choose(
    structure: Structure, state: State, logits: Float[Array, "r v"], choice: Choice
) -> State:
    """The state after one more token."""
    keys = choice.keys
    if keys is not None:
        # A row's token depends on its key and its place alone.
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, state.step)
    sampler = choice.at(state.step, logits)
    token = jnp.where(state.done, choice.pad, sampler(logits, state.seen, keys))
    return structure.share(
        State(
            cache=state.cache,
            seen=None if state.seen is None else mark(state.seen, token),
            step=state.step + 1,
            token=token,
            tokens=jax.lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], state.step, 1),
            lengths=state.lengths + ~state.done,
            done=state.done | jnp.isin(token, choice.eos),
        )
    )


@functools.partial(jax.jit, static_argnames=("structure", "room"))
def start_search(
    structure: Structure,
    leaves: list[Array],
    prompts: Prompts,
    choice: Choice,
    search: Search,
    *,
    room: int,
) -> Beams:
    """The beams after their first token; `room` as in `start`."""
    with structure.model(leaves) as model:
        logits, cache = _prefill(model, prompts, room)
    seen = _seen(model, choice.sampler, prompts, logits.shape[1])
    beams = beam.begin(cache, seen, len(logits), search, room=room, pad=choice.pad)
    logits = jnp.repeat(logits, search.beams, axis=0)
    return _advance(structure, beams, logits, choice, search)


@functools.partial(jax.jit, static_argnames=("structure",), donate_argnames=("beams",))
def continue_search(
    structure: Structure, leaves: list[Array], beams: Beams, choice: Choice, search: Search
) -> Beams:
    """The beams at the end."""

    def step(beams: Beams) -> Beams:
        with structure.model(leaves) as model:
            logits, cache = model.step(beam.last_tokens(beams), beams.cache)
        return _advance(structure, beams._replace(cache=cache), logits, choice, search)

    return jax.lax.while_loop(lambda beams: beams.alive, step, beams)


def _advance(
    structure: Structure, beams: Beams, logits: Array, choice: Choice, search: Search
) -> Beams:
    """The beams after one more token."""
    sampler = choice.at(beams.step, logits)
    return structure.share(beam.advance(beams, logits, sampler, search, choice.eos))


def _prefill(model: nnx.Module, prompts: Prompts, room: int) -> tuple[Float[Array, "b v"], Any]:
    return model.prefill(prompts.tokens, prompts.valid, length=room, **prompts.sight)


def _seen(
    model: nnx.Module, sampler: Sampler, prompts: Prompts, vocabulary: int
) -> Bool[Array, "b v"] | None:
    """The tokens there are before generation begins, for the repetition penalty."""
    if sampler.repetition_penalty is None:
        return None
    # Not those of the negative prompts.
    tokens, valid = prompts.tokens[:: sampler.copies], prompts.valid[:: sampler.copies]
    rows = jnp.arange(tokens.shape[0])
    seen = jnp.zeros((tokens.shape[0], vocabulary), bool)
    if model.encoder_decoder:
        return mark(seen, jnp.full(rows.shape, model.config.decoder_start_id))
    # Padding, and what holds a visual token's place without being a token of the vocabulary, writes
    # what is there already.
    words = valid & (tokens >= 0) & (tokens < vocabulary)
    return seen.at[rows[:, None], tokens].max(words, mode="drop")
