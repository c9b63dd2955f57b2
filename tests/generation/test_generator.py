"""What a generator promises besides the right tokens."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import writers
from flax import nnx

import mmjax
from mmjax import params
from mmjax.generation import Generator
from mmjax.models.lm import LM, LMConfig
from mmjax.nn.rope import Rope

SAMPLING = dict(temperature=1.5, top_k=60, top_p=0.95, min_p=0.001)


def make_model(**options):
    """A small Llama whose weights numpy draws: quicker than compiling initialisers."""
    config = LMConfig(
        **{
            "vocab_size": writers.VOCABULARY,
            "max_len": 64,
            "width": 32,
            "depth": 2,
            "heads": 2,
            "mlp_width": 48,
            "activation": "silu",
            "norm_eps": 1e-5,
            "tied": False,
            "rope": Rope(theta=1e4),
            **options,
        }
    )
    graph, shapes = params.abstract(lambda: LM(config, rngs=nnx.Rngs(0)))
    draw = np.random.default_rng(0).standard_normal
    # Norms near the identity, and all else so large that texts go on changing.
    weights = {path: 0.3 * draw(s.shape) + path.endswith("scale") for path, s in shapes.items()}
    return params.merge(graph, {path: jnp.float32(value) for path, value in weights.items()})


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def generator(model):
    return Generator(model)


@contextlib.contextmanager
def compilations():
    """Yields a list that gets an entry for each program compiled within the block."""
    seen, active = [], [True]

    def listen(event, duration, **_):
        if active and event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        active.clear()


def test_prompts_come_in_any_form(generator):
    rows = writers.prompts()
    options = dict(max_new_tokens=40, eos_id=[5, 50])
    expected = generator(rows, **options).tokens
    for side in ("left", "right"):
        tokens, mask = writers.padded(rows, side)
        out = generator(jnp.asarray(tokens), mask=mask, **options).tokens
        np.testing.assert_array_equal(out, expected)
    # Padding may even stand within a prompt.
    tokens, mask = np.full((4, 30), -1), np.zeros((4, 30), bool)
    for row, ids in enumerate(rows):
        places = np.sort(np.random.default_rng(row).permutation(30)[: len(ids)])
        tokens[row, places], mask[row, places] = ids, True
    np.testing.assert_array_equal(generator(tokens, mask=mask, **options).tokens, expected)


@pytest.mark.parametrize("options", [{}, SAMPLING, {"num_beams": 3}], ids=["", "drawn", "beams"])
def test_a_row_does_not_depend_on_its_neighbours(generator, options):
    rows, drawn = writers.prompts(), "temperature" in options
    keys = jax.random.split(jax.random.key(3), len(rows))
    options = {"max_new_tokens": 40, "eos_id": [5, 50], "pad_id": 0, **options}
    together = generator(rows, **options, **({"key": keys} if drawn else {}))
    for row in (1, 2):
        key = {"key": keys[row : row + 1]} if drawn else {}
        alone = generator([rows[row]], **options, **key)
        length = together.lengths[row]
        np.testing.assert_array_equal(alone.lengths, [length])
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row, :length])
        np.testing.assert_array_equal(together.tokens[row, length:], 0)
    if drawn:
        other = generator(rows, **options, key=jax.random.split(jax.random.key(4), len(rows)))
        assert other.tokens.tolist() != together.tokens.tolist()


def test_one_key_serves_all_rows(generator):
    rows = [writers.prompts()[3]] * 4
    options = dict(max_new_tokens=40, eos_id=[5, 50], **SAMPLING)
    first = generator(rows, key=jax.random.key(0), **options).tokens.tolist()
    assert first == generator(rows, key=jax.random.PRNGKey(0), **options).tokens.tolist()
    assert len({tuple(row) for row in first}) == 4  # equal prompts, different texts


def test_lengths_share_programs(generator):
    """Prompts of 17 to 24 tokens, and caches of 33 to 48 slots, are one case each."""
    random = np.random.default_rng(0)

    def call(length, new, **options):
        prompts = random.integers(3, writers.VOCABULARY, (2, length))
        return generator(prompts, max_new_tokens=new, **options).tokens.shape

    def sampled(length, new, temperature):
        options = dict(temperature=temperature, top_p=temperature / 2, key=jax.random.key(length))
        return call(length, new, **options)

    assert sampled(20, 15, 1.0) == (2, 15)
    assert call(20, 15, num_beams=2) == (2, 15)
    with compilations() as compiled:
        assert sampled(17, 24, 0.5) == (2, 24)
        assert sampled(24, 9, 1.5) == (2, 9)
        assert call(18, 20, num_beams=2, length_penalty=0.3) == (2, 20)
    assert not compiled
    with compilations() as compiled:
        assert sampled(24, 40, 0.5) == (2, 40)
    assert len(compiled) == 2  # a longer cache: one program to read, one to write


def test_models_of_equal_structure_share_programs(model):
    graph, state = nnx.split(model)
    other = nnx.merge(graph, jax.tree.map(lambda x: 0.9 * x, state))
    rows = writers.prompts()
    first = mmjax.generate(model, rows, max_new_tokens=30)
    second_generator = Generator(other)
    with compilations() as compiled:
        second = second_generator(rows, max_new_tokens=30).tokens
    assert not compiled
    assert first.tolist() != second.tolist()


def test_streams_what_it_returns(generator):
    rows, options = writers.prompts(), dict(max_new_tokens=30, eos_id=[5, 50], **SAMPLING)
    whole = generator(rows, key=jax.random.key(5), **options)
    assert whole.lengths.min() < whole.lengths.max()
    for every in (1, 7):
        parts = []
        out = generator(
            rows, key=jax.random.key(5), stream=parts.append, stream_every=every, **options
        )
        np.testing.assert_array_equal(out.tokens, whole.tokens)
        for row, length in enumerate(whole.lengths):
            written = [token for part in parts for token in part[row]]
            assert written == whole.tokens[row, :length].tolist()
        assert max(len(row) for part in parts for row in part) == every
        assert len(parts) == 1 + -(-(int(whole.lengths.max()) - 1) // every)


def test_stop_strings(generator):
    def decode(ids):
        return "".join(f"<{token}>" for token in ids)

    rows = writers.prompts()
    free = generator(rows, max_new_tokens=30).tokens
    # Pieces of what rows 0 and 2 write, across the borders of tokens.
    stops = [f"{free[0, 11]}><{free[0, 12]}", f">{'><'.join(map(str, free[2, 20:23]))}"[1:-1]]
    expected = []
    for row in free.tolist():
        ends = (n for n in range(1, 31) if any(s in decode(row[:n]) for s in stops))
        expected.append(next(ends, 30))
    print(free, stops, expected)
    assert expected[0] <= 13 and expected[2] <= 23 and max(expected) == 30
    parts = []
    for stream in (None, parts.append):
        out = generator(
            rows, max_new_tokens=30, stop_strings=stops, decode=decode, pad_id=1, stream=stream
        )
        assert out.lengths.tolist() == expected
        for row, end in enumerate(expected):
            assert out.tokens[row].tolist() == free[row, :end].tolist() + [1] * (30 - end)
    streamed = [sum(len(part[row]) for part in parts) for row in range(4)]
    assert streamed == expected


BAD = {
    "no prompts": (dict(tokens=[]), "no rows"),
    "an empty prompt": (dict(tokens=[[3], []]), "Prompt 1 is empty"),
    "a flat list": (dict(tokens=[3, 4]), r"write \[tokens\]"),
    "a flat array": (dict(tokens=np.array([3, 4])), r"must be \[batch, length\]"),
    "floats": (dict(tokens=np.ones((1, 2))), "must be integers"),
    "another tokenizer": (dict(tokens=[[97]]), "vocabulary has 97 tokens: do tokenizer"),
    "a mask of another shape": (dict(mask=np.ones((1, 3), bool)), "mask has shape"),
    "images": (dict(images=np.zeros((1, 8, 8, 3))), "LM takes no images"),
    "nothing to do": (dict(max_new_tokens=0), "at least 1"),
    "no key": (dict(temperature=1.0), "give key"),
    "keys for other rows": (dict(temperature=1.0, key=jax.random.split(jax.random.key(0), 3)), "3"),
    "negative temperature": (dict(temperature=-1.0), "temperature=-1"),
    "top-k of the best": (dict(top_k=3, min_p=0.1), "top_k, min_p choose from what is drawn"),
    "top-k of nothing": (dict(temperature=1.0, top_k=0), "at least 1"),
    "top-p of more": (dict(temperature=1.0, top_p=1.1), "from 0 to 1"),
    "a penalty of 0": (dict(repetition_penalty=0.0), "above 0"),
    "an end that is no token": (dict(eos_id=97), "outside of a vocabulary"),
    "no beams": (dict(num_beams=0), "at least 1"),
    "sampled beams": (dict(num_beams=2, temperature=1.0, key=jax.random.key(0)), "neither a temp"),
    "streamed beams": (dict(num_beams=2, stream=print), "nor stream"),
    "beams that stop": (dict(num_beams=2, early_stopping="soon"), "early_stopping='soon'"),
    "stops without text": (dict(stop_strings="x"), "give decode"),
    "a stop that is empty": (dict(stop_strings=["x", ""], decode=str), "empty stop string"),
    "streams that never come": (dict(stream=print, stream_every=0), "stream_every=0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(generator, case):
    options, message = BAD[case]
    options = {"tokens": np.array([[3, 4]]), "max_new_tokens": 4, **options}
    with pytest.raises(ValueError, match=message):
        generator(**options)


def test_learned_positions_have_a_limit():
    generator = Generator(make_model(rope=None, max_len=40))
    # The longest prompt would be padded to more positions than there are.
    assert generator(np.full((1, 36), 3), max_new_tokens=4).tokens.shape == (1, 4)
    with pytest.raises(ValueError, match="limit of 40 positions: at most 4"):
        generator(np.full((1, 36), 3), max_new_tokens=5)
    with pytest.raises(ValueError, match="longer than the model's limit of 40"):
        generator(np.full((1, 41), 3), max_new_tokens=1)
