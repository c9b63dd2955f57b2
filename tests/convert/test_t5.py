"""T5 of transformers, both ways; decoding with a cache; buckets of distances."""

import functools

import hf
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from functional import jitted
from towers import blocks, check, long, quick, refused, rewrite, same_parameters

import mmjax.convert
from mmjax.models import T5, T5Encoder
from mmjax.models.t5 import bucket

transformers = hf.transformers()
pytestmark = pytest.mark.torch

SMALL = {
    **{"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4},
    "decoder_start_token_id": 0,
}
CONFIGS = {
    "1.0": {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 10},
    "1.1, narrow heads, a deeper decoder": {
        **{"feed_forward_proj": "gated-gelu", "d_kv": 3, "num_heads": 5, "d_ff": 20},
        **{"num_decoder_layers": 3, "tie_word_embeddings": False, "d_model": 36},
        "relative_attention_num_buckets": 12,
    },
    "tied but not scaled, wide heads, another start": {
        **{"feed_forward_proj": "gated-silu", "d_kv": 16, "layer_norm_epsilon": 1e-2},
        **{
            "decoder_start_token_id": 7,
            "relative_attention_max_distance": 20,
            "initializer_factor": 0.3,
        },
        "tie_word_embeddings": False,
    },
    "not tied but scaled, one head": {
        **{"feed_forward_proj": "gelu", "num_heads": 1, "num_layers": 3, "num_decoder_layers": 1},
        "vocab_size": 61,
    },
}
NOT_TIED = ("1.1", "not tied")


def reference_for(name):
    import torch

    reference = transformers.T5ForConditionalGeneration(
        transformers.T5Config(**{**SMALL, **CONFIGS[name]})
    )
    if name.startswith(NOT_TIED):
        # transformers 5 ties at birth; checkpoints with a head of its own untie.
        reference.lm_head.weight = torch.nn.Parameter(reference.lm_head.weight.detach().clone())
    return reference


def batch(width=14, decoder=9):
    """Prompts padded on the right and on the left, and what the decoder has read of each."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 50, (3, width)).astype(np.int32)
    decoder_tokens = rng.integers(1, 50, (3, decoder)).astype(np.int32)
    mask = np.ones((3, width), bool)
    mask[0, 9:] = mask[1, :5] = False
    decoder_mask = np.ones((3, decoder), bool)
    decoder_mask[1, 6:] = False
    return tuple(map(jnp.asarray, (tokens, decoder_tokens, mask, decoder_mask)))


def ours(model, tokens, decoder_tokens, mask, decoder_mask):
    assert isinstance(model, T5)
    config = model.config
    encoded, features = model.encode(tokens, mask, features=range(config.depth))
    decoded, decoder_features = model.decode(
        encoded, decoder_tokens, mask, decoder_mask, features=range(config.decoder_depth)
    )
    return {
        "encoded": encoded,
        "encoder blocks": features,
        "decoder blocks": decoder_features,
        "logits": model.logits(decoded),
    }


def outputs_of(stack, kept):
    """A hook for the last block, whose output transformers gives after the final norm only."""
    return stack.block[-1].register_forward_hook(lambda *call: kept.append(call[2][0]))


def theirs(reference, tokens, decoder_tokens, mask, decoder_mask):
    kept = []
    handles = [outputs_of(reference.encoder, kept), outputs_of(reference.decoder, kept)]
    out = reference(
        input_ids=long(tokens),
        attention_mask=long(mask),
        decoder_input_ids=long(decoder_tokens),
        decoder_attention_mask=long(decoder_mask),
        output_hidden_states=True,
    )
    for handle in handles:
        handle.remove()
    return {
        "encoded": out.encoder_last_hidden_state,
        "encoder blocks": blocks((*out.encoder_hidden_states[:-1], kept[0])),
        "decoder blocks": blocks((*out.decoder_hidden_states[:-1], kept[1])),
        "logits": out.logits,
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_t5(name, tmp_path):
    reference = reference_for(name)
    inputs = batch()
    mask, decoder_mask = map(np.asarray, inputs[2:])
    where = {
        "encoded": mask,
        "encoder blocks": np.stack([mask] * reference.config.num_layers),
        "decoder blocks": np.stack([decoder_mask] * reference.config.num_decoder_layers),
        "logits": decoder_mask,
    }
    check("T5ForConditionalGeneration", reference, tmp_path, inputs, ours, theirs, where)
    config = mmjax.convert.open_checkpoint(tmp_path / "source").config
    assert config.tied == (not name.startswith(NOT_TIED))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A T5 with a head of its own, as a checkpoint: (reference, directory)."""
    reference = reference_for("1.1, narrow heads, a deeper decoder")
    return reference, parity.save_hf(reference, tmp_path_factory.mktemp("t5") / "source")


def test_saved_without_origin(saved, tmp_path):
    parity.check_saving_without_origin(saved[1], tmp_path / "target")


def test_older_checkpoints(saved, tmp_path):
    """The table of tokens under all its names, and one of cross-attention that was never used."""
    _, source = saved
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"

    def old(tensors):
        shared = tensors["shared.weight"]
        names = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
        return tensors | {name: shared.copy() for name in names} | {unused: np.ones((12, 5))}

    target = rewrite(source, tmp_path / "old", old, tie_word_embeddings=False)
    first, second = map(mmjax.convert.from_pretrained, (source, target))
    assert first.config == second.config
    same_parameters(first, second)


def test_encoder_alone(saved, tmp_path):
    """From a checkpoint of its own, and from that of a whole T5."""
    whole, source = saved
    reference = transformers.T5EncoderModel(whole.config.__class__(**whole.config.to_dict()))
    tokens, _, mask, _ = batch()

    def ours(model, tokens, mask):
        assert isinstance(model, T5Encoder)
        out, features = model(tokens, mask, features=(-1, 0))
        return {"encoded": out, "blocks": features}

    def theirs(reference, tokens, mask):
        import torch

        kept = []
        handle = outputs_of(reference.encoder, kept)
        out = reference(long(tokens), long(mask), output_hidden_states=True)
        handle.remove()
        return {
            "encoded": out.last_hidden_state,
            "blocks": torch.stack([kept[0], out.hidden_states[1]]),
        }

    valid = np.asarray(mask)
    where = {"encoded": valid, "blocks": np.stack([valid, valid])}
    check("T5EncoderModel", reference, tmp_path, (tokens, mask), ours, theirs, where)
    parity.check_saving_without_origin(tmp_path / "source", tmp_path / "no_origin")
    part = rewrite(source, tmp_path / "part", dict, architectures=["T5EncoderModel"])
    model = mmjax.convert.from_pretrained(part)
    expected = whole.encoder(long(tokens), long(mask)).last_hidden_state
    parity.close("T5EncoderModel", "encoded", quick(model, tokens, mask)[0], expected, valid)


@pytest.fixture(scope="module")
def decoding(saved):
    """A model, its compiled `prefill` (16 slots) and `step`, and a batch."""
    model = mmjax.convert.from_pretrained(saved[1])
    unstacked = model.unstack()
    prefill, step = jitted(unstacked, T5.prefill, length=16), jitted(unstacked, T5.step)
    tokens, decoder_tokens, mask, _ = batch()
    decoder_tokens = decoder_tokens.at[:, 0].set(model.config.decoder_start_id)
    return model, prefill, step, (tokens, decoder_tokens, mask)


def test_step_by_step_as_in_one_call(decoding):
    """The caches have more room than is used."""
    model, prefill, step, (tokens, decoder_tokens, mask) = decoding
    together = quick(model, tokens, decoder_tokens, mask)
    logits, cache = prefill(tokens, mask)
    steps = [logits]
    for token in decoder_tokens.T[1:]:
        logits, cache = step(token, cache)
        steps.append(logits)
    name = "T5ForConditionalGeneration"
    parity.close(name, "steps beside one call", np.stack(steps, 1), together)
    # Stacked parameters are read as well.
    cache = prefill(tokens, mask)[1]
    logits, _ = quick(model, decoder_tokens[:, 0], cache, function=T5.step)
    again, _ = step(decoder_tokens[:, 0], cache)
    parity.close(name, "stacked beside unstacked", logits, again)


def test_padding_and_neighbours_do_not_matter(decoding):
    model, prefill, _, (tokens, decoder_tokens, mask) = decoding
    call = functools.partial(quick, model)
    together = call(tokens, decoder_tokens, mask)
    # Row 1 is padded on the left: among others, padded with another token.
    own = jnp.arange(3)[:, None] == 1
    other = jnp.where(mask & own, tokens, 5)
    among = call(other, jnp.where(own, decoder_tokens, 6), mask)
    np.testing.assert_allclose(among[1], together[1], atol=1e-5)
    np.testing.assert_allclose(prefill(other, mask)[0][1], prefill(tokens, mask)[0][1], atol=1e-5)
    # Alone and without padding: sums of another length round otherwise, by the size of what is
    # summed. On one kind of CPU 1.1e-5 was seen beside logits of 11.
    alone = call(tokens[1:2, 5:], decoder_tokens[1:2])
    largest = float(jnp.abs(together[1]).max())
    np.testing.assert_allclose(alone[0], together[1], rtol=0, atol=2e-6 * largest)


def test_selected_rows_of_a_cache_go_on_as_their_texts(decoding):
    _, prefill, step, (tokens, decoder_tokens, mask) = decoding
    _, cache = step(decoder_tokens[:, 1], prefill(tokens, mask)[1])
    expected, _ = step(decoder_tokens[:, 2], cache)
    rows = jnp.array([2, 0, 2])
    found, _ = step(decoder_tokens[rows, 2], cache.select(rows))
    np.testing.assert_allclose(found, expected[rows], atol=1e-5)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(
    ("buckets", "max_distance"), [(32, 128), (8, 20), (4, 3), (6, 50), (64, 1000), (32, 17)]
)
def test_buckets_of_distances(buckets, max_distance, bidirectional):
    import torch
    from transformers.models.t5.modeling_t5 import T5Attention

    relative = np.arange(-1200, 1201)
    expected = T5Attention._relative_position_bucket(
        torch.tensor(relative), bidirectional, buckets, max_distance
    )
    found = bucket(
        relative, bidirectional=bidirectional, buckets=buckets, max_distance=max_distance
    )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder_start_token_id": None}, "decoder_start_token_id"),
        ({"feed_forward_proj": "mish"}, "feed_forward_proj='mish'"),
        ({"relative_attention_num_buckets": 2}, "at least 4 buckets"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        refused("T5ForConditionalGeneration", transformers.T5Config(**SMALL | options))
