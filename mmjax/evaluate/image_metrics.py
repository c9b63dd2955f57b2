"""How near images are to others, one by one and as distributions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.typing import Array, Float

# Of Wang et al. (2004): a Gaussian window of 11 x 11 pixels, and two constants.
_SIGMA, _RADIUS = 1.5, 5
_K1, _K2 = 0.01, 0.03


def psnr(
    made: Float[Array, "b h w c"], images: Float[Array, "b h w c"], *, peak: float
) -> Float[Array, " b"]:
    """The peak signal-to-noise ratio in dB; 100 where they are equal.

    Args:
      peak: the range of the values.
    """
    squares = jnp.mean(jnp.square(made - images), axis=(1, 2, 3))
    return 10 * jnp.log10(peak**2 / jnp.maximum(squares, 1e-10 * peak**2))


def ssim(
    made: Float[Array, "b h w c"], images: Float[Array, "b h w c"], *, peak: float
) -> Float[Array, " b"]:
    """Structural similarity (Wang et al., "Image Quality Assessment: From Error Visibility to
    Structural Similarity", 2004), the mean over channels and all whole windows.

    Args:
      peak: the range of the values.

    Raises:
      ValueError: if images have no whole window.
    """
    height, width = images.shape[1:3]
    if min(height, width) <= 2 * _RADIUS:
        raise ValueError(
            f"Images of {height} x {width} pixels have no window of {2 * _RADIUS + 1} pixels: "
            "structural similarity is not defined."
        )
    down, across = _window(height), _window(width)

    def blur(x: Array) -> Array:
        return jnp.einsum("ih,jw,bhwc->bijc", down, across, x, precision="highest")

    one, other = blur(made), blur(images)
    variances = blur(jnp.square(made)) - one**2 + blur(jnp.square(images)) - other**2
    covariance = blur(made * images) - one * other
    c1, c2 = (_K1 * peak) ** 2, (_K2 * peak) ** 2
    likeness = (2 * one * other + c1) * (2 * covariance + c2)
    likeness /= (one**2 + other**2 + c1) * (variances + c2)
    return jnp.mean(likeness, axis=(1, 2, 3))


def _window(size: int) -> np.ndarray:
    """[size - 10, size]: each row has the Gaussian of one place."""
    offsets = np.arange(size) - np.arange(size - 2 * _RADIUS)[:, None] - _RADIUS
    weights = np.exp(-((offsets / _SIGMA) ** 2) / 2) * (np.abs(offsets) <= _RADIUS)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def frechet_distance(made: Float[np.ndarray, "n d"], others: Float[np.ndarray, "m d"]) -> float:
    """The Frechet distance of the Gaussians with the means and covariances of two sets of features:
    |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)) (Heusel et al., 2017; FID is this of Inception).

    Raises:
      ValueError: if a set has fewer than two features.
    """
    if min(len(made), len(others)) < 2:
        raise ValueError("A covariance needs two features or more.")
    made, others = np.asarray(made, np.float64), np.asarray(others, np.float64)
    one, other = np.cov(made, rowvar=False), np.cov(others, rowvar=False)
    # The trace of (C C')^(1/2) is that of the square root of the symmetric R C' R, R = C^(1/2).
    values, vectors = np.linalg.eigh(one)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    shared = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ other @ root), 0)).sum()
    apart = np.square(made.mean(axis=0) - others.mean(axis=0)).sum()
    return float(max(apart + np.trace(one) + np.trace(other) - 2 * shared, 0.0))


def to_unit(
    images: Float[Array, "b h w c"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "b h w c"]:
    """Normalised images, as levels from 0 to 1; what is beyond is cut."""
    return jnp.clip(images.astype(jnp.float32) * np.array(std) + np.array(mean), 0.0, 1.0).astype(
        jax.numpy.float32
    )
