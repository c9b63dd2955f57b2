"""The connector of Idefics2: a gated MLP to the language model's width, then a resampler.

Laurençon et al., "What matters when building vision-language models?" (2024). The resampler is
Flamingo's with what Mistral has: RMS norms, grouped queries and gated MLPs.
"""

from __future__ import annotations

import dataclasses

from flax import nnx

from mmjax.connectors.base import (
    CONNECTORS,
    Connector,
    ConnectorConfig,
    Grid,
    all_valid,
    at_least_one,
)
from mmjax.connectors.resampler import Resampler
from mmjax.nn.mlp import MLP
from mmjax.nn.stack import BlockConfig
from mmjax.typing import Array, Bool, Float


@dataclasses.dataclass(frozen=True)
class Idefics2Config(ConnectorConfig):
    """Its defaults are the published ones. The resampler is as wide as the language model.

    Attributes:
      latents: number of them, and of the tokens made of an image.
      depth, heads, kv_heads, head_dim: of the resampler.
      mlp_ratio: by how much its MLPs are wider than it is.
      hidden: width within the MLP before it, in Idefics2 that of the language model's own MLPs;
        None: `mlp_ratio` times the width of the language model.
      activation: of all MLPs; a name in `mmjax.nn.mlp.ACTIVATIONS`.
      norm_eps: of all norms.
    """

    latents: int = 64
    depth: int = 3
    heads: int = 16
    kv_heads: int = 4
    head_dim: int = 96
    mlp_ratio: int = 4
    hidden: int | None = None
    activation: str = "silu"
    norm_eps: float = 1e-6
    name: str = dataclasses.field(default="idefics2", init=False)

    def __post_init__(self):
        at_least_one(latents=self.latents, depth=self.depth)

    def tokens(self, grid: Grid, extra: int = 0) -> int:
        return self.latents


@CONNECTORS.register("idefics2")
class Idefics2Connector(Connector):
    """Each latent becomes a token. Features that do not count are not attended to."""

    def __init__(self, config: Idefics2Config, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        wide = config.mlp_ratio * outputs
        self.projection = MLP(
            inputs,
            wide if config.hidden is None else config.hidden,
            activation=config.activation,
            gated=True,
            bias=False,
            outputs=outputs,
            rngs=rngs,
        )
        block = BlockConfig(
            width=outputs,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            mlp_width=wide,
            activation=config.activation,
            gated=True,
            norm="rmsnorm",
            norm_eps=config.norm_eps,
            qkv_bias=False,
            out_bias=False,
            mlp_bias=False,
        )
        self.resampler = Resampler(block, latents=config.latents, depth=config.depth, rngs=rngs)

    def __call__(
        self, features: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None, grid: Grid
    ) -> tuple[Float[Array, "b m e"], Bool[Array, "b m"]]:
        tokens = self.resampler(self.projection(features), mask)
        return tokens, all_valid(tokens)
