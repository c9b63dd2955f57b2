"""Which images a text sees in Flamingo, and what gates at zero leave of it: nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from functional import QUICK

from mmjax import params
from mmjax.connectors import PerceiverConfig
from mmjax.generation import Generator
from mmjax.models import Flamingo, FlamingoConfig, LMConfig, ViTConfig
from mmjax.models.flamingo import Context, GatedBlock, GatedConfig
from mmjax.nn.rope import Rope

VOCAB, IMAGE = 20, 19
CONFIG = FlamingoConfig(
    encoder=ViTConfig(
        image_size=8,
        patch_size=4,
        width=24,
        depth=2,
        heads=2,
        mlp_width=48,
        norm_eps=1e-6,
        activation="gelu",
        pooling="none",
        position="learned",
    ),
    connector=PerceiverConfig(latents=3, depth=1, heads=2, head_dim=8, projection=None),
    lm=LMConfig(
        vocab_size=VOCAB,
        max_len=64,
        width=32,
        depth=4,
        heads=2,
        mlp_width=48,
        norm_eps=1e-6,
        activation="silu",
        tied=False,
        rope=Rope(10_000.0),
    ),
    image_token=IMAGE,
    features=(-1,),
    gated=GatedConfig(heads=2, head_dim=8),
    every=2,
    after=1,
    context_width=24,
)
PICTURES = np.random.default_rng(0).normal(size=(6, 8, 8, 3)).astype(np.float32)


def replace(**changes):
    return dataclasses.replace(CONFIG, **changes)


def build(config, gates=0.7):
    """A model whose gates are not zero."""
    model = Flamingo(config, rngs=nnx.Rngs(0))
    for gate in (model.gated.layers.attention_gate, model.gated.layers.mlp_gate):
        gate[...] = jnp.full(gate.shape, gates)
    return model


@pytest.fixture(scope="module")
def run():
    """(config, **arrays) -> logits, compiled once for a config and its shapes."""
    compiled = {}

    def call(config, function=Flamingo.__call__, gates=0.7, **arrays):
        key = (config, function, gates)
        if key not in compiled:
            graph, values = params.split(build(config, gates))
            compiled[key] = (
                values,
                jax.jit(
                    lambda values, arrays: function(params.merge(graph, values), **arrays),
                    compiler_options=QUICK,
                ),
            )
        values, program = compiled[key]
        return jax.tree.map(np.asarray, program(values, arrays))

    return call


def text(length, seed=1):
    return np.random.default_rng(seed).integers(0, IMAGE, length).astype(np.int32)


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("gate", ["scalar", "vector"])
def test_gates_at_zero_leave_the_language_model(run, after, gate):
    config = replace(after=after, gated=dataclasses.replace(CONFIG.gated, gate=gate))
    tokens = text(10)[None]
    tokens[0, [1, 5]] = IMAGE
    images = PICTURES[None, :2]
    bare = run(config, lambda model, tokens: model.lm(tokens), gates=0.0, tokens=tokens)
    np.testing.assert_array_equal(run(config, gates=0.0, tokens=tokens, images=images), bare)
    np.testing.assert_array_equal(run(config, gates=0.0, tokens=tokens), bare)
    assert np.abs(run(config, tokens=tokens, images=images) - bare).max() > 0.01


def test_a_row_without_images_is_the_same_alone(run):
    tokens = np.stack([text(8), text(8, seed=2)])
    tokens[0, 2] = IMAGE
    images = PICTURES[:2, None]
    together = run(CONFIG, tokens=tokens, images=images)
    alone = run(CONFIG, tokens=tokens[1:])
    np.testing.assert_allclose(alone, together[1:], atol=1e-5)
    rows = [tokens[0].tolist(), tokens[1].tolist()]
    generator = Generator(build(CONFIG))
    both = generator(rows, [PICTURES[:1], PICTURES[:0]], max_new_tokens=4).tokens
    np.testing.assert_array_equal(generator(rows[1:], max_new_tokens=4).tokens, both[1:])


@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_come_after_those_of_the_language_model(run, tied):
    """They have vectors and logits; what there was keeps its own."""
    lm = dataclasses.replace(CONFIG.lm, tied=tied)
    grown = replace(lm=lm, new_tokens=2, image_token=VOCAB + 1)
    images, tokens = PICTURES[None, :2], text(8)[None]
    logits = run(grown, gates=0.0, tokens=tokens, images=images)
    assert logits.shape == (1, 8, VOCAB + 2)
    bare = run(grown, lambda model, tokens: model.lm(tokens), gates=0.0, tokens=tokens)
    np.testing.assert_array_equal(logits[..., :VOCAB], bare)
    tokens[0, 2], tokens[0, 5] = VOCAB, VOCAB + 1
    logits = run(grown, tokens=tokens, images=images)
    graph, values = params.split(build(grown))
    table = jnp.concatenate([values["lm/token/embedding"], values["new_token/embedding"]])
    whole = replace(lm=dataclasses.replace(lm, vocab_size=VOCAB + 2), image_token=VOCAB + 1)
    graph, places = params.split(build(whole))
    joined = {path: values[path] for path in places if "token" not in path and "head" not in path}
    joined["lm/token/embedding"] = table
    if not tied:
        heads = (values["lm/head/kernel"], values["new_head/kernel"])
        joined["lm/head/kernel"] = jnp.concatenate(heads, axis=1)
    expected = params.merge(graph, joined)(jnp.asarray(tokens), jnp.asarray(images))
    np.testing.assert_allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize("sees", ["last", "all"])
def test_a_token_sees_the_images_before_it_and_no_other(run, sees):
    """Row j + 1 has another picture j: what changes is what sees it, directly or through text."""
    tokens = np.tile(text(12), (4, 1))
    tokens[:, [2, 5, 9]] = IMAGE
    images = np.tile(PICTURES[:3], (4, 1, 1, 1, 1))
    for j in range(3):
        images[j + 1, j] = PICTURES[5]
    logits = run(replace(sees=sees), tokens=tokens, images=images)
    changed = np.abs(logits[1:] - logits[:1]).max(-1) > 1e-6
    starts = np.array([2, 5, 9])
    np.testing.assert_array_equal(changed, np.arange(12) >= starts[:, None])
    # Without the text before it, what a token itself sees.
    direct = run(
        replace(sees=sees),
        lambda model, place: model._seen(place, 3, jnp.ones_like(place), None).dense(),
        place=np.where(tokens[:1] == IMAGE, np.cumsum(tokens[:1] == IMAGE, axis=1) - 1, -1),
    )[0].reshape(12, 3, 3)
    seen = np.arange(12)[:, None] >= starts
    if sees == "last":
        seen &= np.arange(12)[:, None] < np.array([5, 9, 12])
    np.testing.assert_array_equal(direct, np.repeat(seen[:, :, None], 3, axis=2))


@pytest.mark.parametrize("sees", ["last", "all"])
def test_images_stand_in_any_order(run, sees):
    """The second row has the same images in another order, and says so."""
    tokens = np.tile(text(12), (2, 1))
    tokens[:, [2, 5, 9]] = IMAGE
    place = np.full((2, 12), -1, np.int32)
    place[:, [2, 5, 9]] = [[0, 1, 2], [2, 0, 1]]
    images = np.stack([PICTURES[:3], PICTURES[[1, 2, 0]]])
    rising, other = run(replace(sees=sees), tokens=tokens, images=images, place=place)
    np.testing.assert_allclose(other, rising, atol=1e-6)


def test_what_is_looked_at_is_copied_at_first():
    """Equal visual tokens are added to the stream, as the gate says."""
    config = replace(gated=GatedConfig(heads=4, head_dim=8, copies=2.0), context_width=None)
    block = GatedBlock(config, rngs=nnx.Rngs(0))
    block.attention_gate[...] = jnp.float32(0.3)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 5, 32)).astype(np.float32)
    token = rng.normal(size=32).astype(np.float32)
    out = block(jnp.asarray(x), Context(jnp.asarray(np.tile(token, (1, 3, 1))), None))
    np.testing.assert_allclose(out, x + np.tanh(0.3) * 2 * token, atol=1e-5)


def test_an_image_that_is_not_there_is_noticed(run):
    """In its row only."""
    tokens = np.array([[3, IMAGE, 4, IMAGE, 5, 6], [3, IMAGE, 4, 7, 5, 6]], np.int32)
    finite = np.isfinite(run(CONFIG, tokens=tokens, images=PICTURES[:2, None])).all(-1)
    assert not finite[0, 3:].any() and finite[1].all()


@pytest.mark.parametrize("sees", ["last", "all"])
def test_samples_packed_in_a_row_see_their_own_images(run, sees):
    """The second begins with text, which may not see the image of the first; the questions of the
    third (4, 5) continue it, and know nothing of each other."""
    config = replace(sees=sees)
    samples = [[IMAGE, *text(3)], [*text(2, seed=2), IMAGE, IMAGE, 4], [3, IMAGE, 5]]
    questions = [text(2, seed=3).tolist(), [IMAGE, *text(2, seed=4)]]
    parts = [*samples, *questions]
    tokens = np.concatenate([*map(np.array, parts), [0]]).astype(np.int32)[None]
    segments = np.concatenate([np.repeat(np.arange(1, 6), [len(p) for p in parts]), [0]])[None]
    parents = np.where(segments > 3, 3, 0)
    here = tokens == IMAGE
    place = np.where(here, np.cumsum(here, axis=1) - 1, -1)
    packed = run(
        config,
        tokens=tokens,
        images=PICTURES[None, :5],
        place=place.astype(np.int32),
        segments=segments.astype(np.int32),
        parents=parents.astype(np.int32),
    )[0]
    used = 0
    alone = [(samples[0], 0), (samples[1], 0), (samples[2], 0)]
    alone += [(samples[2] + question, len(samples[2])) for question in questions]
    for number, (sample, shared) in enumerate(alone, start=1):
        count = sample.count(IMAGE)
        pictures = list(PICTURES[used : used + count])
        if shared:  # the image of the third, then those of the question
            pictures = [PICTURES[3], *PICTURES[4 : 3 + count]]
        room = 6 - len(sample)
        logits = run(
            config,
            tokens=np.array([[*sample, *[0] * room]], np.int32),
            images=np.stack([*pictures, *[PICTURES[5]] * (2 - count)])[None],
            mask=np.array([[True] * len(sample) + [False] * room]),
        )[0]
        ours = packed[segments[0] == number]
        np.testing.assert_allclose(ours, logits[shared : len(sample)], atol=1e-5)
        used += count if not shared else 0


@pytest.mark.parametrize(
    "sees, ends", [("last", ()), ("all", ()), ("last", tuple(range(0, 19, 2)))]
)
def test_generation_with_a_cache_equals_none(run, sees, ends):
    """Rows of unequal length, one without an image, one whose text begins before its image; and
    with ends of what is seen, before what is written and in it."""
    config = replace(sees=sees, sight_ends=ends)
    rows = [[3, IMAGE, 4, IMAGE, 5, 6, 7], [8, 9], [IMAGE, 2, 3], [1, IMAGE, 11]]
    pictures = [PICTURES[:2], PICTURES[:0], PICTURES[2:3], PICTURES[3:4]]
    out = Generator(build(config))(rows, pictures, max_new_tokens=5)
    if ends:  # the last row sees its image until then
        assert np.isin(out.tokens[3, :-1], ends).any()
    for row, seen, new in zip(rows, pictures, out.tokens, strict=True):
        images = np.concatenate([seen, np.zeros((2 - len(seen), 8, 8, 3), np.float32)])
        tokens = np.zeros((1, 12), np.int32)
        tokens[0, : len(row)] = row
        # An image token that is written has no image.
        here = tokens == IMAGE
        places = np.where(here, np.cumsum(here, axis=1) - 1, -1).astype(np.int32)
        for place, token in enumerate(new, start=len(row)):
            mask = np.arange(12)[None] < place
            logits = run(config, tokens=tokens, images=images[None], mask=mask, place=places)
            assert logits[0, place - 1].argmax() == token
            tokens[0, place] = token


def test_beams_carry_their_images_along():
    rows, pictures = [[3, IMAGE, 4], [5, 6, IMAGE, 2, 7]], [PICTURES[:1], PICTURES[1:2]]
    generator = Generator(build(CONFIG))
    together = generator(rows, pictures, max_new_tokens=4, num_beams=3)
    for index in range(2):
        alone = generator(
            rows[index : index + 1], pictures[index : index + 1], max_new_tokens=4, num_beams=3
        )
        np.testing.assert_array_equal(together.tokens[index], alone.tokens[0])


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(every=3), "every=3 is no divisor of the language model's depth=4"),
        (dict(after=2), "after=2 must be at least 0 and below every=2"),
        (dict(sees="some"), "sees='some'"),
        (dict(image_token=VOCAB), "or more new_tokens"),
        (dict(sight_ends=(3, VOCAB)), "give ids of the 20 tokens"),
        (dict(newline=True), "newline=True"),
        (dict(attention="prefix"), "attention='prefix'"),
        (dict(gated=GatedConfig(heads=4, head_dim=8, copies=2.0)), "visual_width=24"),
    ],
)
def test_what_does_not_fit_is_said(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(**changes)
