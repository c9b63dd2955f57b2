"""A discriminator of patches: which parts of an image are real.

Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks" (2017), as VQGAN
has it (Esser et al., 2021), with group norms in place of batch norms: an image's scores do not
depend on its neighbours.
"""

from __future__ import annotations

import dataclasses
import itertools

import jax
from flax import nnx

from mmjax.models.checks import check_dtype
from mmjax.nn.conv import Conv
from mmjax.nn.norm import GroupNorm
from mmjax.typing import Array, Float

EPS = 1e-6
# Of the leaky activation, below zero.
SLOPE = 0.2


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """
    Attributes:
      width: channels of the first convolution; each further one has twice as many, at most eight
        times.
      halvings: convolutions that halve the grid; two more follow. With 3 of them a score is about
        70 x 70 pixels, with 2 about 34, with 1 about 16.
      channels: of images.
      groups: of the group norms.
      dtype: of the computation.
    """

    width: int = 64
    halvings: int = 3
    channels: int = 3
    groups: int = 8
    dtype: str = "float32"

    def __post_init__(self):
        check_dtype(self.dtype)
        if self.halvings < 1:
            raise ValueError(f"halvings={self.halvings} must be 1 or more.")
        if self.width % self.groups:
            raise ValueError(f"width={self.width} does not make {self.groups} groups.")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels after each convolution but the last, which has one."""
        return tuple(self.width * min(2**number, 8) for number in range(self.halvings + 1))


class Discriminator(nnx.Module):
    """images [B, H, W, C] -> scores of patches [B, h, w] float32, above zero where real."""

    def __init__(self, config: DiscriminatorConfig, *, rngs: nnx.Rngs):
        self.config = config
        widths = (config.channels, *config.widths)
        self.convs = nnx.List(
            Conv(
                inputs,
                outputs,
                size=4,
                stride=2 if number < config.halvings else 1,
                padding=(1, 1),
                rngs=rngs,
            )
            for number, (inputs, outputs) in enumerate(itertools.pairwise(widths))
        )
        self.norms = nnx.List(
            GroupNorm(width, groups=config.groups, eps=EPS) for width in widths[2:]
        )
        self.last = Conv(widths[-1], 1, size=4, padding=(1, 1), rngs=rngs)

    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b i j"]:
        x = self.convs[0](images.astype(self.config.dtype))
        for conv, norm in zip(list(self.convs)[1:], self.norms, strict=True):
            x = norm(conv(jax.nn.leaky_relu(x, SLOPE)))
        return self.last(jax.nn.leaky_relu(x, SLOPE))[..., 0].astype("float32")
