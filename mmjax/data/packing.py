"""Which samples share a row, or a batch: pure functions of their sizes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def pack(sizes: Sequence[tuple[int, ...]], limits: tuple[int, ...]) -> list[list[int]]:
    """First-fit-decreasing bin packing in several dimensions.

    The largest come first: by the sum of what they take of each limit, weighted by how scarce that
    is ("FFDSum" of Panigrahy et al., Heuristics for Vector Bin Packing, 2011).

    Args:
      sizes: of each sample, such as (tokens, pictures, supervised tokens).
      limits: of a row, in the same dimensions.

    Returns:
      The samples of each row, by number.

    Raises:
      ValueError: a sample that is larger than a row.
    """
    if not sizes:
        return []
    sized = np.asarray(sizes, np.int64)
    if (sized > limits).any():
        raise ValueError(f"A sample of {sized.max(0)} does not fit into a row of {limits}.")
    # A limit of 0 is one that nothing takes of.
    scarce = sized.sum(0) / np.maximum(limits, 1)
    order = np.argsort(-(sized / np.maximum(limits, 1)) @ scarce, kind="stable")
    left = np.tile(np.asarray(limits, np.int64), (len(sized), 1))
    rows: list[list[int]] = []
    for sample in order:
        # One row more than there are: it is empty, and so the sample fits at the latest there.
        fits = (left[: len(rows) + 1] >= sized[sample]).all(1)
        row = int(fits.argmax())
        if row == len(rows):
            rows.append([])
        rows[row].append(int(sample))
        left[row] -= sized[sample]
    return rows


def group(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Batches of `size` samples of similar length; their number must divide by `size`."""
    order = np.argsort(np.asarray(lengths), kind="stable")
    return [[int(sample) for sample in batch] for batch in order.reshape(-1, size)]
