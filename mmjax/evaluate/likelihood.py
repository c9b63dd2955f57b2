"""Evaluators of how probable answers are: perplexity, and multiple choice."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmjax.data.questions import Question
from mmjax.evaluate.asking import (
    QuestionEvaluator,
    batches,
    distinct,
    identity,
    prompt_size,
    sight,
)
from mmjax.evaluate.base import EVALUATORS
from mmjax.evaluate.controls import image_names
from mmjax.evaluate.summary import Scoring, means
from mmjax.generation.prompts import Prompts, align, bucket, check_rows, left_pad
from mmjax.generation.sight import read_prompts
from mmjax.models.unified import Unified
from mmjax.models.vlm import TEXT
from mmjax.params import Params, merge
from mmjax.sharding import batch_sharding, batch_shards, place_like_sharding


class Likelihood(NamedTuple):
    """Of an answer: the sum of its tokens' log probabilities, in nats, and how many they are."""

    total: float
    tokens: int

    @property
    def mean(self) -> float:
        """Of a token."""
        return self.total / self.tokens


def answer_log_probs(model: nnx.Module, batch: Mapping[str, jax.Array]) -> jax.Array:
    """The log probability of each token of the answers, [B, U] float32, 0 at padding.

    One pass over prompts and answers together; logits are computed of answers only. Those of
    unified models are among the tokens that can follow (see `UnifiedConfig.follow`).

    Args:
      batch: `tokens` [B, T], padded on the left, `valid` [B, T], `images` and `place` where there
        are images; `answer` [B, U], padded on the right, and `said` [B, U], False at padding.
    """
    tokens, valid, answer, said = (batch[name] for name in ("tokens", "valid", "answer", "said"))
    seen = {name: batch[name] for name in ("images", "place") if name in batch}
    follows = ()
    if model.encoder_decoder:
        start = jnp.full_like(answer[:, :1], model.config.decoder_start_id)
        hidden = model.run(
            tokens,
            mask=valid,
            decoder_tokens=jnp.concatenate([start, answer[:, :-1]], axis=1),
            decoder_mask=jnp.pad(said[:, :-1], ((0, 0), (1, 0)), constant_values=True),
            **seen,
        ).hidden
    else:
        room = ((0, 0), (0, answer.shape[1]))
        if "place" in seen:
            seen["place"] = jnp.pad(seen["place"], room, constant_values=TEXT)
        unified = isinstance(model, Unified)
        if model.takes_images and not unified and model.config.attention == "prefix":
            seen["prefix"] = jnp.pad(valid, room)
        stream = jnp.concatenate([tokens, answer], axis=1)
        out = model.run(stream, mask=jnp.concatenate([valid, said], axis=1), **seen)
        # The last token of the prompt predicts the first one of the answer.
        before = slice(tokens.shape[1] - 1, -1)
        hidden = out.hidden[:, before]
        if unified:
            follows = (out.follows[:, before],)
    return jnp.where(said, _chosen(model.logits(hidden, *follows), answer), 0.0)


def choice_log_probs(model: nnx.Module, batch: Mapping[str, jax.Array]) -> jax.Array:
    """The log probability of each token of each question's choices, [B, K, U] float32, 0 at
    padding.

    A prompt is read once, and then all of its choices side by side, token by token.

    Args:
      batch: as of `answer_log_probs`, but that `answer` and `said` are [B, K, U].
    """
    count, choices, length = batch["answer"].shape
    seen = {name: batch[name] for name in ("images", "place") if name in batch}
    room = length if model.encoder_decoder else batch["tokens"].shape[1] + length
    logits, cache = model.prefill(batch["tokens"], batch["valid"], length=room, **seen)
    rows = jnp.repeat(jnp.arange(count, dtype=jnp.int32), choices)

    def step(before, tokens):
        logits, cache = before
        return model.step(tokens, cache), _chosen(logits, tokens)

    answer = batch["answer"].reshape(count * choices, length)
    last, found = jax.lax.scan(step, (logits[rows], cache.select(rows)), answer[:, :-1].T)
    found = jnp.concatenate([found, _chosen(last[0], answer[:, -1])[None]]).T
    return jnp.where(batch["said"], found.reshape(count, choices, length), 0.0)


def _chosen(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """The log probability of tokens [...] by logits [..., V], float32."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    index = jnp.where(tokens < 0, log_p.shape[-1], tokens)[..., None]
    # A token beyond the vocabulary is NaN: under `jit` the only way to be noticed.
    return jnp.take_along_axis(log_p, index, axis=-1, mode="fill")[..., 0]


@dataclasses.dataclass(kw_only=True, eq=False)
class LikelihoodEvaluator(QuestionEvaluator):
    """A `QuestionEvaluator` of how probable given answers are."""

    def __post_init__(self):
        super().__post_init__()
        self._log_probs = self.context.compile(answer_log_probs)

    def likelihoods(
        self, params: Params, questions: Sequence[Question], answers: Sequence[np.ndarray]
    ) -> list[Likelihood]:
        """How probable each answer (token ids) is after its question.

        Raises:
          ValueError: if prompts do not fit the model; see `Generator`.
        """
        model = merge(self.context.graphdef, params)
        where = batch_sharding(self.context.mesh)
        names = image_names(questions)
        keys = zip(map(identity, questions, names), map(np.ndarray.tobytes, answers), strict=True)
        # What is asked twice is computed once: without images many questions are the same.
        first, which = distinct(keys)
        sizes = [(*prompt_size(questions[i]), bucket(len(answers[i]), 1)) for i in first]
        found: dict[int, Likelihood] = {}
        for rows in batches(sizes, self.batch_size):
            asked = [questions[first[row]] for row in rows]
            said = [np.asarray(answers[first[row]], np.int32) for row in rows]
            arrays = answer_arrays(model, asked, said)
            arrays = {name: place_like_sharding(array, where) for name, array in arrays.items()}
            log_probs = jax.device_get(self._log_probs(params, arrays))
            for row, values, answer in zip(rows, log_probs, said, strict=True):
                found[row] = Likelihood(float(values.sum(dtype=np.float64)), len(answer))
        return [found[row] for row in which]


def answer_arrays(
    model: nnx.Module, questions: Sequence[Question], answers: Sequence[np.ndarray]
) -> dict[str, np.ndarray]:
    """What `answer_log_probs` takes."""
    config = model.config
    lengths = np.array([[len(answer)] for answer in answers])
    said = np.arange(bucket(int(lengths.max()), 1)) < lengths
    prompts = _prompts(model, questions)
    arrays = {"tokens": prompts.tokens, "valid": prompts.valid, **prompts.sight}
    spare = 0 if config.limit is None else prompts.valid.shape[1] + said.shape[1] - config.limit
    if spare > 0 and not model.encoder_decoder:
        if prompts.valid[:, :spare].any():
            raise ValueError(
                f"Prompts of up to {prompts.valid.sum(axis=1).max()} tokens and answers of up to "
                f"{lengths.max()} exceed the model's limit of {config.limit} positions."
            )
        for name in {"tokens", "valid", "place"} & set(arrays):
            arrays[name] = arrays[name][:, spare:]
    return arrays | {"answer": align(answers, said, 0), "said": said}


def choice_arrays(model: nnx.Module, questions: Sequence[Question]) -> dict[str, np.ndarray]:
    """What `choice_log_probs` takes."""
    arrays = answer_arrays(model, questions, [max(q.choice_ids, key=len) for q in questions])
    length = arrays["said"].shape[1]
    most = bucket(max(len(question.choice_ids) for question in questions), 1)
    answer = np.zeros((len(questions), most, length), np.int32)
    said = np.zeros(answer.shape, bool)
    for row, question in enumerate(questions):
        for place, ids in enumerate(question.choice_ids):
            answer[row, place, : len(ids)] = ids
            said[row, place, : len(ids)] = True
    return arrays | {"answer": answer, "said": said}


def _prompts(model: nnx.Module, questions: Sequence[Question]) -> Prompts:
    ids = [question.ids for question in questions]
    if model.takes_images:
        given = {"images": None, "place": None} | sight(questions)
        return read_prompts(model.config, ids, mask=None, text=None, text_mask=None, **given)
    check_rows(ids, model.config.vocab_size, model.config.limit)
    return left_pad(ids, model.config.limit)


def _require(questions: Sequence[Question], field: str, what: str) -> None:
    lacking = [question.id for question in questions if getattr(question, field) is None]
    if lacking:
        raise ValueError(
            f"{len(lacking)} of {len(questions)} questions have no {what} (first: {lacking[0]}): "
            f"say in the data config where they are."
        )


def _perplexity(sums: np.ndarray, questions: np.ndarray) -> dict[str, np.ndarray]:
    del questions
    loss = sums[..., 0] / sums[..., 1]
    return {"loss": loss, "perplexity": np.exp(loss)}


@EVALUATORS.register("perplexity")
@dataclasses.dataclass(kw_only=True, eq=False)
class Perplexity(LikelihoodEvaluator):
    """How probable the right answers are: `loss`, in nats for each supervised token of the first
    right answer, its end included, and `perplexity`, exp(loss). Fields: see `QuestionEvaluator`.
    """

    scoring = Scoring(_perplexity, main="loss", better="lower")

    def prepare(self, questions: Sequence[Question]) -> None:
        _require(questions, "answer_ids", "answer")

    def respond(self, params: Params, questions: Sequence[Question]) -> list[Likelihood]:
        return self.likelihoods(params, questions, [question.answer_ids for question in questions])

    def count(self, questions: Sequence[Question], responses: Sequence[Likelihood]) -> np.ndarray:
        return np.array([(-said.total, said.tokens) for said in responses])

    def text(self, question: Question, response: Likelihood) -> str:
        return f"{-response.mean:.2f} nats a token"


@EVALUATORS.register("multiple_choice")
@dataclasses.dataclass(kw_only=True, eq=False)
class MultipleChoice(LikelihoodEvaluator):
    """How often the right one of a question's choices is the most probable: `accuracy` by the sum
    of its tokens' log probabilities, `accuracy_per_token` by their mean, which does not favour
    short choices. A choice as probable as the right one counts against the model. Fields: see
    `QuestionEvaluator`.
    """

    scoring = Scoring(
        means("accuracy", "accuracy_per_token"),
        main="accuracy",
        shares=("accuracy", "accuracy_per_token"),
    )

    def __post_init__(self):
        super().__post_init__()
        self._choice_log_probs = self.context.compile(choice_log_probs)

    def prepare(self, questions: Sequence[Question]) -> None:
        _require(questions, "choice_ids", "choices")
        for question in questions:
            if question.choices.count(question.answers[0]) != 1:
                raise ValueError(
                    f"{question.id}: the right answer {question.answers[0]!r} must be one of the "
                    f"choices, which are {', '.join(map(repr, question.choices))}."
                )

    def respond(self, params: Params, questions: Sequence[Question]) -> list[list[Likelihood]]:
        model = merge(self.context.graphdef, params)
        where = batch_sharding(self.context.mesh)
        choices = [tuple(map(np.ndarray.tobytes, q.choice_ids)) for q in questions]
        # What is asked twice is computed once, as in `likelihoods`.
        first, which = distinct(
            zip(map(identity, questions, image_names(questions)), choices, strict=True)
        )
        counts = [bucket(len(questions[i].choice_ids), 1) for i in first]
        lengths = [bucket(max(map(len, questions[i].choice_ids)), 1) for i in first]
        sizes = [
            (count, length, *prompt_size(questions[i]))
            for i, count, length in zip(first, counts, lengths, strict=True)
        ]
        # So many questions that their choices are about `batch_size` rows.
        shards = batch_shards(self.context.mesh)
        together = max(self.batch_size // max(counts) // shards, 1) * shards
        found: dict[int, list[Likelihood]] = {}
        for rows in batches(sizes, together):
            asked = [questions[first[row]] for row in rows]
            arrays = choice_arrays(model, asked)
            arrays = {name: place_like_sharding(array, where) for name, array in arrays.items()}
            totals = jax.device_get(self._choice_log_probs(params, arrays)).sum(-1, np.float64)
            for row, question, values in zip(rows, asked, totals, strict=True):
                options = zip(values, question.choice_ids, strict=False)
                found[row] = [Likelihood(float(total), len(ids)) for total, ids in options]
        return [found[row] for row in which]

    def constant(self, question: Question, counts: Mapping[str, int]) -> list[Likelihood]:
        # As if choices were the more probable the more often they are right.
        order = sorted(question.choices, key=lambda choice: -counts[choice])
        return [Likelihood(-order.index(choice), 1) for choice in question.choices]

    def count(
        self, questions: Sequence[Question], responses: Sequence[list[Likelihood]]
    ) -> np.ndarray:
        rows = []
        for question, options in zip(questions, responses, strict=True):
            right = question.choices.index(question.answers[0])
            others = [option for i, option in enumerate(options) if i != right]
            whole = all(options[right].total > other.total for other in others)
            rows.append((whole, all(options[right].mean > other.mean for other in others)))
        return np.array(rows, np.float64)

    def text(self, question: Question, response: list[Likelihood]) -> str:
        totals = [option.total for option in response]
        return question.choices[totals.index(max(totals))]
