"""Tiny models, made once."""

import jax
import pytest
import writers

from mmjax.generation import Generator


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Programs that run once are compiled with less effort."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def both(tmp_path_factory):
    """name -> (model of transformers, our generator with its weights)"""
    cache = {}

    def make(name):
        if name not in cache:
            theirs, ours = writers.pair(name, tmp_path_factory.mktemp(name))
            cache[name] = theirs, Generator(ours)
        return cache[name]

    return make
