"""The task of unified models: the next token of a stream of words and image codes."""

from __future__ import annotations

import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mmjax import losses
from mmjax.config import ConfigError
from mmjax.data.spec import ConversationSpec, parse
from mmjax.data.tokenizer import Tokenizer, TrainedTokenizer
from mmjax.data.visual import Codes, Decoupled
from mmjax.models.janus import JanusConfig
from mmjax.models.unified import UnifiedConfig
from mmjax.train.tasks import TASKS, Task, check_targets

_WHERE = "config.data.train.conversation"


@TASKS.register("unified")
class UnifiedTokens(Task):
    """The next token of a unified model, be it a word or a code, where it is supervised.

    Args:
      mesh: unused; every task is given it.
      targets: see `VisionLanguage`.
      image_weight: how much a code counts in the loss, where a word counts 1.
      z_loss: how much the squared logarithm of the softmax's normaliser counts, per token (PaLM,
        Chameleon: 1e-5).
    """

    fields = ("tokens", "weights", "place", "segments", "images")

    def __init__(
        self,
        mesh: Mesh,
        *,
        targets: int | None = None,
        image_weight: float = 1.0,
        z_loss: float = 0.0,
    ):
        del mesh
        check_targets(targets)
        if image_weight < 0 or z_loss < 0:
            raise ValueError(
                f"config.task: image_weight={image_weight} and z_loss={z_loss} must not be "
                "negative."
            )
        self.targets = targets
        self.image_weight, self.z_loss = image_weight, z_loss

    def check(self, model: UnifiedConfig, data: ConfigDict) -> None:
        spec = parse(data.train).conversation
        if spec is None or not isinstance(spec.layout, Codes):
            raise ConfigError(
                "The task 'unified' learns from streams of text and codes: config.data.train needs "
                "`conversation` with layout=dict(name='codes', ...)."
            )
        if not isinstance(model, UnifiedConfig):
            raise ConfigError(
                "config.task is for models of the name 'unified', but config.model is a "
                f"{type(model).__name__}."
            )
        problems = [f"  {text}" for wrong, text in self._problems(model, spec) if wrong]
        if problems:
            raise ConfigError("Data and model do not agree:\n" + "\n".join(problems))

    def _problems(self, model: UnifiedConfig, spec: ConversationSpec) -> list[tuple[bool, str]]:
        """What must not be, and how to say that it is."""
        size, image = model.image.tokenizer.image_size, model.image
        return [
            (
                spec.layout.size != size,
                f"{_WHERE}.layout.size={spec.layout.size}, but config.model.image.tokenizer."
                f"image_size={size}",
            ),
            (
                isinstance(model, JanusConfig) != isinstance(spec.layout, Decoupled),
                f"config.model.name={model.name!r}: 'janus' goes with the layout 'decoupled', "
                "'unified' with 'codes'",
            ),
            (
                spec.layout.tokens != model.places,
                f"{_WHERE}.layout has {spec.layout.tokens} places of an image, but the model has "
                f"{model.places}",
            ),
            (
                bool(spec.layout.end) != (image.end is not None),
                f"{_WHERE}.layout.end={spec.layout.end!r}, but config.model.image.end={image.end}",
            ),
            (
                spec.image_token != model.image_token,
                f"{_WHERE}.image_token={spec.image_token}, but config.model.image_token="
                f"{model.image_token}",
            ),
            (
                spec.prefix or spec.parents or spec.seq2seq is not None,
                f"{_WHERE}: prefix, parents and seq2seq have no meaning here: all is one causal "
                "stream",
            ),
            (
                model.limit is not None and spec.max_len > model.limit,
                f"{_WHERE}.max_len={spec.max_len} exceeds the language model's limit of "
                f"{model.limit} positions",
            ),
            (
                self.targets is not None and self.targets < spec.most_targets,
                f"config.task.targets={self.targets}, but rows have up to {spec.most_targets} "
                f"supervised tokens: set {_WHERE}.max_targets",
            ),
        ]

    def check_tokenizer(
        self, model: UnifiedConfig, data: ConfigDict, tokenizer: Tokenizer | None
    ) -> None:
        layout, image = parse(data.train).conversation.layout, model.image
        problems = []
        for name, text, wanted in (
            ("begin", layout.begin, image.begin),
            ("end", layout.end, image.end),
        ):
            found = tokenizer.backend.token_to_id(text) if text else None
            if found != wanted:
                problems.append(
                    f"  config.model.image.{name}={wanted}, but {_WHERE}.layout.{name}={text!r} "
                    f"has the id {found}"
                )
        # Published tokenizers have codes as tokens of their own (Chameleon, Emu3): all, or none.
        inside = image.all_ids < tokenizer.vocab_size
        if inside.any() and (isinstance(tokenizer, TrainedTokenizer) or not inside.all()):
            problems.append(
                f"  config.model.image.ids begin with {image.all_ids.min()}, but the tokenizer has "
                f"{tokenizer.vocab_size} tokens of text: let codes come after them"
            )
        if problems:
            raise ConfigError(
                "The tokenizer does not go with the model's vocabulary:\n" + "\n".join(problems)
            )

    def loss(self, model, batch, rng):
        segments = batch["segments"]
        out = model.run(
            batch["tokens"], batch["images"], place=batch["place"], segments=segments, rng=rng
        )
        weights = batch["weights"].astype(jnp.float32)
        weights = weights * jnp.where(model.is_code(out.tokens), self.image_weight, 1.0)
        each = losses.next_token_losses(
            (out.hidden, out.follows),
            lambda inputs: model.logits(*inputs),
            out.tokens,
            weights,
            targets=self.targets,
        )
        total, weight = jnp.sum(each.loss), jnp.sum(each.weight)
        if self.z_loss:
            total += self.z_loss * jnp.sum(each.weight * jnp.square(each.normaliser))
        filled = jnp.sum(segments > 0, dtype=jnp.float32)
        metrics = {"filled": (filled, float(segments.size))}
        is_code = model.is_code(each.tokens)
        for name, here in (("text", ~is_code), ("image", is_code)):
            # A batch may have none.
            count = jnp.maximum(jnp.sum(each.weight * here), 1e-6)
            metrics[f"loss_{name}"] = (jnp.sum(each.loss * here), count)
            metrics[f"accuracy_{name}"] = (jnp.sum(each.weight * each.correct * here), count)
        return (total, weight), metrics
