"""Which tokens may be drawn, beside the processors of transformers; and how often they are."""

import hf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.generation.sampling import Sampler

ROWS, VOCABULARY = 6, 1000
choose = jax.jit(lambda sampler, logits, seen: sampler.allowed(sampler.penalised(logits, seen)))

CASES = [
    dict(temperature=0.7),
    dict(temperature=1.0, top_k=50),
    dict(temperature=1.3, top_p=0.9),
    dict(temperature=1.3, top_p=0.3),
    dict(temperature=1.3, top_p=0.0),
    dict(temperature=1.3, top_p=1.0),
    dict(temperature=1.0, min_p=0.05),
    dict(temperature=0.8, top_k=40, top_p=0.8, min_p=0.1, repetition_penalty=1.4),
    dict(temperature=1.5, top_k=2000, top_p=0.99, min_p=0.001, repetition_penalty=0.8),
]


def make(top_k=None, **numbers):
    return Sampler(**{name: jnp.float32(value) for name, value in numbers.items()}, top_k=top_k)


@pytest.mark.torch
@pytest.mark.parametrize("options", CASES, ids=lambda options: ",".join(options))
def test_transformers_allows_the_same(options):
    hf.transformers()
    import torch
    from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

    random = np.random.default_rng(0)
    logits = 3 * random.standard_normal((ROWS, VOCABULARY)).astype(np.float32)
    before = random.integers(0, VOCABULARY, (ROWS, 30))
    seen = np.zeros((ROWS, VOCABULARY), bool)
    np.put_along_axis(seen, before, True, axis=1)

    # The whole pipeline of its `generate`, in its order.
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1))
    config = GenerationConfig(do_sample=True, **{"top_k": 0, **options})
    model._prepare_special_tokens(config, device="cpu")
    process = model._get_logits_processor(config, input_ids_seq_length=30, device="cpu")
    expected = process(torch.tensor(before), torch.tensor(logits)).numpy()

    ours = np.asarray(choose(make(**options), logits, seen))
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(expected))
    kept = np.isfinite(expected)
    assert kept.any(axis=1).all()
    np.testing.assert_allclose(ours[kept], expected[kept], rtol=1e-6)


def test_equal_tokens_stay_or_go_together():
    """As they do in transformers where top-k meets a tie; of top-p it is a choice."""
    logits = jnp.array([[0.0, 1.0, 1.0, 1.0, -1.0]])
    for sampler in (make(temperature=1.0, top_k=2), make(temperature=1.0, top_p=0.5)):
        allowed = choose(sampler, logits, None)
        np.testing.assert_array_equal(np.isfinite(allowed), [[False, True, True, True, False]])


def test_tokens_are_drawn_by_their_probability():
    rows = 20_000
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    keys = jax.random.split(jax.random.key(0), rows)
    sampler = make(temperature=1.0, top_k=3)
    draw = jax.jit(lambda logits, keys: sampler(logits, None, keys))
    drawn = draw(jnp.broadcast_to(logits, (rows, 4)), keys)
    share = np.bincount(np.asarray(drawn), minlength=4) / rows
    expected = np.array([0.5, 0.3, 0.15, 0.0]) / 0.95
    assert share[3] == 0
    # Four standard deviations.
    np.testing.assert_allclose(share, expected, atol=4 * np.sqrt(0.25 / rows))
