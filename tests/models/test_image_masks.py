"""Who sees which image, beside a loop over tokens and images."""

import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.models import image_masks

ENDS, IMAGES, LENGTH = (1, 4), 5, 24


def rows(seed=0, count=40):
    """Random tokens with images in any order, samples packed in rows, and padding at the end."""
    rng = np.random.default_rng(seed)
    shape = (count, LENGTH)
    tokens = rng.integers(0, 10, shape).astype(np.int32)
    place, segments = np.full(shape, -1, np.int32), np.zeros(shape, np.int32)
    parents = np.zeros(shape, np.int32)
    for row in range(count):
        at = rng.choice(LENGTH, rng.integers(0, IMAGES + 1), replace=False)
        place[row, at] = rng.permutation(IMAGES)[: len(at)]
        begins = [0, *np.sort(rng.choice(np.arange(1, LENGTH), 4, replace=False)), LENGTH]
        for number in range(4):  # the last piece is padding
            segments[row, begins[number] : begins[number + 1]] = number + 1
        parents[row][segments[row] == 4] = 2
        parents[row][segments[row] == 3] = 2
    return tokens, place, segments, parents


def expected(tokens, place, segments, parents, ends, sees):
    """[B, T, I]: from each token back through its own text, and what that continues."""
    out = np.zeros((*tokens.shape, IMAGES), bool)
    for row in range(len(tokens)):
        for now in range(LENGTH if segments[row, 0] else 0):
            own, parent = segments[row, now], parents[row, now]
            if own == 0:
                continue
            for before in range(now, -1, -1):
                here = segments[row, before] in ({own, parent} - {0})
                if here and before < now and tokens[row, before] in ends:
                    break
                if not here or place[row, before] < 0:
                    continue
                out[row, now, place[row, before]] = True
                if sees == "last":
                    break
    return out


@pytest.mark.parametrize("ends", [(), ENDS])
@pytest.mark.parametrize("sees", ["last", "all"])
@pytest.mark.parametrize("packed", [False, True])
def test_who_sees_what(ends, sees, packed):
    tokens, place, segments, parents = rows()
    given = map(jnp.asarray, (segments, parents)) if packed else (None, None)
    if not packed:
        segments, parents = np.ones_like(segments), np.zeros_like(parents)
    group, parent = image_masks.in_sight(jnp.asarray(tokens), ends, *given)
    mask = {"last": image_masks.sees_last, "all": image_masks.sees_all}[sees]
    seen = mask(jnp.asarray(place), IMAGES, 2, group, parent).dense()
    wanted = expected(tokens, place, segments, parents, ends, sees)
    assert 0 < wanted.sum() < wanted.size / 2
    np.testing.assert_array_equal(seen, np.repeat(wanted, 2, axis=2))
