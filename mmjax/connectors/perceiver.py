"""The Perceiver resampler of Flamingo: any number of features, of a fixed number of tokens.

Alayrac et al., "Flamingo: a Visual Language Model for Few-Shot Learning" (2022). Latents attend to
the features and to themselves. OpenFlamingo has 8 heads of 64 and "gelu"; IDEFICS has "relu", and
norms of queries and keys in its larger model.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx

from mmjax.connectors.base import (
    CONNECTORS,
    Connector,
    ConnectorConfig,
    ConnectorError,
    Grid,
    all_valid,
    at_least_one,
    make_connector,
)
from mmjax.connectors.linear import LINEAR, LinearConfig
from mmjax.connectors.mlp import MLPConfig
from mmjax.connectors.resampler import Resampler
from mmjax.nn.stack import BlockConfig
from mmjax.typing import Array, Bool, Float


@dataclasses.dataclass(frozen=True)
class PerceiverConfig(ConnectorConfig):
    """Its defaults are Flamingo's. It is as wide as the features.

    Attributes:
      latents: number of them, and of the tokens made of an image or clip.
      depth, heads, head_dim: of the transformer.
      mlp_ratio: by how much its MLPs are wider than the features.
      activation: a name in `mmjax.nn.mlp.ACTIVATIONS`.
      norm_eps: of all layer norms.
      qk_norm: whether queries and keys are normalised over each head's width.
      frames: images of a clip. Where there are several, a vector is learned for each place in time
        and added to the features of the frame.
      projection: of the latents to the width of the language model; None: there is none, as before
        cross-attention, and the widths have to agree.
    """

    latents: int = 64
    depth: int = 6
    heads: int = 16
    head_dim: int = 96
    mlp_ratio: int = 4
    activation: str = "relu_squared"
    norm_eps: float = 1e-5
    qk_norm: bool = False
    frames: int = 1
    projection: LinearConfig | MLPConfig | None = LINEAR
    name: str = dataclasses.field(default="perceiver", init=False)

    def __post_init__(self):
        at_least_one(latents=self.latents, depth=self.depth, frames=self.frames)

    def tokens(self, grid: Grid, extra: int = 0) -> int:
        return self.latents


@CONNECTORS.register("perceiver")
class Perceiver(Connector):
    """Each latent becomes a token. Features that do not count are not attended to."""

    def __init__(self, config: PerceiverConfig, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.config = config
        if config.projection is None and inputs != outputs:
            raise ConnectorError(
                f"The connector {config.name!r} without a projection is as wide as the features, "
                f"{inputs}, but the language model is {outputs} wide: give it a projection."
            )
        init = nnx.initializers.normal(0.02)
        self.time = (
            nnx.Param(init(rngs.params(), (config.frames, inputs), jnp.float32))
            if config.frames > 1
            else None
        )
        block = BlockConfig(
            width=inputs,
            heads=config.heads,
            head_dim=config.head_dim,
            mlp_width=config.mlp_ratio * inputs,
            activation=config.activation,
            norm="layernorm",
            norm_eps=config.norm_eps,
            qk_norm="layernorm" if config.qk_norm else None,
            qkv_bias=False,
            out_bias=False,
            mlp_bias=False,
        )
        self.resampler = Resampler(block, latents=config.latents, depth=config.depth, rngs=rngs)
        self.projection = (
            None
            if config.projection is None
            else make_connector(config.projection, inputs, outputs, rngs=rngs)
        )

    def __call__(
        self, features: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None, grid: Grid
    ) -> tuple[Float[Array, "b m e"], Bool[Array, "b m"]]:
        frames = self.config.frames
        if features.shape[1] % frames:
            raise ConnectorError(
                f"{features.shape[1]} features are not those of {frames} frames: each has as many."
            )
        if self.time is not None:
            clips = features.reshape(features.shape[0], frames, -1, features.shape[2])
            time = self.time[...].astype(features.dtype)
            features = (clips + time[:, None]).reshape(features.shape)
        tokens = self.resampler(features, mask)
        valid = all_valid(tokens)
        return (tokens, valid) if self.projection is None else self.projection(tokens, valid, grid)
