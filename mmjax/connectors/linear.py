"""One linear map: the connector of LLaVA.

Liu et al., "Visual Instruction Tuning" (2023).
"""

from __future__ import annotations

import dataclasses

from flax import nnx

from mmjax.connectors.base import CONNECTORS, Connector, ConnectorConfig, Grid, all_valid
from mmjax.nn.linear import Linear
from mmjax.typing import Array, Bool, Float


@dataclasses.dataclass(frozen=True)
class LinearConfig(ConnectorConfig):
    """
    Attributes:
      bias: whether the map has one.
    """

    bias: bool = True
    name: str = dataclasses.field(default="linear", init=False)

    def tokens(self, grid: Grid, extra: int = 0) -> int:
        return extra + grid[0] * grid[1]


# What other connectors end with where nothing else is said.
LINEAR = LinearConfig()


@CONNECTORS.register("linear")
class LinearConnector(Connector):
    """Each feature becomes a token."""

    def __init__(self, config: LinearConfig, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.projection = Linear(inputs, outputs, bias=config.bias, rngs=rngs)

    def __call__(
        self, features: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None, grid: Grid
    ) -> tuple[Float[Array, "b m e"], Bool[Array, "b m"]]:
        tokens = self.projection(features)
        return tokens, all_valid(tokens) if mask is None else mask
