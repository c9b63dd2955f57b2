"""Classifier-free guidance and suppressed tokens: beside transformers, a loop without a cache, and
rows on their own."""

import hf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import writers
from test_generator import compilations, make_model
from test_images import PER_IMAGE, make_vlm, places, prompts

from mmjax import sharding
from mmjax.generation import Generator
from mmjax.generation.sampling import Sampler

NEW = 24
SUPPRESS = list(range(3, 97, 3))


def negatives():
    """Of other lengths than the prompts, and some longer than theirs."""
    random = np.random.default_rng(7)
    return [random.integers(3, writers.VOCABULARY, length).tolist() for length in (17, 12, 4, 2)]


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def generator(model):
    return Generator(model)


@pytest.fixture(scope="module")
def seeing():
    return make_vlm()


def uncached(read, rows, negative, guidance, new=NEW):
    """The most probable tokens, where `read` gives the next logits [B, V] of whole texts."""
    written = np.zeros((len(rows), 0), int)
    for _ in range(new):
        prompt, other = (
            jax.nn.log_softmax(
                read([row + more for row, more in zip(x, written.tolist(), strict=True)])
            )
            for x in (rows, negative)
        )
        token = np.argmax(other + guidance * (prompt - other), axis=-1)
        written = np.concatenate([written, token[:, None]], axis=1)
    return written


@pytest.mark.torch
def test_transformers_writes_the_same(both):
    import torch

    theirs, generator = both("llama")
    rows = writers.prompts()
    tokens, mask = map(torch.tensor, writers.padded(negatives()))
    seen = []
    for scale, options in (
        (3.0, {}),
        (0.0, {}),
        (2.0, {"repetition_penalty": 1.3, "suppress": SUPPRESS, "eos": [80, 12]}),
    ):
        eos, suppress = options.pop("eos", None), options.pop("suppress", None)
        options |= {"max_new_tokens": NEW}
        ours = generator(
            rows,
            guidance=scale,
            negative=negatives(),
            suppress=suppress,
            eos_id=eos,
            pad_id=2,
            **options,
        )
        expected = writers.continued(
            theirs,
            rows,
            guidance_scale=scale,
            negative_prompt_ids=tokens,
            negative_prompt_attention_mask=mask,
            suppress_tokens=suppress,
            eos_token_id=eos,
            pad_token_id=2,
            **options,
        )
        np.testing.assert_array_equal(ours.tokens, expected)
        assert max(len(set(row)) for row in expected.tolist()) > 8
        seen.append(expected[:, :12].tolist())
    assert all(seen.count(tokens) == 1 for tokens in seen)


@pytest.mark.torch
@pytest.mark.parametrize("beams", [1, 3])
def test_transformers_suppresses_the_same(both, beams):
    theirs, generator = both("llama")
    rows, eos, least = writers.prompts(), [80, 12, 35], 9
    options = dict(max_new_tokens=NEW, num_beams=beams)
    suppress = [token for token in SUPPRESS if token not in eos]
    ends = dict(eos_token_id=eos, pad_token_id=2)
    free = writers.continued(theirs, rows, **ends, **options)
    options |= dict(min_new_tokens=least)
    expected = writers.continued(theirs, rows, suppress_tokens=suppress, **ends, **options)
    ours = generator(rows, suppress=suppress, eos_id=eos, pad_id=2, **options)
    np.testing.assert_array_equal(ours.tokens, expected)
    assert np.isin(free, suppress).any() and not np.isin(expected, suppress).any()
    assert np.isin(free[:, :least], eos).any() and not np.isin(expected[:, :least], eos).any()
    assert ours.lengths.min() < NEW


@pytest.mark.torch
def test_masked_tokens_stay_masked():
    """Logits are those of transformers where it has numbers; never NaN, and nothing is gained by
    what the negative prompt masks."""
    hf.transformers()
    import torch
    from transformers.generation.logits_process import (
        UnbatchedClassifierFreeGuidanceLogitsProcessor as Guidance,
    )

    logits = 5 * np.random.default_rng(0).standard_normal((2, 3, 40)).astype(np.float32)
    lowest = np.finfo(np.float32).min
    logits[:, 0, :10], logits[:, 1, :10] = -np.inf, lowest  # in both
    logits[0, 2, :10] = lowest  # after the prompt only
    logits[1, 2, 10:20] = -np.inf  # after the negative prompt only
    guided = jax.jit(lambda sampler, logits: sampler.guided(logits))
    pairs = np.moveaxis(logits, 0, 1).reshape(6, 40)
    for scale in (0.0, 0.5, 3.0, 7.5):
        process = Guidance(scale, None)
        process.get_unconditional_logits = lambda ids: torch.tensor(logits[1][:, None])
        expected = process(None, torch.tensor(logits[0])).numpy()
        ours = np.asarray(guided(Sampler(guidance=jnp.float32(scale)), pairs))
        assert not np.isnan(ours).any()
        plain = np.ones((3, 40), bool)
        plain[:, :10], plain[2, 10:20] = False, False
        np.testing.assert_allclose(ours[plain], expected[plain], rtol=1e-5, atol=1e-5)
        assert (ours[:, :10] <= lowest / 2).all()
        prompt = np.asarray(jax.nn.log_softmax(logits[0, 2]))
        np.testing.assert_allclose(ours[2, 10:20], prompt[10:20], rtol=1e-6)


def test_greedy_is_the_uncached_loop(model, generator):
    rows = writers.prompts()

    @jax.jit
    def logits(tokens, last):
        return model(tokens)[jnp.arange(len(last)), last]

    def read(texts):
        tokens = np.zeros((len(texts), 48), np.int32)
        for row, text in zip(tokens, texts, strict=True):
            row[: len(text)] = text
        return logits(tokens, np.array([len(text) - 1 for text in texts]))

    for guidance in (4.0, 0.3):
        out = generator(rows, negative=negatives(), guidance=guidance, max_new_tokens=NEW).tokens
        np.testing.assert_array_equal(out, uncached(read, rows, negatives(), guidance))
    # One for all.
    out = generator(rows, negative=negatives()[2:3], guidance=4.0, max_new_tokens=NEW).tokens
    np.testing.assert_array_equal(out, uncached(read, rows, negatives()[2:3] * 4, 4.0))


@pytest.mark.parametrize("drawn", [{}, dict(temperature=1.2, top_k=60)], ids=["", "drawn"])
def test_a_row_does_not_depend_on_its_neighbours(generator, drawn):
    rows, negative = writers.prompts(), negatives()
    keys = jax.random.split(jax.random.key(3), len(rows)) if drawn else None
    options = dict(max_new_tokens=NEW, guidance=2.5, pad_id=0, **drawn)
    together = generator(rows, negative=negative, key=keys, eos_id=[5, 50], **options)
    for row in (1, 2):
        key = keys[row : row + 1] if drawn else None
        alone = generator(
            rows[row : row + 1], negative=negative[row : row + 1], key=key, **options
        ).tokens[0]
        length = together.lengths[row]
        np.testing.assert_array_equal(together.tokens[row, :length], alone[:length])
        ends = np.flatnonzero(np.isin(alone, [5, 50]))
        assert length == (ends[0] + 1 if ends.size else NEW)


def test_guidance_of_one_is_none(generator):
    rows, options = writers.prompts(), dict(max_new_tokens=NEW)
    free = generator(rows, **options).tokens
    with compilations() as compiled:
        same = generator(rows, guidance=1.0, negative=negatives(), **options).tokens
        # None is needed, either.
        np.testing.assert_array_equal(generator(rows, guidance=1.0, **options).tokens, free)
    assert not compiled
    np.testing.assert_array_equal(same, free)
    guided = generator(rows, guidance=3.0, negative=negatives(), **options).tokens
    assert guided.tolist() != free.tolist()
    with compilations() as compiled:
        generator(rows, guidance=0.5, negative=negatives()[::-1], **options)
    assert not compiled


def test_tokens_are_drawn_by_guided_probabilities(model, generator):
    rows, guidance, count = [writers.prompts()[1], negatives()[2]], 1.7, 4000
    prompt, other = (jax.nn.log_softmax(model(jnp.array([row]))[0, -1]) for row in rows)
    expected = other + guidance * (prompt - other)
    expected = np.array(jax.nn.softmax(jnp.where(jnp.arange(97) == 11, -jnp.inf, expected) / 2))
    drawn = generator(
        [rows[0]] * count,
        negative=[rows[1]],
        guidance=guidance,
        suppress=[11],
        temperature=2.0,
        key=jax.random.key(0),
        max_new_tokens=1,
    ).tokens[:, 0]
    share = np.bincount(drawn, minlength=97) / count
    assert share[11] == 0
    # Five standard deviations of each share.
    assert (abs(share - expected) <= 5 * np.sqrt(expected / count) + 1e-9).all()
    unguided = np.asarray(jax.nn.softmax(prompt / 2))
    assert (abs(share - unguided) > 5 * np.sqrt(unguided / count)).sum() > 5


def test_streams_and_stops(generator):
    def decode(ids):
        return "".join(f"<{token}>" for token in ids)

    rows, parts = writers.prompts(), []
    options = dict(max_new_tokens=NEW, guidance=3.0, negative=negatives())
    whole = generator(rows, **options).tokens
    stop = f"<{whole[1, 4]}><{whole[1, 5]}>"
    out = generator(rows, **options, stop_strings=stop, decode=decode, stream=parts.append)
    assert out.lengths[1] == 6 and out.lengths.max() == NEW
    for row, length in enumerate(out.lengths):
        assert [token for part in parts for token in part[row]] == whole[row, :length].tolist()


@pytest.mark.parametrize("own", [False, True], ids=["blind", "with other images"])
def test_models_that_see(seeing, own):
    rows, images = prompts((2, 0, 1))
    negative, others = prompts((0, 1, 3)) if own else prompts((0, 0, 0))
    read = jax.jit(
        lambda tokens, images, mask, place: seeing(tokens, images, mask, place=place)[:, -1]
    )

    def next_logits(texts, images):
        tokens, mask = writers.padded(texts)
        spare = 48 - tokens.shape[1]
        tokens, mask = (np.pad(x, ((0, 0), (spare, 0))) for x in (tokens, mask))
        where = np.full(tokens.shape, -1)
        for row, entry in zip(where, places(texts), strict=True):
            row[48 - len(entry) :] = entry
        stacked = np.zeros((len(texts), 3, 8, 8, 3), np.float32)
        for row, given in zip(stacked, images, strict=True):
            row[: len(given)] = given
        return read(tokens, stacked, mask, where)

    def both(texts):
        seen = images if len(texts[0]) > 0 and texts[0][: len(rows[0])] == rows[0] else others
        return next_logits(texts, seen)

    assert PER_IMAGE * 3 < 48 - NEW / 2
    expected = uncached(both, rows, negative, 2.0, new=12)
    out = Generator(seeing)(
        rows,
        images,
        guidance=2.0,
        negative=negative,
        negative_images=others if own else None,
        max_new_tokens=12,
    ).tokens
    np.testing.assert_array_equal(out, expected)
    assert max(len(set(row)) for row in out.tolist()) > 6


def test_same_tokens_on_a_mesh(model, generator, monkeypatch):
    monkeypatch.setattr(sharding, "FSDP_MIN_SIZE", 2)  # tiny parameters are sharded too
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    options = dict(
        max_new_tokens=12,
        guidance=2.5,
        negative=negatives(),
        suppress=SUPPRESS,
        temperature=1.5,
        key=jax.random.key(0),
    )
    spread = Generator(model, mesh=mesh)
    rows = writers.prompts()
    expected = generator(rows, **options).tokens
    np.testing.assert_array_equal(spread(rows, **options).tokens, expected)


GIVEN = dict(negative=[[3]], guidance=3.0)
BAD = {
    "nothing to compare with": (dict(guidance=3.0), r"give negative, such as \[\[begin"),
    "nothing to compare": (dict(negative=[[3]]), "by guidance only: give it"),
    "images of nothing": (dict(negative_images=[[]]), "by guidance only: give it"),
    "no number": (dict(GIVEN, guidance=float("nan")), "guidance=nan must be a number"),
    "rows of others": (dict(GIVEN, negative=[[3], [4]]), "negative has 2 rows, tokens 3"),
    "another tokenizer": (dict(GIVEN, negative=[[97]]), "Of the negative prompts: Prompt 0 has"),
    "nothing": (dict(GIVEN, negative=[[]]), "Of the negative prompts: Prompt 0 is empty"),
    "images": (dict(GIVEN, negative_images=[[]]), "Of the negative prompts: LM takes no images"),
    "beams": (dict(GIVEN, num_beams=2), "Beam search goes without guidance"),
    "more than most": (dict(min_new_tokens=5), "from 0 to max_new_tokens=4"),
    "tokens there are not": (dict(suppress=[3, 97]), "suppress has ids from 3 to 97"),
    "all tokens": (dict(suppress=range(97)), "leave some to choose from"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(generator, case):
    options, message = BAD[case]
    with compilations() as compiled, pytest.raises(ValueError, match=message):
        generator([[3, 4]] * 3, max_new_tokens=4, **options)
    assert not compiled


def test_a_limit_is_that_of_negative_prompts_too():
    generator = Generator(make_model(rope=None, max_len=40))
    with pytest.raises(ValueError, match=r"A prompt of 38 tokens .* at most 2 tokens"):
        generator([[3]], guidance=2.0, negative=[[3] * 38], max_new_tokens=4)
