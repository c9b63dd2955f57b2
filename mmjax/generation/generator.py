"""`generate`, and `Generator`, which keeps what repeated calls need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mmjax import rules as tables
from mmjax import sharding
from mmjax.generation import programs
from mmjax.generation.beam import Search
from mmjax.generation.negative import pair
from mmjax.generation.options import (
    check_length,
    end_tokens,
    make_sampler,
    make_search,
    row_keys,
    suppressed_tokens,
)
from mmjax.generation.programs import Choice
from mmjax.generation.prompts import Prompts, Tokens, bucket, check_rows, left_pad, read_rows
from mmjax.generation.sight import Images, read_prompts
from mmjax.generation.stopping import StopStrings
from mmjax.generation.streams import check_ends
from mmjax.models.unified import UnifiedConfig
from mmjax.nn import backend
from mmjax.typing import Array

# Steps between two looks of the host at what is done.
STEPS = 64
STEPS_TO_STOP = 8  # where it looks for strings


class Generated(NamedTuple):
    """What a `Generator` returns.

    Attributes:
      tokens: [B, N] int32, the new tokens, an end token included; `pad_id` after the end. N is the
        length of the longest.
      lengths: [B], number of new tokens.
      scores: [B], of beam search: log probability / length ** length_penalty. Else None.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    scores: np.ndarray | None


def generate(
    model: nnx.Module,
    tokens: Tokens,
    images: Images | None = None,
    mask: Array | np.ndarray | None = None,
    *,
    mesh: Mesh | None = None,
    rules: tables.Table | None = sharding.DEFAULT_RULES,
    **options: Any,
) -> np.ndarray:
    """The new tokens [B, N] after each prompt. Options are those of `Generator.__call__`.

    For more than one call with the same weights keep a `Generator`: on a CPU it copies the weights
    into a layout that decodes faster, which this function does at each call. Programs are compiled
    once, however they are called.

    Args:
      model: a language model (see `mmjax.models.lm`) or one that sees as well (`mmjax.models.vlm`);
        of encoder-decoders, such as T5, the prompt goes to the encoder.
      tokens, images, mask: the prompts; see `Generator.__call__`.
      mesh: devices to generate on, as in training; None: where the parameters are.
      rules: sharding strategies by parameter path, see `mmjax.sharding`; None: the parameters are
        on the mesh, and stay as they lie.

    Raises:
      ValueError: on options that contradict each other and prompts that do not fit.
    """
    return Generator(model, mesh=mesh, rules=rules)(tokens, images, mask, **options).tokens


class Generator:
    """A model ready to generate; `model`, `mesh` and `rules` as in `generate`.

    Prompts are padded to one of few lengths, and so are caches: a program that was compiled serves
    prompts of all lengths near by, and any number of new tokens that the cache has room for; the
    same goes for numbers of images. What one row yields does not depend on the other rows, except
    for rounding.

    Models of the same structure share programs: a `Generator` of new weights, at each evaluation of
    a run for instance, compiles nothing.

    Attributes:
      model: with its parameters on the mesh.
      weights: the same as compiled programs take it; see `mmjax.generation.programs`.
    """

    def __init__(
        self,
        model: nnx.Module,
        *,
        mesh: Mesh | None = None,
        rules: tables.Table | None = sharding.DEFAULT_RULES,
    ):
        stays = mesh is None or rules is None
        self.model = model if stays else programs.placed(model, mesh, rules)
        self.mesh = mesh
        self.weights = programs.weights(self.model, mesh)
        self._stepping = self.weights
        if backend.platform() == "cpu":
            # A step does little but read every weight, and here a slice of stacked weights is a
            # copy. Elsewhere slices are left to the compiler, and no weight is held twice.
            self._stepping = programs.weights(self.model.unstack(), mesh)

    def __call__(
        self,
        tokens: Tokens,
        images: Images | None = None,
        mask: Array | np.ndarray | None = None,
        *,
        place: Tokens | None = None,
        text: Tokens | None = None,
        text_mask: Array | np.ndarray | None = None,
        max_new_tokens: int,
        min_new_tokens: int = 0,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        guidance: float | None = None,
        negative: Tokens | None = None,
        negative_images: Images | None = None,
        suppress: Sequence[int] | None = None,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        early_stopping: bool | str = False,
        eos_id: int | Sequence[int] | None = None,
        pad_id: int | None = None,
        stop_strings: str | Sequence[str] = (),
        decode: Callable[[list[int]], str] | None = None,
        key: Array | None = None,
        stream: Callable[[list[list[int]]], None] | None = None,
        stream_every: int = 1,
    ) -> Generated:
        """Continue each prompt until an end token, a stop string or `max_new_tokens`.

        Args:
          tokens: [B, T], or a list of B lists of ids. Where visual tokens stand, ids need not be of
            the vocabulary.
          images: for models that see, normalised: [B, I, H, W, C], or for each row an array
            [I, H, W, C], whose numbers may differ and be 0.
          mask: [B, T], False at padding, on whichever side.
          place: of the form of `tokens`: which visual token of the row stands there, counted over
            its images one after the other; -1 for text (see `VLM.run`). None: they stand, in order,
            where tokens are the model's `image_token`.
          text, text_mask: for connectors that read it, the question of each row, with which all of
            its images are looked at; of the form of `tokens`.
          min_new_tokens: end tokens are not chosen before there are so many.
          temperature: 0 takes the most probable token ("greedy"); above it, tokens are drawn.
          top_k, top_p, min_p, repetition_penalty: see `Sampler`.
          guidance: classifier-free guidance, by which prompts count more (above 1) or less (below)
            than they would: see `Sampler.guided`. A step reads twice as many rows. None or 1: none.
          negative: with guidance, what is written without the prompts: of the form of `tokens`, one
            for each row or one for all, such as the begin-of-text token alone.
          negative_images: of the form of `images`, those of the negative prompts, which stand where
            tokens are the model's `image_token`; None: they have none.
          suppress: tokens that are never chosen.
          num_beams: above 1, beam search; see `Search` for length_penalty and early_stopping.
          eos_id: end token or tokens. None: there are none, and every row has `max_new_tokens`;
            unlike in transformers, the model's own are not looked up.
          pad_id: what follows an end; the first end token if None, or 0.
          stop_strings: a text ends with the token that completes one of these.
          decode: ids -> text, such as a tokenizer's `decode`; for stop strings.
          key: a random key, or an array of one typed key for each row. A row draws the same with
            the same key, whatever its neighbours.
          stream: called with the new tokens of each row, as they come.
          stream_every: after so many steps.

        Raises:
          ValueError: on options that contradict each other and prompts that do not fit.
        """
        config, encodes = self.model.config, self.model.encoder_decoder
        sampler = make_sampler(
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
            guidance,
            suppressed_tokens(suppress, config.vocab_size),
        )
        prompts = self._read(tokens, images, mask, place, text, text_mask)
        rows = len(prompts.tokens)
        if sampler.guidance is not None:
            prompts = pair(prompts, self._read_negative(negative, negative_images))
            if isinstance(config, UnifiedConfig):
                check_ends(config, prompts)
        elif guidance is None and not (negative is None and negative_images is None):
            raise ValueError("negative prompts count by guidance only: give it, such as 3.0.")
        check_length(
            prompts.valid, min_new_tokens, max_new_tokens, None if encodes else config.limit
        )
        length = prompts.tokens.shape[1]
        room = bucket(max_new_tokens if encodes else length + max_new_tokens)
        eos = end_tokens(eos_id, config.vocab_size)
        pad = int(eos[0]) if eos.size and pad_id is None else pad_id or 0
        keys = None if sampler.temperature is None else row_keys(key, rows)
        least = np.int32(min_new_tokens) if min_new_tokens else None
        choice = self.place(Choice(sampler, keys, eos, np.int32(pad), least))
        prompts = self.place(prompts, batch=len(prompts.tokens))
        stops = StopStrings(stop_strings, decode)
        if num_beams != 1:
            if sampler.guidance is not None:
                raise ValueError("Beam search goes without guidance: use num_beams=1.")
            if sampler.temperature is not None or stops or stream is not None:
                raise ValueError(
                    "Beam search knows its tokens only at the end, and draws none: it goes with "
                    "neither a temperature, nor stop_strings, nor stream. Use num_beams=1 for them."
                )
            search = make_search(num_beams, length_penalty, early_stopping, max_new_tokens)
            return self._search(prompts, choice, self.place(search), room)
        if stream_every < 1:
            raise ValueError(f"stream_every={stream_every} must be at least 1.")
        every = stream_every if stream is not None else STEPS_TO_STOP if stops else STEPS
        return self._decode(prompts, choice, room, max_new_tokens, stops, stream, every)

    def _read(
        self,
        tokens: Tokens,
        images: Images | None,
        mask: Array | np.ndarray | None,
        place: Tokens | None,
        text: Tokens | None,
        text_mask: Array | np.ndarray | None,
    ) -> Prompts:
        config = self.model.config
        if self.model.takes_images:
            return read_prompts(config, tokens, images, mask, place, text, text_mask)
        given = {"images": images, "place": place, "text": text, "text_mask": text_mask}
        for name, value in given.items():
            if value is not None:
                kind = type(self.model).__name__
                raise ValueError(f"{kind} takes no {name}: leave `{name}` out.")
        rows = read_rows(tokens, mask, "tokens")
        check_rows(rows, config.vocab_size, config.limit)
        return left_pad(rows, config.limit)

    def _read_negative(self, tokens: Tokens | None, images: Images | None) -> Prompts:
        if tokens is None:
            raise ValueError(
                "guidance compares with what is written without the prompt: give negative, such as "
                "[[begin-of-text token]]."
            )
        try:
            return self._read(tokens, images, None, None, None, None)
        except ValueError as error:
            raise ValueError(f"Of the negative prompts: {error}") from None

    def _decode(
        self,
        prompts: Prompts,
        choice: Choice,
        room: int,
        new_tokens: int,
        stops: StopStrings,
        stream: Callable[[list[list[int]]], None] | None,
        every: int,
    ) -> Generated:
        state = programs.start(*self.weights, prompts, choice, room=room)
        told = 0
        while True:
            tokens, lengths, done = jax.device_get((state.tokens, state.lengths, state.done))
            chosen = int(lengths.max())
            if stops:
                lengths, done = stops.cut(tokens, lengths, done, told)
                state = state._replace(lengths=self.place(lengths), done=self.place(done))
                # The device has gone on to write where a text has ended.
                within = np.arange(tokens.shape[1]) < lengths[:, None]
                tokens = np.where(within, tokens, np.int32(choice.pad))
            if stream is not None:
                rows = zip(tokens, lengths, strict=True)
                stream([row[told:length].tolist() for row, length in rows])
            told = chosen
            if told >= new_tokens or done.all():
                return Generated(tokens[:, : lengths.max()], lengths, None)
            limit = self.place(np.int32(min(told + every, new_tokens)))
            state = programs.decode(*self._stepping, state, choice, limit)

    def _search(self, prompts: Prompts, choice: Choice, search: Search, room: int) -> Generated:
        beams = programs.start_search(*self.weights, prompts, choice, search, room=room)
        beams = programs.continue_search(*self._stepping, beams, choice, search)
        tokens, lengths, scores = jax.device_get((beams.finished, beams.lengths, beams.scores))
        longest = lengths[:, 0].max()
        return Generated(tokens[:, 0, :longest], lengths[:, 0], scores[:, 0])

    def place(self, tree: Any, *, batch: int | None = None) -> Any:
        """Host values on every device of the mesh, or, for a batch of so many rows, divided over
        them; as they are if there is no mesh."""
        if self.mesh is None:
            return tree
        where = sharding.replicated(self.mesh)
        if batch is not None and batch % sharding.batch_shards(self.mesh) == 0:
            where = sharding.batch_sharding(self.mesh)
        return jax.tree.map(lambda leaf: _put(leaf, where), tree)


def _put(x: Any, where: Any) -> Array:
    """A host value that all processes have, or an array, laid out on the mesh."""
    if isinstance(x, jax.Array):
        return jax.device_put(x, where)
    return sharding.place_like_sharding(x, where)
