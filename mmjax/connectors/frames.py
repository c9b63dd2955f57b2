"""The frames of a clip, or the tiles of an image, each through another connector.

A learned vector is added to the tokens of each, which says where in the clip it stands, as
Flamingo's time embeddings do (Alayrac et al., 2022), and the tile positions of Llama 3.2 Vision.
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
    at_least_one,
    make_connector,
)
from mmjax.nn.norm import NORMS
from mmjax.typing import Array, Bool, Float


@dataclasses.dataclass(frozen=True)
class FramesConfig(ConnectorConfig):
    """
    Attributes:
      count: of the frames.
      each: the connector that reads one of them.
      norm: of the tokens with their vectors, a name in `mmjax.nn.norm.NORMS`: what gated
        cross-attention looks at should be of one size, as the tokens of Flamingo's resampler are,
        which ends with a "layernorm". None: none.
    """

    count: int
    each: ConnectorConfig
    norm: str | None = None
    name: str = dataclasses.field(default="frames", init=False)

    def __post_init__(self):
        at_least_one(count=self.count)
        if self.each.frames != 1:
            raise ConnectorError(
                f"The connector {self.each.name!r} reads {self.each.frames} frames itself: take it "
                "as it is, or with frames=1."
            )

    @property
    def frames(self) -> int:
        return self.count

    @property
    def names_words(self) -> bool:
        return self.each.names_words

    def tokens(self, grid: Grid, extra: int = 0) -> int:
        return self.count * self.each.tokens(grid, extra)


@CONNECTORS.register("frames")
class Frames(Connector):
    """Tokens are those of the frames, one after the other."""

    def __init__(self, config: FramesConfig, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.config = config
        self.each = make_connector(config.each, inputs, outputs, rngs=rngs)
        init = nnx.initializers.normal(outputs**-0.5)
        self.position = nnx.Param(init(rngs.params(), (config.count, outputs), jnp.float32))
        self.norm = None if config.norm is None else NORMS[config.norm](outputs, eps=1e-5)

    def __call__(
        self, features: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None, grid: Grid
    ) -> tuple[Float[Array, "b m e"], Bool[Array, "b m"]]:
        tokens, valid = self.each(*self._apart(features, mask), grid)
        count, width = tokens.shape[1:]
        clips = tokens.reshape(-1, self.config.count, count, width)
        clips = clips + self.position[...].astype(tokens.dtype)[:, None]
        if self.norm is not None:
            clips = self.norm(clips)
        return clips.reshape(len(features), -1, width), valid.reshape(len(features), -1)

    def name(
        self, features: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None, grid: Grid
    ) -> Float[Array, "b m v"]:
        shares = self.each.name(*self._apart(features, mask), grid)
        return shares.reshape(len(features), -1, shares.shape[-1])

    def _apart(self, features: Array, mask: Array | None) -> tuple[Array, Array | None]:
        """Each frame a row of its own."""
        count = self.config.count
        if features.shape[1] % count:
            raise ConnectorError(f"{features.shape[1]} features are not those of {count} frames.")
        rows = len(features) * count
        features = features.reshape(rows, -1, features.shape[-1])
        return features, None if mask is None else mask.reshape(rows, -1)
