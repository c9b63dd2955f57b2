"""Memory is used again only when no array, view or JAX array refers to it."""

import gc
import pickle

import jax
import numpy as np

from mmjax.data.buffers import BufferPool


def address(array):
    return array.__array_interface__["data"][0]


def test_memory_returns_when_the_last_view_is_gone():
    pool = BufferPool()
    first = pool.empty((4, 3))
    place = address(first)
    view = first[1:].T
    del first
    second = pool.empty((4, 3))
    assert address(second) != place  # the view still holds it
    del view
    gc.collect()
    assert address(pool.empty((3, 4))) == place
    assert pool.empty((4, 3)).flags.writeable
    assert pickle.loads(pickle.dumps(pool)).empty((2,)).shape == (2,)


def test_jax_arrays_keep_their_values():
    """On CPU JAX may alias the memory, on other devices it copies later: both hold a reference."""
    pool = BufferPool()
    kept = []
    for step in range(30):
        array = pool.empty((64, 1024))
        array[:] = step
        kept.append(jax.device_put(array))
        del array
    for step, array in enumerate(kept):
        assert (np.asarray(array) == step).all()
