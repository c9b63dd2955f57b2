"""Which samples share a row, or a batch: pure functions of their sizes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def pack(sizes: Sequence[tuple[int, ...]], limits: tuple[int, ...]) -> list[list[int]]:
    """Bin packing in several dimensions: the better of two heuristics.

    Both take the largest first: by the sum of what they take of each limit, weighted by how scarce
    that is ("FFDSum" of Panigrahy et al., Heuristics for Vector Bin Packing, 2011). One puts each
    sample into the first row that has room. The other fills row after row (as "minimum bin slack"
    of Gupta and Ho, 1999): where few samples make a row, as with images of hundreds of tokens,
    which ones they are matters.

    Args:
      sizes: of each sample, such as (tokens, pictures, supervised tokens); the first is what rows
        should be full of.
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
    return min(_first_fit(sized, order, limits), _row_by_row(sized, order, limits), key=len)


def _first_fit(sized: np.ndarray, order: np.ndarray, limits: tuple[int, ...]) -> list[list[int]]:
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


def _row_by_row(sized: np.ndarray, order: np.ndarray, limits: tuple[int, ...]) -> list[list[int]]:
    """The largest sample left, and of the others those that fill its row best."""
    rows: list[list[int]] = []
    while len(order):
        room = np.asarray(limits, np.int64) - sized[order[0]]
        fitting = 1 + np.flatnonzero((sized[order[1:]] <= room).all(1))
        chosen = fitting[_fullest(sized[order[fitting], 0].tolist(), int(room[0]))]
        if (sized[order[chosen]].sum(0) > room).any():
            # Full of tokens, but with too much of something else.
            chosen = []
            for place in fitting:
                if (sized[order[place]] <= room).all():
                    chosen.append(place)
                    room = room - sized[order[place]]
        taken = [0, *chosen]
        rows.append(order[taken].tolist())
        order = np.delete(order, taken)
    return rows


def _fullest(sizes: Sequence[int], room: int) -> list[int]:
    """Which of these sizes have the largest sum that is not above `room`."""
    # Bit n of an integer says whether some of the sizes so far add up to n.
    within = (1 << (room + 1)) - 1
    sums = [1]
    for size in sizes:
        sums.append((sums[-1] | sums[-1] << size) & within)
        if sums[-1] >> room:
            break
    left = sums[-1].bit_length() - 1
    chosen = []
    for number in range(len(sums) - 2, -1, -1):
        if not sums[number] >> left & 1:
            chosen.append(number)
            left -= sizes[number]
    return chosen


def group(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Batches of `size` samples of similar length; their number must divide by `size`."""
    order = np.argsort(np.asarray(lengths), kind="stable")
    return [[int(sample) for sample in batch] for batch in order.reshape(-1, size)]
