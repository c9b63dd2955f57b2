"""How sure a score is: 95% intervals, always drawn alike."""

from __future__ import annotations

import numpy as np

LEVEL = 0.95
# Of the normal distribution, at (1 + LEVEL) / 2.
_Z = 1.959963984540054
RESAMPLES = 1000
_SEED = 0
_CHUNK = 64


def wilson(share: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's score interval of shares of `count` independent trials (Wilson 1927).

    Unlike a bootstrap it has a width where all trials came out alike. A mean of scores between 0
    and 1 varies less than a share, so that the interval holds for those as well.

    Args:
      share, count: of one shape; NaN where the count is 0.

    Returns:
      The lower and the upper end, of that shape.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        middle = share + _Z**2 / (2 * count)
        reach = _Z * np.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
        scale = 1 + _Z**2 / count
        return (middle - reach) / scale, (middle + reach) / scale


def resampled(totals: np.ndarray) -> np.ndarray:
    """Sums over clusters drawn with replacement, as many as there are (Efron 1979).

    What is computed of the sums, differences of two conditions for instance, is thereby computed on
    the same draws.

    Args:
      totals: [C, ...], sums over what belongs to each cluster: all questions about an image.

    Returns:
      [RESAMPLES, ...]; the same at each call.
    """
    clusters = len(totals)
    flat = totals.reshape(clusters, -1)
    rng = np.random.default_rng(_SEED)
    sums = []
    for start in range(0, RESAMPLES, _CHUNK):
        drawn = rng.integers(clusters, size=(min(_CHUNK, RESAMPLES - start), clusters))
        counts = np.stack([np.bincount(row, minlength=clusters) for row in drawn])
        sums.append(counts @ flat)
    return np.concatenate(sums).reshape(RESAMPLES, *totals.shape[1:])


def percentiles(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ends of the interval of resampled values [RESAMPLES, ...].

    Draws that leave a value undefined (NaN) do not count; NaN if all do.
    """
    undefined = np.isnan(values).all(axis=0)
    tails = np.array([(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    low, high = np.nanquantile(np.where(undefined, 0.0, values), tails, axis=0)
    return np.where(undefined, np.nan, low), np.where(undefined, np.nan, high)
