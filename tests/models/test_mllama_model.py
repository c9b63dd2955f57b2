"""Which tiles a text of Mllama sees, alone and packed, and patterns of its blocks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from functional import QUICK

from mmjax import build, params
from mmjax.connectors import LinearConfig
from mmjax.generation import Generator
from mmjax.models import LMConfig, Mllama, MllamaConfig, TiledViTConfig
from mmjax.nn.rope import Rope

VOCAB, IMAGE, TILES = 20, 20, 2
SHAPES = ((1, 1), (1, 2), (2, 1))
CONFIG = MllamaConfig(
    encoder=TiledViTConfig(
        image_size=8,
        patch_size=4,
        width=16,
        depth=2,
        global_depth=1,
        heads=2,
        mlp_width=24,
        activation="gelu",
        tiles=TILES,
        shapes=SHAPES,
    ),
    connector=LinearConfig(),
    lm=LMConfig(
        vocab_size=VOCAB,
        max_len=64,
        width=32,
        depth=2,
        heads=2,
        mlp_width=48,
        norm_eps=1e-6,
        activation="silu",
        tied=True,
        rope=Rope(10_000.0),
    ),
    image_token=IMAGE,
    features=(0,),
    looks=(0, 2),
    new_tokens=1,
)
PICTURES = np.random.default_rng(0).normal(size=(6, TILES, 8, 8, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def model():
    model = Mllama(CONFIG, rngs=nnx.Rngs(0))
    gates = [model.gated.layers.attention_gate, model.gated.layers.mlp_gate]
    gates += [
        model.encoder.position_gate,
        model.encoder.pre_tile_gate,
        model.encoder.post_tile_gate,
    ]
    for gate in gates:
        gate[...] = jnp.full(gate.shape, 0.7)
    return model


def call(model, **arrays):
    graph, values = params.split(model)
    run = jax.jit(
        lambda values, arrays: params.merge(graph, values)(**arrays), compiler_options=QUICK
    )
    return np.asarray(run(values, {name: jnp.asarray(x) for name, x in arrays.items()}))


def text(length, seed=1):
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


def pack(samples):
    """Rows of ids, and ("image", its picture, its shape): tokens, places, images, lengths."""
    tokens, places, pictures = [], [], []
    for item in samples:
        if isinstance(item, tuple):
            _, picture, shape = item
            tokens.append(IMAGE)
            places.append(len(pictures) * len(SHAPES) + shape)
            pictures.append(PICTURES[picture])
        else:
            tokens.append(item)
            places.append(-1)
    images = np.concatenate(pictures)
    return np.array([tokens], np.int32), np.array([places], np.int32), images[None]


def test_a_question_sees_what_it_continues(model):
    """Its sample's image, though that of another question stands between."""
    number = jnp.array([[0, -1, 1, -1, -1]])
    segments, parents = jnp.array([[1, 1, 2, 2, 3]]), jnp.array([[0, 0, 1, 1, 1]])
    mask, looks = model._seen(number, jnp.ones((1, 2, TILES), bool), segments, parents)
    seen = mask.dense().reshape(5, 2, -1).all(-1)
    np.testing.assert_array_equal(seen, [[1, 0], [1, 0], [0, 1], [0, 1], [1, 0]])
    assert looks.all()


@pytest.mark.parametrize("early", ["none", "all"])
def test_samples_packed_in_a_row_see_their_own_images(model, early):
    """The second begins with text and an image right after the first's end with one; the questions
    of the third (4, 5) continue it, and know nothing of each other."""
    graph, values = params.split(model)
    graph, _ = params.abstract(
        lambda: Mllama(dataclasses.replace(CONFIG, early=early), rngs=nnx.Rngs(0))
    )
    model = params.merge(graph, values)
    samples = [
        [*text(3), ("image", 0, 1)],
        [("image", 1, 2), ("image", 2, 0), *text(2, seed=2)],
        [3, ("image", 3, 1), 5],
    ]
    questions = [text(2, seed=3), text(3, seed=4)]
    parts = [*samples, *questions]
    tokens, place, images = pack([item for part in parts for item in part])
    segments = np.repeat(np.arange(1, 6), [len(part) for part in parts])[None].astype(np.int32)
    parents = np.where(segments > 3, 3, 0).astype(np.int32)
    packed = call(
        model, tokens=tokens, images=images, place=place, segments=segments, parents=parents
    )[0]
    assert packed.shape[1] == VOCAB
    alone = [(sample, 0) for sample in samples] + [(samples[2] + q, 3) for q in questions]
    for number, (sample, shared) in enumerate(alone, start=1):
        tokens, place, images = pack(sample)
        logits = call(model, tokens=tokens, images=images, place=place)[0]
        np.testing.assert_allclose(packed[segments[0] == number], logits[shared:], atol=1e-5)


def test_shapes_of_boards_count(model):
    """As much as the gates say: the same tiles, side by side or one above the other."""
    tokens, place, images = pack([2, ("image", 0, 1), 4])
    beside = call(model, tokens=tokens, images=images, place=place)
    above = call(model, tokens=tokens, images=images, place=place + (place >= 0))
    assert np.abs(beside - above).max() > 1e-4


def test_images_stand_in_any_order(model):
    """The second row has the same images in another order, and says so; two stand together."""
    tokens, place, images = pack([2, ("image", 0, 1), 4, ("image", 1, 2), ("image", 2, 0), 5])
    other = np.where(place >= 0, (place // 3 + 1) % 3 * 3 + place % 3, -1)
    boards = images.reshape(3, TILES, 8, 8, 3)
    rows = np.stack([boards, np.roll(boards, 1, axis=0)]).reshape(2, *images.shape[1:])
    logits = call(model, tokens=np.repeat(tokens, 2, 0), images=rows, place=np.r_[place, other])
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-6)


def test_generation_asks_for_places(model):
    with pytest.raises(ValueError, match="several shapes, and `place` says"):
        Generator(model)([[3, IMAGE, 4]], [PICTURES[0]], max_new_tokens=1)


def test_an_image_that_is_not_there_is_noticed(model):
    """In its row only."""
    tokens, place, images = (np.repeat(x, 2, 0) for x in pack([3, ("image", 0, 0), 4, 5]))
    place[0, 3] = len(SHAPES)
    finite = np.isfinite(call(model, tokens=tokens, images=images, place=place)).all(-1)
    assert not finite[0, 3] and finite[1].all()


def test_beams_carry_their_images_along(model):
    rows = [[3, ("image", 0, 1), 4], [5, 6, ("image", 1, 0), 2, 7], [8, 9, 1]]
    made = [
        pack(row) if row[0] != 8 else (np.array([row]), -np.ones((1, 3), int), [()]) for row in rows
    ]
    tokens, places, images = ([one[part][0] for one in made] for part in range(3))
    generator = Generator(model)
    options = dict(max_new_tokens=4, num_beams=3)
    together = generator(tokens, images, place=places, **options).tokens
    for index in range(3):
        one = slice(index, index + 1)
        alone = generator(tokens[one], images[one], place=places[one], **options).tokens
        np.testing.assert_array_equal(together[index], alone[0])


def test_patterns_that_repeat():
    def runs(depth, looks):
        lm = dataclasses.replace(CONFIG.lm, depth=depth - len(looks))
        return dataclasses.replace(CONFIG, lm=lm, looks=tuple(looks)).runs

    # Of 11 and 90 billion parameters.
    assert runs(40, range(3, 40, 5)) == (3, 1)
    assert runs(100, range(3, 100, 5)) == (3, 1)
    assert runs(4, (1, 3)) == (1, 0)
    assert runs(5, (0, 1)) == (0, 0, 3)


def test_built_by_name():
    fields = dataclasses.asdict(CONFIG)
    name = fields.pop("name")
    fields["connector"] = {"name": "linear"}
    fields["lm"].pop("name")
    shapes = nnx.eval_shape(lambda: build({"name": name, **fields}, rngs=nnx.Rngs(0)))
    assert shapes.config == CONFIG


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(looks=()), r"looks=\(\)"),
        (dict(looks=(4,)), r"places 0 to 2"),
        (dict(early="some"), "early='some'"),
        (dict(new_tokens=0), "or more new_tokens"),
        (dict(newline=True), "newline=True"),
        (dict(class_token=False), "class_token=False"),
        (dict(features=(2,)), "no block 2"),
    ],
)
def test_what_does_not_fit_is_said(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)
