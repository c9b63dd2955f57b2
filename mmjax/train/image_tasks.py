"""The task "vq": images as codes, and back."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mmjax import losses
from mmjax.config import ConfigError
from mmjax.data.spec import parse
from mmjax.models.tokenizer_trainer import TokenizerTrainerConfig
from mmjax.quantizers import counts, perplexity, usage
from mmjax.registry import check_choice
from mmjax.train.tasks import TASKS, StatefulTask
from mmjax.typing import Array, Float

PIXELS = {"l1": losses.absolute_error, "l2": losses.squared_error}


@TASKS.register("vq")
class ImageTokenizer(StatefulTask):
    """Images of codes are like the images that the codes are of.

    The loss is pixels * pixel error + perceptual * distance of features + adversarial * (that of
    the tokenizer + that of the discriminator) + quantizer * the quantiser's own. Of the adversarial
    part each side sees its own half alone, so that one step updates both, simultaneously, each
    parameter by its own optimizer state (rules set their rates). A discriminator joins later in a
    second stage, whose tokenizer comes through `config.init`.

    With train.accumulate a quantiser's loss is that of each part; LFQ's, which asks that codes are
    equally frequent in a batch, then asks it of each part.

    Args:
      mesh: unused; every task is given it.
      error: of pixels, "l1" or "l2".
      pixels, perceptual, adversarial, quantizer: weights of the parts.
    """

    fields = ("image",)

    def __init__(
        self,
        mesh: Mesh,
        *,
        error: str = "l1",
        pixels: float = 1.0,
        perceptual: float = 0.0,
        adversarial: float = 0.0,
        quantizer: float = 1.0,
    ):
        del mesh
        check_choice("config.task.error", error, PIXELS)
        weights = dict(
            pixels=pixels, perceptual=perceptual, adversarial=adversarial, quantizer=quantizer
        )
        negative = [f"{name}={weight}" for name, weight in weights.items() if weight < 0]
        if negative:
            raise ValueError(f"config.task: {', '.join(negative)}: weights are 0 or more.")
        self.error, self.weights = PIXELS[error], weights

    def check(self, model: Any, data: ConfigDict) -> None:
        if not isinstance(model, TokenizerTrainerConfig):
            raise ConfigError(
                "config.task is for models of the name 'tokenizer_trainer', but config.model is a "
                f"{type(model).__name__}."
            )
        spec, tokenizer = parse(data.train).image, model.tokenizer
        size = None if spec is None else spec.size
        problems = [
            (
                size != tokenizer.image_size,
                f"config.data.train.image.size={size}, but config.model.tokenizer.image_size="
                f"{tokenizer.image_size}",
            ),
            (tokenizer.channels != 3, f"config.model.tokenizer.channels={tokenizer.channels}"),
        ]
        for name, part in (("perceptual", "perceptual"), ("adversarial", "discriminator")):
            weight, made = self.weights[name], vars(model)[part] is not None
            problems += [
                (
                    (weight > 0) != made,
                    f"config.task.{name}={weight}, but config.model.{part} is "
                    f"{'there' if made else 'None'}: set both, or neither",
                )
            ]
        said = [f"  {text}" for wrong, text in problems if wrong]
        if said:
            raise ConfigError("Task, data and model do not agree:\n" + "\n".join(said))

    def loss_and_statistics(self, model, batch, rng):
        del rng
        images, weights = batch["image"], self.weights
        found = model(images)
        each = {"pixels": self.error(found.images, images)}
        if weights["perceptual"]:
            each["perceptual"] = model.distance(found.images, images)
        if weights["adversarial"]:
            each |= _adversarial(model, found.images, images)
        parts = {name: jnp.sum(value) for name, value in each.items()}
        count = float(len(images))
        parts["quantizer"] = found.loss * count
        weighed = weights | {"discriminator": weights["adversarial"]}
        total = sum(weighed[name] * part for name, part in parts.items())
        # Whoever sees images of 0 to 255 of the pixels -1 to 1 sees nothing beyond.
        squares = losses.squared_error(jnp.clip(found.images, -1, 1), images)
        parts["psnr"] = jnp.sum(10 * jnp.log10(4 / jnp.maximum(squares, 1e-10)))
        metrics = {name: (part, count) for name, part in parts.items()}
        return ((total, count), metrics), (found.codes, found.statistics)

    def update(self, model, statistics, rng):
        codes, statistics = statistics
        seen = counts(codes, model.config.tokenizer.quantizer)
        metrics = {"usage": jnp.mean(usage(seen)), "perplexity": jnp.mean(perplexity(seen))}
        return model.update(statistics, rng), metrics

    def learnt(self, model):
        return model.learnt


def _adversarial(
    model: Any, made: Float[Array, "b h w c"], images: Float[Array, "b h w c"]
) -> dict[str, Float[Array, " b"]]:
    """What the tokenizer minimises, and what the discriminator does."""
    scores = model.judge(jnp.concatenate([images, made]), learns=True)
    real, fake = jnp.split(scores, 2)
    return {
        "adversarial": losses.hinge_generator(model.judge(made, learns=False)),
        "discriminator": (losses.hinge_real(real) + losses.hinge_made(fake)) / 2,
    }
