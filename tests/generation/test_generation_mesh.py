"""The same tokens on one device and on eight, with weights and caches divided among them."""

import jax
import numpy as np
import pytest
import writers
from test_generator import compilations, model  # noqa: F401 (a fixture)

from mmjax import sharding
from mmjax.generation import Generator, programs

SHAPE = sharding.MeshConfig(data=2, fsdp=2, tensor=2)
OPTIONS = dict(max_new_tokens=12, repetition_penalty=1.2)


@pytest.fixture(scope="module")
def generators(model):  # noqa: F811
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "FSDP_MIN_SIZE", 2)  # tiny parameters are sharded too
        yield Generator(model), Generator(model, mesh=sharding.make_mesh(SHAPE))


def test_weights_are_divided(generators):
    leaves = [leaf for leaf in generators[1]._stepping.leaves if leaf.ndim > 1]
    shares = [leaf.size // leaf.addressable_shards[0].data.size for leaf in leaves]
    # The 7 matrices of 2 layers over tensor and fsdp; token table and head over fsdp.
    assert sorted(shares) == [2] * 2 + [4] * 14


def test_same_tokens_on_a_mesh(generators, monkeypatch):
    options = dict(eos_id=[5, 50], temperature=1.5, key=jax.random.key(0), **OPTIONS)
    single = generators[0](writers.prompts(), **options)
    states, decode = [], programs.decode

    def watched(structure, leaves, state, *args):
        states.append(jax.tree.map(lambda x: x.sharding.shard_shape(x.shape), state))
        return decode(structure, leaves, state, *args)

    monkeypatch.setattr(programs, "decode", watched)
    with compilations() as compiled:
        spread = generators[1](writers.prompts(), **options, stream=lambda rows: None)
    np.testing.assert_array_equal(spread.tokens, single.tokens)
    np.testing.assert_array_equal(spread.lengths, single.lengths)
    # A state whose layout changed from call to call would compile again. What else is compiled here
    # makes keys of one key.
    assert len(states) == OPTIONS["max_new_tokens"] - 1
    before = len(compiled)
    with compilations() as compiled:
        generators[1](writers.prompts(), **options, stream=lambda rows: None)
    assert not compiled and before <= 5
    for state in states:
        for layer in state.cache.layers:
            # [B, heads, slots, head_dim]: the batch over data and fsdp, heads over tensor.
            assert layer.key[:2] == layer.value[:2] == (1, 1)


def test_beams_that_do_not_divide_on_a_mesh(generators):
    """Three rows over four shards."""
    rows = writers.prompts()[:3]
    single, spread = (generator(rows, num_beams=2, **OPTIONS) for generator in generators)
    np.testing.assert_array_equal(spread.tokens, single.tokens)
    np.testing.assert_array_equal(spread.lengths, single.lengths)
