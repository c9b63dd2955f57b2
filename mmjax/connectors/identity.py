"""Features are tokens as they are: for encoders that are as wide as the language model."""

from __future__ import annotations

import dataclasses

from flax import nnx

from mmjax.connectors.base import (
    CONNECTORS,
    Connector,
    ConnectorConfig,
    ConnectorError,
    Grid,
    all_valid,
)
from mmjax.typing import Array, Bool, Float


@dataclasses.dataclass(frozen=True)
class IdentityConfig(ConnectorConfig):
    """There is nothing to choose."""

    name: str = dataclasses.field(default="identity", init=False)

    def tokens(self, grid: Grid, extra: int = 0) -> int:
        return extra + grid[0] * grid[1]


@CONNECTORS.register("identity")
class IdentityConnector(Connector):
    """Each feature is a token; no parameters."""

    def __init__(self, config: IdentityConfig, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        if inputs != outputs:
            raise ConnectorError(
                f"The connector {config.name!r} leaves features as wide as they are, {inputs}, but "
                f"the language model is {outputs} wide: choose another, such as 'linear'."
            )

    def __call__(
        self, features: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None, grid: Grid
    ) -> tuple[Float[Array, "b m e"], Bool[Array, "b m"]]:
        return features, all_valid(features) if mask is None else mask
