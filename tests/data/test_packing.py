"""Bin packing of samples, and batches of similar length."""

import numpy as np
import pytest

from mmjax.data.packing import group, pack


@pytest.mark.parametrize("limits", [(100, 4, 30), (100, 100, 100), (100, 2, 100)])
def test_rows_hold_every_sample_once_and_stay_within_every_limit(limits):
    rng = np.random.default_rng(0)
    columns = [rng.integers(1, 60, 300), rng.integers(0, 3, 300), rng.integers(1, 20, 300)]
    sizes = np.stack(columns, axis=1)
    rows = pack([tuple(size) for size in sizes], limits)
    assert sorted(sample for row in rows for sample in row) == list(range(300))
    sums = np.stack([sizes[row].sum(0) for row in rows])
    assert (sums <= limits).all()
    # With fewer rows nobody can do.
    least = (sizes.sum(0) / limits).max()
    assert least <= len(rows) < 1.05 * least + 1


def test_no_row_has_room_for_what_came_later():
    """As first-fit has it: samples that fit together are not apart."""
    rows = pack([(6, 0, 1), (5, 0, 1), (4, 0, 1), (5, 0, 1)], (10, 1, 10))
    assert rows == [[0, 2], [1, 3]]
    assert pack([], (10, 1, 10)) == []
    with pytest.raises(ValueError, match="does not fit"):
        pack([(11, 0, 1)], (10, 1, 10))


def test_groups_are_of_similar_length():
    lengths = np.random.default_rng(0).permutation(40)
    batches = group(lengths, 8)
    assert sorted(sample for batch in batches for sample in batch) == list(range(40))
    assert all(np.ptp(lengths[batch]) == 7 for batch in batches)
