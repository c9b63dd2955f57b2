"""Token for token what transformers writes, for prompts of unequal lengths."""

import numpy as np
import pytest
import writers

pytestmark = pytest.mark.torch

# End tokens that some rows meet early and others never.
ENDS = {"llama": [80, 12], "gemma2": [73, 66], "gpt2": [73, 32], "t5": [84, 49]}


def check(both, name, *, eos, beams=1, **options):
    """Both sides write the same; returns ours."""
    theirs, generator = both(name)
    options |= {"max_new_tokens": writers.NEW, "num_beams": beams}
    ours = generator(writers.prompts(), eos_id=eos, pad_id=2, **options)
    expected = writers.continued(
        theirs, writers.prompts(), eos_token_id=eos, pad_token_id=2, **options
    )
    np.testing.assert_array_equal(ours.tokens, expected)
    ends = [
        next((n for n, token in enumerate(row, 1) if token in eos), writers.NEW)
        for row in expected.tolist()
    ]
    np.testing.assert_array_equal(ours.lengths, ends)
    # It is no test if all rows write one token over and over.
    assert max(len(set(row)) for row in ours.tokens.tolist()) > 8
    return ours


@pytest.mark.parametrize("name", writers.FAMILIES)
def test_greedy(both, name):
    lengths = check(both, name, eos=ENDS[name]).lengths
    assert lengths.min() < writers.NEW == lengths.max()


@pytest.mark.parametrize("name", writers.FAMILIES)
def test_beam_search(both, name):
    theirs, _ = both(name)
    ours = check(both, name, eos=ENDS[name], beams=3)
    out = writers.continued(
        theirs,
        writers.prompts(),
        max_new_tokens=writers.NEW,
        num_beams=3,
        eos_token_id=ENDS[name],
        pad_token_id=2,
        output_scores=True,
        return_dict_in_generate=True,
    )
    np.testing.assert_allclose(ours.scores, out.sequences_scores, atol=1e-4)


# Numbers among the options are arrays: what differs in them alone compiles once.
def test_beam_search_that_stops_early(both):
    early = dict(eos=[5, 9, 11], beams=4, early_stopping=True)
    check(both, "llama", **early, length_penalty=0.0)
    check(both, "llama", **early, length_penalty=1.7)


def test_beam_search_to_the_end(both):
    never = dict(eos=[80, 12], beams=2, early_stopping="never")
    lengths = [
        check(
            both, "llama", **never, length_penalty=length_penalty, repetition_penalty=penalty
        ).lengths.sum()
        for length_penalty, penalty in ((2.0, 1.3), (-1.0, 0.8))
    ]
    assert lengths[0] > lengths[1]


def test_repetition_penalty(both):
    penalised = check(both, "llama", eos=ENDS["llama"], repetition_penalty=1.5)
    free = check(both, "llama", eos=ENDS["llama"])
    assert penalised.tokens.tolist() != free.tokens.tolist()
    # Of an encoder-decoder, the decoder's tokens are repeated, not the prompt's.
    check(both, "t5", eos=ENDS["t5"], repetition_penalty=1.5)
