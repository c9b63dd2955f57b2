"""Light networks of convolutions that leave a quarter of the tokens: connectors of MobileVLM.

"ldp": Chu et al., "MobileVLM: A Fast, Strong and Open Vision Language Assistant for Mobile Devices"
(2023). "ldp_v2": Chu et al., "MobileVLM V2: Faster and Stronger Baseline for Vision Language Model"
(2024). Details are those of the authors' implementation (Meituan-AutoML/MobileVLM), which has the
blocks of the first from torchvision's MobileNetV3.
"""

from __future__ import annotations

import dataclasses

import jax
from flax import nnx

from mmjax.connectors.base import (
    CONNECTORS,
    Connector,
    ConnectorConfig,
    Grid,
    all_valid,
    at_least_one,
    no_extra,
    only_valid,
    whole_grid,
)
from mmjax.connectors.pooling import pool, pooled_tokens
from mmjax.nn.conv import DepthwiseConv, SqueezeExcite
from mmjax.nn.linear import Linear
from mmjax.nn.mlp import ACTIVATIONS, MLP
from mmjax.nn.norm import NORMS
from mmjax.typing import Array, Bool, Float


@dataclasses.dataclass(frozen=True)
class LDPConfig(ConnectorConfig):
    """There is nothing to choose."""

    name: str = dataclasses.field(default="ldp", init=False)

    def tokens(self, grid: Grid, extra: int = 0) -> int:
        no_extra(extra, self.name)
        return -(-grid[0] // 2) * -(-grid[1] // 2)


@CONNECTORS.register("ldp")
class LDP(Connector):
    """An MLP, a block of MobileNetV3, and one that leaves every second place of every second row.

    Features that do not count are zeros; a token counts if the feature in its place does.
    """

    def __init__(self, config: LDPConfig, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.config = config
        self.mlp = MLP(inputs, outputs, activation="gelu", outputs=outputs, rngs=rngs)
        self.block = MobileBlock(outputs, rngs=rngs)
        self.halve = MobileBlock(outputs, stride=2, rngs=rngs)

    def __call__(
        self, features: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None, grid: Grid
    ) -> tuple[Float[Array, "b m e"], Bool[Array, "b m"]]:
        batch, length, _ = features.shape
        whole_grid(length, grid, self.config.name)
        x = only_valid(self.mlp(features), mask)
        x = self.halve(self.block(x.reshape(batch, *grid, -1)))
        tokens = x.reshape(batch, -1, x.shape[-1])
        if mask is None:
            return tokens, all_valid(tokens)
        return tokens, mask.reshape(batch, *grid)[:, ::2, ::2].reshape(batch, -1)


class MobileBlock(nnx.Module):
    """The inverted residual of MobileNetV3 (Howard et al., 2019), no wider within.

    Its norms are layer norms. With a stride there is nothing that its result could be added to.
    """

    def __init__(self, width: int, *, stride: int = 1, rngs: nnx.Rngs):
        def norm() -> nnx.Module:
            return NORMS["layernorm"](width, eps=1e-5)

        self.residual = stride == 1
        self.activation = ACTIVATIONS["hard_swish"]
        self.conv, self.conv_norm = DepthwiseConv(width, stride=stride, rngs=rngs), norm()
        self.gate = SqueezeExcite(
            width, _eights(width // 4), activation="relu", gate=jax.nn.hard_sigmoid, rngs=rngs
        )
        self.project, self.project_norm = Linear(width, width, bias=False, rngs=rngs), norm()

    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b i j d"]:
        y = self.gate(self.activation(self.conv_norm(self.conv(x))))
        y = self.project_norm(self.project(y))
        return x + y if self.residual else y


def _eights(width: int) -> int:
    """The multiple of 8 nearest to a width that is not below 9/10 of it."""
    rounded = max(8, (width + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * width else rounded + 8


@dataclasses.dataclass(frozen=True)
class LDPv2Config(ConnectorConfig):
    """
    Attributes:
      grid: of the tokens, (down, across).
    """

    grid: Grid = (12, 12)
    name: str = dataclasses.field(default="ldp_v2", init=False)

    def __post_init__(self):
        at_least_one(grid=self.grid)

    def tokens(self, grid: Grid, extra: int = 0) -> int:
        return pooled_tokens(self.name, self.grid, grid, extra)


@CONNECTORS.register("ldp_v2")
class LDPv2(Connector):
    """An MLP, averaging, and a convolution that adds to each mean what is around it.

    Features that do not count are left out of the means.
    """

    def __init__(self, config: LDPv2Config, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.config = config
        self.mlp = MLP(inputs, outputs, activation="gelu", outputs=outputs, rngs=rngs)
        self.around = DepthwiseConv(outputs, bias=True, rngs=rngs)

    def __call__(
        self, features: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None, grid: Grid
    ) -> tuple[Float[Array, "b m e"], Bool[Array, "b m"]]:
        target = self.config.grid
        whole_grid(features.shape[1], grid, self.config.name)
        self.config.tokens(grid)  # raises where the grid is too small
        means, mask = pool(self.mlp(features), mask, grid, target)
        around = self.around(means.reshape(means.shape[0], *target, -1))
        return means + around.reshape(means.shape), mask
