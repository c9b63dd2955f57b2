"""AltCLIP (Chen et al., 2022): CLIP whose text tower is XLM-RoBERTa, for many languages."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx

from mmjax.models.bert import Bert, BertConfig
from mmjax.models.clip import CLIP, CLIPConfig
from mmjax.models.text import TextOutput
from mmjax.models.vit import ViT
from mmjax.nn.linear import Linear
from mmjax.nn.norm import NORMS
from mmjax.typing import Array, Bool, Int, Key


@dataclasses.dataclass(frozen=True)
class AltTextConfig:
    """A BERT, and what its tokens are mapped to.

    Attributes:
      bert: it has no pooler.
      pooled_width: width of the result, that of the teacher's text tower.
    """

    bert: BertConfig
    pooled_width: int

    def __post_init__(self):
        if self.bert.pooler:
            raise ValueError("AltCLIP's text tower has no use for a pooler: set bert.pooler=False.")


class AltText(nnx.Module):
    """tokens [B, T] -> `TextOutput`: its tokens are mapped ones, `pooled` is the first of them."""

    def __init__(self, config: AltTextConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.bert = Bert(config.bert, rngs=rngs)
        self.norm = NORMS["layernorm"](config.bert.width, eps=config.bert.norm_eps)
        self.projection = Linear(config.bert.width, config.pooled_width, rngs=rngs)

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        mask: Bool[Array, "b t"] | None = None,
        *,
        rng: Key | None = None,
        features: Sequence[int] = (),
    ) -> TextOutput:
        """Arguments and errors are those of `Bert`."""
        output = self.bert(tokens, mask, rng=rng, features=features)
        x = self.projection(self.norm(output.tokens))
        return TextOutput(x, x[:, 0], output.features)


@dataclasses.dataclass(frozen=True)
class AltCLIPConfig(CLIPConfig):
    """As `CLIPConfig`, but for the text tower."""

    text: AltTextConfig


class AltCLIP(CLIP):
    """images, tokens -> logits [images, texts]; all methods are those of `CLIP`."""

    def __init__(self, config: AltCLIPConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.image = ViT(config.image, rngs=rngs)
        self.text = AltText(config.text, rngs=rngs)
        self.image_projection = Linear(
            config.image.pooled_width, config.embed_dim, bias=False, rngs=rngs
        )
        self.text_projection = Linear(
            config.text.pooled_width, config.embed_dim, bias=False, rngs=rngs
        )
        self.logit_scale = nnx.Param(jnp.asarray(math.log(config.init_scale), jnp.float32))
