"""Tasks: what is learnt. A task is a loss function; the loop knows nothing of models.

    task.loss(model, batch, rng) -> (numerator, denominator), metrics

Metrics are (numerator, denominator) pairs too, so that parts of a batch add up exactly. A task
whose loss couples the examples of a batch is a `FeatureTask`: it says how to compute features of a
part of the batch and the loss from the features of the whole, and so can be accumulated exactly.
A task that learns parameters from what a batch shows, and not by gradients, is a `StatefulTask`.
"""

from __future__ import annotations

import abc
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mmjax import losses
from mmjax.config import ConfigError
from mmjax.data.spec import ConversationSpec, parse
from mmjax.data.tokenizer import Tokenizer
from mmjax.models.flamingo import FlamingoConfig
from mmjax.models.lm import LMConfig
from mmjax.models.mllama import MllamaConfig
from mmjax.models.vlm import Seq2SeqVLMConfig, VLMConfig, positions_of
from mmjax.nn import masks
from mmjax.registry import Registry, nearest
from mmjax.sharding import BATCH_AXES
from mmjax.typing import Array

Batch = dict[str, Array]
Ratio = tuple[Any, Any]
Result = tuple[Ratio, dict[str, Ratio]]

TASKS: Registry[type[Task]] = Registry("task")


class Task(abc.ABC):
    """A loss that is a sum over examples.

    Attributes:
      fields: the arrays that a batch must have.
    """

    fields: tuple[str, ...]

    def check(self, model: Any, data: ConfigDict) -> None:  # noqa: B027 (most tasks have none)
        """That the data is what the model takes, as far as shapes do not show it.

        Args:
          model: the dataclass of config.model.
          data: config.data.

        Raises:
          ConfigError: listing what does not agree.
        """

    def check_tokenizer(  # noqa: B027
        self, model: Any, data: ConfigDict, tokenizer: Tokenizer | None
    ) -> None:
        """That the run's tokenizer is one for this model, beyond the size of its vocabulary.

        Args:
          model, data: as of `check`.

        Raises:
          ConfigError: listing what does not agree.
        """

    @abc.abstractmethod
    def loss(self, model: nnx.Module, batch: Batch, rng: Array | None) -> Result:
        """The loss of a batch. `rng` None: deterministic, as in evaluation."""


class FeatureTask(Task):
    """A loss over features of the whole batch, e.g. contrastive."""

    @abc.abstractmethod
    def features(self, model: nnx.Module, batch: Batch, rng: Array | None) -> dict[str, Array]:
        """Features of each example, [B, ...] each."""

    @abc.abstractmethod
    def loss_of_features(self, model: nnx.Module, features: dict[str, Array]) -> Result:
        """The loss of a batch from its features."""

    def loss(self, model: nnx.Module, batch: Batch, rng: Array | None) -> Result:
        return self.loss_of_features(model, self.features(model, batch, rng))


class StatefulTask(Task):
    """A loss, and parameters that are learnt from statistics of the batch, e.g. a codebook.

    The training step writes their new values; evaluation does not. Rules must freeze them.
    """

    @abc.abstractmethod
    def loss_and_statistics(
        self, model: nnx.Module, batch: Batch, rng: Array | None
    ) -> tuple[Result, Any]:
        """The loss, and arrays [B, ...] whose rows are about the examples. No gradient goes through
        them."""

    @abc.abstractmethod
    def update(
        self, model: nnx.Module, statistics: Any, rng: Array
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """New values of the parameters `learnt`, by path, and metrics of the batch.

        Args:
          model: as the loss saw it.
          statistics: of the whole batch, in its order, however it was divided.
          rng: of random choices.
        """

    @abc.abstractmethod
    def learnt(self, model: nnx.Module) -> tuple[str, ...]:
        """Paths of the parameters that `update` changes."""

    def check_rules(self, model: nnx.Module, trainable: dict[str, bool]) -> None:
        """That no gradient changes them too.

        Args:
          model: its parameters may be shapes.
          trainable: whether rules train them, by path.

        Raises:
          ConfigError: listing those that are trained.
        """
        trained = [path for path in self.learnt(model) if trainable[path]]
        if trained:
            raise ConfigError(
                "These parameters are learnt from statistics of batches, but "
                "config.rules.trainable trains them by gradients:\n"
                + "\n".join(f"  {path}" for path in trained)
                + "\nBegin the table with a row that freezes them, e.g. "
                "(r'(.*/)?quantizer/.*', False)."
            )

    def loss(self, model: nnx.Module, batch: Batch, rng: Array | None) -> Result:
        return self.loss_and_statistics(model, batch, rng)[0]


@TASKS.register("contrastive")
class Contrastive(FeatureTask):
    """CLIP's and SigLIP's objective for models with `encode_image`, `encode_text`,
    `scale_and_bias`.

    Args:
      mesh: where the batch lies.
      loss: "softmax" (CLIP) or "sigmoid" (SigLIP).
      chunked: exchange blocks of features around the ring of devices, so that memory per device
        does not grow with their number; otherwise every device sees the logits of the whole batch.
    """

    fields = ("image", "text", "text_mask")

    def __init__(self, mesh: Mesh, *, loss: str, chunked: bool):
        if loss not in ("softmax", "sigmoid"):
            raise ValueError(
                f"config.task.loss is {loss!r}; {nearest(loss, ('softmax', 'sigmoid'))}"
            )
        self.sigmoid = loss == "sigmoid"
        self.chunked = chunked
        self.mesh = mesh

    def features(self, model, batch, rng):
        image_rng, text_rng = (None, None) if rng is None else jax.random.split(rng)
        return {
            "image": model.encode_image(batch["image"], rng=image_rng),
            "text": model.encode_text(batch["text"], batch["text_mask"], rng=text_rng),
        }

    def loss_of_features(self, model, features):
        scale, bias = model.scale_and_bias()
        arguments = (features["image"], features["text"], scale)
        arguments += (bias,) if self.sigmoid else ()
        if self.chunked:
            ring = (
                losses.ring_sigmoid_contrastive if self.sigmoid else losses.ring_softmax_contrastive
            )
            ratio = ring(*arguments, mesh=self.mesh, axes=BATCH_AXES)
        else:
            dense = losses.sigmoid_contrastive if self.sigmoid else losses.softmax_contrastive
            ratio = dense(*arguments)
        metrics = {"scale": (scale, 1.0)}
        if self.sigmoid:
            metrics["bias"] = (bias, 1.0)
        return ratio, metrics


@TASKS.register("classification")
class Classification(Task):
    """Cross entropy of a classifier whose output has `logits`.

    Args:
      mesh: unused; every task is given it.
      label_smoothing: share of the target that is spread over all classes.
      mixup: parameter of the Beta distribution of mixing weights (Zhang et al., 2018); 0 is off.
        One weight per batch, partners are the batch reversed.
    """

    fields = ("image", "label")

    def __init__(self, mesh: Mesh, *, label_smoothing: float = 0.0, mixup: float = 0.0):
        del mesh
        self.label_smoothing = label_smoothing
        self.mixup = mixup

    def loss(self, model, batch, rng):
        images, labels = batch["image"], batch["label"]
        model_rng, mix_rng = (None, None) if rng is None else jax.random.split(rng)
        mixes = self.mixup > 0 and rng is not None
        if mixes:
            weight = jax.random.beta(mix_rng, self.mixup, self.mixup)
            images = weight * images + (1 - weight) * images[::-1]
        logits = model(images, rng=model_rng).logits
        correct = jnp.sum(jnp.argmax(logits, -1) == labels)

        def cross_entropy(targets):
            return losses.softmax_cross_entropy(
                logits, targets, label_smoothing=self.label_smoothing
            )

        numerator, denominator = cross_entropy(labels)
        if mixes:
            numerator = weight * numerator + (1 - weight) * cross_entropy(labels[::-1])[0]
        return (numerator, denominator), {"accuracy": (correct, denominator)}


@TASKS.register("lm")
class LanguageModelling(Task):
    """The next token of a language model, where it is supervised, from texts without images.

    Args: see `VisionLanguage`.
    """

    fields = ("tokens", "weights", "segments")

    def __init__(self, mesh: Mesh, *, targets: int | None = None):
        del mesh
        check_targets(targets)
        self.targets = targets

    def check(self, model: Any, data: ConfigDict) -> None:
        spec = parse(data.train).conversation
        if spec is None or spec.layout is not None:
            raise ConfigError(
                "The task 'lm' learns from texts: config.data.train needs `conversation`, without "
                "`images` and `layout`."
            )
        if not isinstance(model, LMConfig):
            raise ConfigError(
                f"config.task is for models of the name 'lm', but config.model is a "
                f"{type(model).__name__}."
            )
        where, most = "config.data.train.conversation", spec.most_targets
        if spec.prefix or spec.parents or spec.seq2seq is not None:
            raise ConfigError(
                f"{where}: prefix, parents and seq2seq have no meaning for the task 'lm', to which "
                "all is one causal text."
            )
        if model.limit is not None and spec.max_len > model.limit:
            raise ConfigError(
                f"{where}.max_len={spec.max_len} exceeds the model's limit of {model.limit} "
                "positions"
            )
        if self.targets is not None and self.targets < most:
            raise ConfigError(
                f"config.task.targets={self.targets}, but rows have up to {most} supervised "
                f"tokens: set {where}.max_targets"
            )

    def loss(self, model, batch, rng):
        segments = batch["segments"]
        mask = segments > 0
        attention = masks.blocks(jnp.ones_like(mask), group=segments, window=model.config.window)
        hidden = model.run(
            batch["tokens"],
            mask=mask,
            attention=attention,
            positions=positions_of(segments),
            rng=rng,
        ).hidden
        total, weight, correct = losses.next_token_loss(
            hidden, model.logits, batch["tokens"], batch["weights"], targets=self.targets
        )
        filled = jnp.sum(mask, dtype=jnp.float32)
        return (total, weight), {
            "accuracy": (correct, weight),
            "filled": (filled, float(segments.size)),
        }


def check_targets(targets: int | None) -> None:
    """Raises ValueError unless it is a number of tokens, or None."""
    if targets is not None and targets < 1:
        raise ValueError(f"config.task.targets={targets} must be at least 1, or None.")


@TASKS.register("vlm")
class VisionLanguage(Task):
    """The next token of a vision-language model, where it is supervised.

    Numerators and denominators are sums of token weights, so that parts of a batch, and samples
    packed in a row, count by their tokens.

    Args:
      mesh: unused; every task is given it.
      targets: the most supervised tokens that a row may have (`max_targets` of the data), so that
        logits are computed at no other places; None: at all.
    """

    fields = ("tokens", "weights", "place", "segments", "images")
    trains: tuple[type[VLMConfig], ...] = (VLMConfig, FlamingoConfig, MllamaConfig)

    def __init__(self, mesh: Mesh, *, targets: int | None = None):
        del mesh
        check_targets(targets)
        self.targets = targets

    def check(self, model: VLMConfig, data: ConfigDict) -> None:
        spec = parse(data.train).conversation
        if spec is None or spec.layout is None:
            raise ConfigError(
                "The task 'vlm' learns from conversations about images: config.data.train needs "
                "`conversation`, with `images` and `layout`."
            )
        if type(model) not in self.trains:
            names = " or ".join(repr(config.name) for config in self.trains)
            raise ConfigError(
                f"config.task is for models of the name {names}, but config.model is a "
                f"{type(model).__name__}."
            )
        problems = [f"  {text}" for wrong, text in self._problems(model, spec) if wrong]
        if problems:
            raise ConfigError("Data and model do not agree:\n" + "\n".join(problems))

    def _problems(self, model: VLMConfig, spec: ConversationSpec) -> list[tuple[bool, str]]:
        """What must not be, and how to say that it is."""
        where = "config.data.train.conversation"
        most = spec.most_targets
        return [
            (
                spec.layout.size != model.encoder.image_size,
                f"{where}.layout.size={spec.layout.size}, but config.model.encoder.image_size="
                f"{model.encoder.image_size}",
            ),
            (
                spec.layout.tokens != model.image_tokens,
                f"{where}.layout.tokens={spec.layout.tokens}, but the model makes "
                f"{model.image_tokens} visual tokens of a picture",
            ),
            (
                spec.layout.newlines and not model.newline,
                f"{where}.layout ends rows of visual tokens with newlines, but config.model.newline"
                f"={model.newline}",
            ),
            (
                (spec.seq2seq is not None) != isinstance(model, Seq2SeqVLMConfig),
                f"{where}.seq2seq={spec.seq2seq}, but config.model.name={model.name!r}",
            ),
            (
                spec.image_token != model.image_token,
                f"{where}.image_token={spec.image_token}, but config.model.image_token="
                f"{model.image_token}",
            ),
            (
                spec.prefix != (model.attention == "prefix"),
                f"{where}.prefix={spec.prefix}, but config.model.attention={model.attention!r}",
            ),
            (
                spec.layout.frames != model.frames,
                f"{where}.layout makes pictures that are read {spec.layout.frames} at a time, but "
                f"the model reads {model.frames}",
            ),
            (
                spec.images % model.frames != 0,
                f"{where}.images={spec.images} is no multiple of the {model.frames} "
                "frames that the model reads together",
            ),
            (
                model.limit is not None and spec.max_len > model.limit,
                f"{where}.max_len={spec.max_len} exceeds the language model's limit of "
                f"{model.limit} positions",
            ),
            (
                self.targets is not None and self.targets < most,
                f"config.task.targets={self.targets}, but rows have up to {most} supervised "
                f"tokens: set {where}.max_targets",
            ),
        ]

    def loss(self, model, batch, rng):
        del rng
        further = {name: batch[name] for name in ("prefix", "parents") if name in batch}
        hidden = model.run(
            batch["tokens"],
            batch["images"],
            place=batch["place"],
            segments=batch["segments"],
            **further,
        ).hidden
        total, weight, correct = losses.next_token_loss(
            hidden, model.logits, batch["tokens"], batch["weights"], targets=self.targets
        )
        filled = jnp.sum(batch["segments"] > 0, dtype=jnp.float32)
        return (total, weight), {
            "accuracy": (correct, weight),
            "filled": (filled, float(batch["segments"].size)),
        }


@TASKS.register("words")
class NameWords(VisionLanguage):
    """A connector's tokens name the words of captions: `losses.word_loss`.

    For connectors whose tokens are mixtures of the language model's own. It is not run, so that a
    step costs what encoder and connector cost. Samples of one picture count, others do not: whose
    words are theirs is not known.

    Arguments: see `VisionLanguage`; `targets` has no meaning here.
    """

    def _problems(self, model: VLMConfig, spec: ConversationSpec) -> list[tuple[bool, str]]:
        text = (
            "config.task.name='words' is for connectors whose tokens are mixtures of words, but "
            f"those of {model.connector.name!r} are not"
        )
        return [*super()._problems(model, spec), (not model.connector.names_words, text)]

    def loss(self, model, batch, rng):
        del rng
        place, segments, config = batch["place"], batch["segments"], model.config
        rows, pictures = len(place), batch["images"].shape[1] // config.frames
        shares = model.name_images(batch["images"])
        # The mean of their distributions is that of a picture with several tokens.
        shares = shares.reshape(rows, pictures, -1, shares.shape[-1])
        shares = jax.nn.logsumexp(shares, axis=2) - jnp.log(shares.shape[2])
        shown = jnp.where(place >= 0, place // config.image_tokens, -1)
        same = (segments[:, :, None] == segments[:, None, :]) & (shown[:, None, :] >= 0)
        first = jnp.min(jnp.where(same, shown[:, None, :], pictures), axis=2)
        last = jnp.max(jnp.where(same, shown[:, None, :], -1), axis=2)
        image = jnp.where(first == last, last, -1)
        total, weight = losses.word_loss(shares, batch["tokens"], batch["weights"], image)
        filled = jnp.sum(segments > 0, dtype=jnp.float32)
        # A batch may have no such sample.
        weight = jnp.maximum(weight, 1e-6)
        return (total, weight), {"filled": (filled, float(segments.size))}


@TASKS.register("seq2seq_vlm")
class Seq2SeqVisionLanguage(VisionLanguage):
    """The same of an encoder-decoder, which reads image and prompt and is supervised in its answer.

    Arguments: see `VisionLanguage`; `targets` are those of an answer.
    """

    fields = ("tokens", "weights", "place", "segments", "images", "decoder_tokens")
    trains = (Seq2SeqVLMConfig,)

    def _problems(self, model: Seq2SeqVLMConfig, spec: ConversationSpec) -> list[tuple[bool, str]]:
        start = model.decoder_start_id if spec.seq2seq is None else spec.seq2seq.start
        text = (
            f"config.data.train.conversation.seq2seq.start={start}, but the decoder begins with "
            f"{model.decoder_start_id}"
        )
        return [*super()._problems(model, spec), (start != model.decoder_start_id, text)]

    def loss(self, model, batch, rng):
        del rng
        hidden = model.run(
            batch["tokens"],
            batch["images"],
            batch["segments"] > 0,
            place=batch["place"],
            decoder_tokens=batch["decoder_tokens"],
        ).hidden
        total, weight, correct = losses.next_token_loss(
            hidden, model.logits, batch["decoder_tokens"], batch["weights"], targets=self.targets
        )
        return (total, weight), {"accuracy": (correct, weight)}
