"""Where a token stands: learned and sine-cosine tables (rotary embeddings are in `rope`)."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmjax.nn.resample import RESAMPLERS
from mmjax.registry import Registry
from mmjax.typing import Array, Float

POSITIONS: Registry[type[nnx.Module]] = Registry("position embedding")


@POSITIONS.register("learned")
class LearnedPosition(nnx.Module):
    """A learned vector for each place of a grid, interpolated to other grids.

    Args:
      grid: (rows, columns) the table is made for.
      prefix: number of tokens before the patches (the class token) that have one as well.
      width: of a token.
      method: of interpolation; a name in `mmjax.nn.resample.RESAMPLERS`.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        prefix: int,
        width: int,
        *,
        method: str = "bicubic",
        rngs: nnx.Rngs,
    ):
        self.grid = grid
        self.prefix = prefix
        self.method = method
        init = nnx.initializers.normal(1 / math.sqrt(width))  # as in big_vision
        shape = (prefix + grid[0] * grid[1], width)
        self.embedding = nnx.Param(init(rngs.params(), shape, jnp.float32))

    def __call__(self, grid: tuple[int, int]) -> Float[Array, "n d"]:
        """Vectors for the prefix and for a grid of patches, row by row."""
        table = self.embedding[...]
        if grid == self.grid:
            return table
        patches = interpolate_grid(table[self.prefix :], self.grid, grid, self.method)
        return jnp.concatenate([table[: self.prefix], patches])


@POSITIONS.register("sincos2d")
class SinCosPosition(nnx.Module):
    """Fixed sines and cosines of both coordinates; the prefix gets zeros. No parameters."""

    def __init__(
        self,
        grid: tuple[int, int],
        prefix: int,
        width: int,
        *,
        method: str = "bicubic",  # computed for any grid: there is nothing to interpolate
        rngs: nnx.Rngs,
    ):
        if width % 4 or width < 8:
            raise ValueError(f"Sine-cosine positions need a width of 8, 12, 16, ..., not {width}.")
        self.prefix = prefix
        self.width = width

    def __call__(self, grid: tuple[int, int]) -> Float[Array, "n d"]:
        patches = sincos2d(grid, self.width)
        return jnp.asarray(np.pad(patches, ((self.prefix, 0), (0, 0))))


def sincos2d(grid: tuple[int, int], width: int, temperature: float = 10_000.0) -> np.ndarray:
    """[rows * columns, width] float32: sin x, cos x, sin y, cos y at width / 4 frequencies.

    As in big_vision (`models/vit.py`, posemb_sincos_2d), which follows MoCo v3. MAE has another
    spacing of the frequencies and puts y first.
    """
    y, x = np.mgrid[: grid[0], : grid[1]]
    steps = np.arange(width // 4) / (width // 4 - 1)
    omega = 1.0 / temperature**steps
    y, x = (np.outer(axis.ravel(), omega) for axis in (y, x))
    table = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)
    return table.astype(np.float32)


def interpolate_grid(
    table: Float[Array, "*batch n d"],
    source: tuple[int, int],
    target: tuple[int, int],
    method: str = "bicubic",
) -> Float[Array, "*batch m d"]:
    """Resample a table of vectors from one grid to another, in float32.

    Args:
      method: a name in `mmjax.nn.resample.RESAMPLERS`. "bicubic" is what `interpolate_pos_encoding`
        of most vision models in transformers does (torch's, with align_corners=False).
    """
    rows = jnp.asarray(RESAMPLERS[method](source[0], target[0]))
    columns = jnp.asarray(RESAMPLERS[method](source[1], target[1]))
    *batch, _, width = table.shape
    grid = table.astype(jnp.float32).reshape(*batch, *source, width)
    grid = jnp.einsum("rh,...hwd,cw->...rcd", rows, grid, columns, precision="highest")
    return grid.reshape(*batch, target[0] * target[1], width).astype(table.dtype)
