"""What stands where in the stream of a vision-language model, and who sees whom."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from functional import QUICK

from mmjax import params
from mmjax.connectors import LinearConfig, PerceiverConfig, PixelShuffleConfig
from mmjax.models import VLM, LMConfig, ViTConfig, VLMConfig
from mmjax.models.vlm import NEWLINE, TEXT
from mmjax.nn.rope import Rope

TRANSFORMER = {"width": 32, "depth": 2, "heads": 2, "mlp_width": 48, "norm_eps": 1e-6}
VOCAB = 20
IMAGE = VOCAB  # a placeholder that the vocabulary does not have
CONFIG = VLMConfig(
    encoder=ViTConfig(
        image_size=8,
        patch_size=4,
        activation="gelu",
        pooling="cls",
        position="learned",
        **TRANSFORMER,
    ),
    connector=LinearConfig(),
    lm=LMConfig(
        vocab_size=VOCAB,
        max_len=64,
        activation="silu",
        tied=False,
        rope=Rope(10_000.0),
        **TRANSFORMER,
    ),
    image_token=IMAGE,
)
PER_IMAGE = 4
PICTURES = np.random.default_rng(0).normal(size=(6, 8, 8, 3)).astype(np.float32)


def replace(**changes):
    return dataclasses.replace(CONFIG, **changes)


@pytest.fixture(scope="module")
def run():
    """(config, **arrays) -> a result of its model, compiled once for a config and its shapes."""
    compiled = {}

    def call(config, function=VLM.__call__, **arrays):
        if (config, function) not in compiled:
            graph, values = params.split(VLM(config, rngs=nnx.Rngs(0)))
            compiled[config, function] = (
                values,
                jax.jit(
                    lambda values, arrays: function(params.merge(graph, values), **arrays),
                    compiler_options=QUICK,
                ),
            )
        values, program = compiled[config, function]
        return jax.tree.map(np.asarray, program(values, arrays))

    return call


def text(length, seed=1):
    return list(np.random.default_rng(seed).integers(0, VOCAB, length))


def row(*samples, length=20):
    """A row of samples: lists of tokens in which (picture,) stands for all tokens of a picture.

    Returns tokens, place, segments [length], and two images, the second of zeros where there is
    one.
    """
    tokens, place, segments, pictures = [], [], [], []
    for number, sample in enumerate(samples, start=1):
        start = len(tokens)
        for item in sample:
            if isinstance(item, tuple):
                first = PER_IMAGE * len(pictures)
                place += range(first, first + PER_IMAGE)
                tokens += [IMAGE] * PER_IMAGE
                pictures.append(PICTURES[item[0]])
            else:
                place.append(TEXT)
                tokens.append(item)
        segments += [number] * (len(tokens) - start)
    rest = length - len(tokens)
    images = np.zeros((2, 8, 8, 3), np.float32)
    images[: len(pictures)] = pictures
    return (
        np.array(tokens + [0] * rest, np.int32),
        np.array(place + [TEXT] * rest, np.int32),
        np.array(segments + [0] * rest, np.int32),
        images,
    )


def stack(*rows):
    names = ("tokens", "place", "segments", "images")
    return dict(zip(names, map(np.stack, zip(*rows, strict=True)), strict=True))


FIRST = [*text(3), (0,), *text(2, seed=2)]
SECOND = [(1,), *text(5, seed=3)]


@pytest.mark.parametrize("attention", ["causal", "prefix", "image_blocks"])
def test_samples_packed_in_a_row_know_nothing_of_each_other(run, attention):
    arrays = stack(row(FIRST, SECOND), row(FIRST), row(SECOND))
    if attention == "prefix":
        arrays["prefix"] = arrays["place"] >= 0
    packed, first, second = run(replace(attention=attention), **arrays)
    end = len(FIRST) - 1 + PER_IMAGE
    length = len(SECOND) - 1 + PER_IMAGE
    np.testing.assert_allclose(packed[:end], first[:end], atol=1e-5)
    np.testing.assert_allclose(packed[end : end + length], second[:length], atol=1e-5)


def test_neighbours_and_padding_do_not_matter(run):
    arrays = stack(row(FIRST), row(SECOND), row([*text(4), (2,), (3,)]))
    mask = arrays.pop("segments") > 0
    together = run(CONFIG, **arrays, mask=mask)
    for index, length in enumerate(mask.sum(1)):
        one = {name: array[index : index + 1] for name, array in arrays.items()}
        # Without padding on the right, and with padding on the left.
        one |= {name: one[name][:, :length] for name in ("tokens", "place")}
        alone = run(CONFIG, **one)[0]
        np.testing.assert_allclose(together[index, :length], alone, atol=1e-5)
    room = 20 - mask.sum(1)
    moved = arrays | {
        name: np.stack([np.roll(x, r) for x, r in zip(arrays[name], room, strict=True)])
        for name in ("tokens", "place")
    }
    moved_mask = np.stack([np.roll(x, r) for x, r in zip(mask, room, strict=True)])
    left = run(CONFIG, **moved, mask=moved_mask)
    np.testing.assert_allclose(left[moved_mask], together[mask], atol=1e-5)


def _pieces(model, tokens, images):
    newline = jnp.zeros(32) if model.newline is None else model.newline[...]
    return model.lm.embed(tokens), model.encode_images(images), newline


def _read(model, embeddings):
    return model.lm.run(embeddings=embeddings).logits


def test_visual_tokens_stand_where_the_places_say(run):
    """Several images, out of order, some left out, and newlines."""
    config = replace(newline=True)
    tokens = np.array([text(12), text(12, seed=2)], np.int32)
    images = PICTURES[:4].reshape(2, 2, 8, 8, 3)
    place = np.array(
        [
            [TEXT, 5, 4, NEWLINE, 7, 6, NEWLINE, TEXT, 0, 1, TEXT, TEXT],
            [TEXT, TEXT, TEXT, 3, 3, TEXT, NEWLINE, TEXT, TEXT, TEXT, 7, 0],
        ],
        np.int32,
    )
    words, visual, newline = run(config, _pieces, tokens=tokens, images=images)
    words = words.copy()
    for index in np.ndindex(place.shape):
        if place[index] == NEWLINE:
            words[index] = newline
        elif place[index] != TEXT:
            words[index] = visual[index[0], place[index]]
    expected = run(config, _read, embeddings=words)
    # What stands where visual tokens go does not count, an id beyond the vocabulary included.
    tokens = np.where(place == TEXT, tokens, 99)
    np.testing.assert_allclose(
        run(config, tokens=tokens, images=images, place=place), expected, atol=1e-5
    )


def test_without_places_the_placeholders_are_filled_in_order(run):
    arrays = stack(row([3, (0,), 4, (1,)]), row([(2,), (3,), 5, 6]))
    mask = arrays.pop("segments") > 0
    expected = run(CONFIG, **arrays, mask=mask)
    place = arrays.pop("place")
    np.testing.assert_array_equal(run(CONFIG, **arrays, mask=mask), expected)
    assert np.isfinite(expected[mask]).all()
    # More places than visual tokens are noticed.
    many = np.where(place == TEXT, IMAGE, arrays["tokens"])
    assert np.isnan(run(CONFIG, tokens=many, images=arrays["images"], mask=mask)).any()


@pytest.mark.parametrize("attention", ["causal", "prefix", "image_blocks"])
def test_who_sees_whom(run, attention):
    """Of what comes after a token only what shares its prefix, or its image, changes its logits."""
    place = np.array([TEXT, 0, 1, 2, 3, TEXT, 4, 5, 6, 7, TEXT, TEXT])
    length = len(place)
    # In row j, and in no other, what stands at j is another token, or another of its image.
    tokens = np.tile(np.array(text(length), np.int32), (length + 1, 1))
    places = np.tile(place, (length + 1, 1)).astype(np.int32)
    for j in range(length):
        tokens[j, j] = (tokens[j, j] + 1) % VOCAB
        places[j, j] = TEXT if place[j] == TEXT else place[j] ^ 1
    images = np.tile(PICTURES[:2], (length + 1, 1, 1, 1, 1))
    arrays = {"tokens": tokens, "place": places, "images": images}
    later = np.arange(length)[:, None] >= np.arange(length)
    image = np.where(place < 0, -1, place // PER_IMAGE)
    same = {
        "causal": np.zeros_like(later),
        "image_blocks": (image[:, None] == image) & (image >= 0),
    }
    if attention == "prefix":
        prefix = np.arange(length) < 6
        arrays["prefix"] = np.tile(prefix, (length + 1, 1))
        same["prefix"] = prefix[:, None] & prefix
    logits = run(replace(attention=attention), **arrays)
    changed = np.abs(logits[:-1] - logits[-1]).max(-1).T > 1e-5  # [seeing, seen]
    np.testing.assert_array_equal(changed, later | same[attention])


def test_without_a_prefix_all_see_all(run):
    """As in a prompt that is to be continued."""
    arrays = stack(row(FIRST), row(SECOND))
    mask = arrays.pop("segments") > 0
    config = replace(attention="prefix")
    expected = run(config, **arrays, mask=mask, prefix=mask)
    np.testing.assert_allclose(run(config, **arrays, mask=mask), expected, atol=1e-6)


def _features(model, images):
    out = model.encoder(images, features=(0, 1))
    return model.features(images), out.features, out.tokens


def test_which_features_the_connector_reads(run):
    images = PICTURES[:3]
    features, layers, _ = run(CONFIG, _features, images=images)
    np.testing.assert_array_equal(features, layers[0][:, 1:])
    assert CONFIG.image_tokens == 4
    # Of several blocks, in the order asked for, with the class token.
    several = replace(features=(-1, 0), class_token=True)
    features, layers, _ = run(several, _features, images=images)
    np.testing.assert_array_equal(features, np.concatenate([layers[1], layers[0]], axis=-1))
    assert several.image_tokens == 5
    normed = replace(features=(1,), features_norm=True, class_token=True)
    features, _, tokens = run(normed, _features, images=images)
    np.testing.assert_array_equal(features, tokens)


def _encode(model, images):
    given = model.features(images.reshape(-1, 8, 8, 3)).reshape(2, 2 * PER_IMAGE, -1)
    tokens, _ = model.connector(given, None, (2, 2))
    return model.encode_images(images), tokens


def test_clips_are_read_together(run):
    perceiver = PerceiverConfig(latents=3, depth=1, heads=2, head_dim=8, frames=2)
    config = replace(connector=perceiver)
    assert config.image_tokens == 3
    visual, of_clips = run(config, _encode, images=PICTURES[:4].reshape(1, 4, 8, 8, 3))
    np.testing.assert_allclose(visual[0], of_clips.reshape(6, 32), atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": "prefx"}, "did you mean 'prefix'"),
        ({"features": ()}, "names no block"),
        ({"features": (2,)}, "no block 2 in an encoder of depth=2"),
        ({"features": (-3, -1)}, "no block -3 in an encoder of depth=2"),
        ({"connector": PixelShuffleConfig(3)}, "factor=2 is the nearest"),
        ({"connector": PixelShuffleConfig(2), "class_token": True}, "set class_token=False"),
    ],
)
def test_bad_configs_say_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(**changes)


@pytest.mark.parametrize(
    ("changes", "arrays", "message"),
    [
        ({}, {"prefix": np.ones((1, 4), bool)}, "no meaning where attention is 'causal'"),
        ({}, {"text": np.ones((1, 3), np.int32)}, "'linear' reads no text"),
        ({"connector": PerceiverConfig(frames=2)}, {}, "clips of 2 images, but rows have 1"),
        ({}, {"images": PICTURES[:1, None, :, :6]}, "not divisible into patches"),
    ],
)
def test_bad_input_says_what_is_wrong(changes, arrays, message):
    given = {"tokens": np.ones((1, 4), np.int32), "images": PICTURES[:1, None]} | arrays
    graph, shapes = params.abstract(lambda: VLM(replace(**changes), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda values, arrays: params.merge(graph, values)(**arrays), shapes, given)
