"""Weights that resample a row of a grid: what torch's `interpolate` does, as matrices."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from mmjax.registry import Registry
from mmjax.typing import Array, Float, Int

# name -> (source, target) -> [target, source] weights; places of a grid are centres of its cells
# (torch's align_corners=False).
RESAMPLERS: Registry = Registry("interpolation")


@RESAMPLERS.register("bicubic")
def bicubic(source: int, target: int) -> np.ndarray:
    """[target, source] weights of cubic convolution (Keys, 1981) with A = -0.75, edges repeated."""
    centre = (np.arange(target) + 0.5) * source / target - 0.5
    first = np.floor(centre).astype(int)
    weights = np.zeros((target, source))
    for tap in range(-1, 3):
        place = np.clip(first + tap, 0, source - 1)
        np.add.at(weights, (np.arange(target), place), _cubic(centre - (first + tap), -0.75))
    return weights.astype(np.float32)


@RESAMPLERS.register("bicubic_antialias")
def bicubic_antialias(source: int, target: int) -> np.ndarray:
    """[target, source] weights of a cubic with A = -0.5 that widens where the grid shrinks.

    As PIL does, and torch with `antialias=True`: at the edges what remains is normalised.
    """
    scale = source / target
    centre = (np.arange(target)[:, None] + 0.5) * scale
    weights = _cubic((np.arange(source)[None] + 0.5 - centre) / max(scale, 1.0), -0.5)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


@RESAMPLERS.register("bilinear")
def bilinear(source: int, target: int) -> np.ndarray:
    """[target, source] weights of the two nearest cells, edges repeated."""
    centre = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
    distance = np.abs(np.arange(source)[None] - centre[:, None])
    return np.maximum(1 - distance, 0).astype(np.float32)


@RESAMPLERS.register("average")
def average(source: int, target: int) -> np.ndarray:
    """[target, source] weights of torch's adaptive average pooling.

    Each cell is the mean of those that it overlaps, however little.
    """
    place = np.arange(target)
    first, last = place * source // target, -(-(place + 1) * source // target)
    cells = np.arange(source)[None]
    inside = (cells >= first[:, None]) & (cells < last[:, None])
    return (inside / inside.sum(axis=1, keepdims=True)).astype(np.float32)


def _cubic(distance: np.ndarray, a: float) -> np.ndarray:
    d = np.abs(distance)
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


def bilinear_antialias(
    source: int, target: Int[Array, "*#batch"], place: Int[Array, "*#batch"]
) -> Float[Array, "*batch {source}"]:
    """Weights of one place (0 to target - 1) of a row of `target` cells, over `source` cells.

    A triangle that widens where the grid shrinks, as torch's bilinear with `antialias=True`. Both
    numbers may be traced: rows of many lengths go through one compiled function.
    """
    scale = source / target.astype(jnp.float32)
    centre = (place.astype(jnp.float32) + 0.5) * scale
    distance = jnp.arange(source) + 0.5 - centre[..., None]
    weights = jnp.maximum(0.0, 1.0 - jnp.abs(distance) / jnp.maximum(scale, 1.0)[..., None])
    return weights / jnp.sum(weights, axis=-1, keepdims=True)
