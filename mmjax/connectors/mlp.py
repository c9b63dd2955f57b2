"""Linear maps with activations between them: the connector of LLaVA-1.5 (two of them).

Liu et al., "Improved Baselines with Visual Instruction Tuning" (2023).
"""

from __future__ import annotations

import dataclasses
import itertools

from flax import nnx

from mmjax.connectors.base import (
    CONNECTORS,
    Connector,
    ConnectorConfig,
    ConnectorError,
    Grid,
    all_valid,
)
from mmjax.nn.linear import Linear
from mmjax.nn.mlp import ACTIVATIONS
from mmjax.typing import Array, Bool, Float


@dataclasses.dataclass(frozen=True)
class MLPConfig(ConnectorConfig):
    """
    Attributes:
      layers: number of linear maps, at least 2; 2 in LLaVA-1.5.
      hidden: width between them; that of the language model if None, as in LLaVA-1.5.
      activation: a name in `mmjax.nn.mlp.ACTIVATIONS`.
      bias: whether the maps have biases.
    """

    layers: int = 2
    hidden: int | None = None
    activation: str = "gelu"
    bias: bool = True
    name: str = dataclasses.field(default="mlp", init=False)

    def __post_init__(self):
        if self.layers < 2:
            raise ConnectorError(
                f"An MLP has at least 2 layers, not layers={self.layers}: one is the connector "
                "'linear'."
            )

    def tokens(self, grid: Grid, extra: int = 0) -> int:
        return extra + grid[0] * grid[1]


@CONNECTORS.register("mlp")
class MLPConnector(Connector):
    """Each feature becomes a token."""

    def __init__(self, config: MLPConfig, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        hidden = outputs if config.hidden is None else config.hidden
        widths = [inputs, *[hidden] * (config.layers - 1), outputs]
        self.activation = ACTIVATIONS[config.activation]
        self.linears = nnx.List(
            Linear(before, after, bias=config.bias, rngs=rngs)
            for before, after in itertools.pairwise(widths)
        )

    def __call__(
        self, features: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None, grid: Grid
    ) -> tuple[Float[Array, "b m e"], Bool[Array, "b m"]]:
        first, *others = self.linears
        tokens = first(features)
        for layer in others:
            tokens = layer(self.activation(tokens))
        return tokens, all_valid(tokens) if mask is None else mask
