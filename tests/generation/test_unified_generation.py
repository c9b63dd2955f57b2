"""Text and images from one stream: cached generation beside a loop that reads all again, and the
pictures of what is written."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import writers
from flax import nnx
from test_generator import compilations, make_model
from test_guidance import uncached
from test_images import ENCODER, draw

from mmjax import sharding
from mmjax.connectors.mlp import MLPConfig
from mmjax.generation import Generator, Painter, contact_sheet, split, text_only
from mmjax.models.janus import Janus, JanusConfig
from mmjax.models.unified import CodesConfig, Unified, UnifiedConfig
from mmjax.models.vqgan import VQGANConfig
from mmjax.quantizers import CodebookConfig

CODES, BEGIN, END, ROW, IMAGE, EOS = 12, 15, 16, 17, 18, 19
TEXT = 20
LENGTH = 4 * 5  # of the ids of an image: 4 rows of 4 codes, and their ends
TOKENIZER = VQGANConfig(
    image_size=8,
    quantizer=CodebookConfig(size=CODES, width=4),
    width=4,
    multipliers=(1, 2),
    depth=1,
    latent=4,
    middle_attends=False,
    groups=2,
)
CONFIG = UnifiedConfig(
    lm=dataclasses.replace(make_model().config, vocab_size=TEXT + CODES, experts=2),
    image=CodesConfig(TOKENIZER, ids=TEXT, begin=BEGIN, end=END, row=ROW),
    image_token=IMAGE,
    modality_embeddings=True,
    grid_positions=True,
)
MEAN, STD = (0.5, 0.4, 0.6), (0.25, 0.3, 0.2)
DRAWN = dict(temperature=1.5, top_k=20)


@pytest.fixture(scope="module")
def model():
    return draw(lambda: Unified(CONFIG, rngs=nnx.Rngs(0)), scale=0.5)


@pytest.fixture(scope="module")
def generator(model):
    return Generator(model)


@pytest.fixture(scope="module")
def ids(model):
    """Those of two images."""
    return np.asarray(model.image_ids(jnp.asarray(pixels()[None])))[0]


def pixels():
    return np.random.default_rng(3).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)


def texts():
    """Of unequal lengths."""
    random = np.random.default_rng(0)
    return [random.integers(0, BEGIN, length).tolist() for length in (3, 9, 6)]


def to_draw():
    return [[*text, BEGIN] for text in texts()]


@pytest.fixture(scope="module")
def read(model):
    """Whole streams -> the logits [B, V] of what follows."""
    logits = jax.jit(lambda tokens, mask: model(tokens, mask=mask)[:, -1])

    def call(rows):
        tokens, mask = writers.padded([[0] * 64, *rows])
        return logits(tokens[1:], mask[1:])

    return call


def test_drawing_is_the_uncached_loop(generator, read):
    negative, new = [[1, BEGIN]], LENGTH + 4
    plain = generator(to_draw(), max_new_tokens=new).tokens
    np.testing.assert_array_equal(plain, uncached(read, to_draw(), to_draw(), 1.0, new))
    guided = generator(to_draw(), guidance=3.0, negative=negative, max_new_tokens=new).tokens
    np.testing.assert_array_equal(guided, uncached(read, to_draw(), negative * 3, 3.0, new))
    assert guided.tolist() != plain.tolist()
    for row in np.concatenate([plain, guided]):
        image = row[:LENGTH].reshape(4, 5)
        assert (image[:, :4] >= TEXT).all() and (image[:, 4] == ROW).all()
        assert row[LENGTH] == END and (row[LENGTH + 1 :] < TEXT).all()
        assert len(set(image[:, :4].ravel())) > 3


def test_a_row_does_not_depend_on_its_neighbours(generator):
    keys = jax.random.split(jax.random.key(3), 3)
    negative = [[1, BEGIN], [2, 3, 4, 5, 6, 7, 8, 9, BEGIN], [BEGIN]]
    options = dict(max_new_tokens=LENGTH + 4, guidance=2.5, **DRAWN)
    together = generator(to_draw(), negative=negative, key=keys, **options).tokens
    for row in (0, 2):
        here = slice(row, row + 1)
        alone = generator(to_draw()[here], negative=negative[here], key=keys[here], **options)
        np.testing.assert_array_equal(alone.tokens[0], together[row])


def test_images_may_be_given_as_pixels_or_ids(generator, read, ids):
    held = [
        [1, BEGIN, *[IMAGE] * LENGTH, END, 5, 6],
        [BEGIN, *[IMAGE] * LENGTH, END, 7],
    ]
    rows = [[1, BEGIN, *ids[0], END, 5, 6], [BEGIN, *ids[1], END, 7]]
    images = pixels()[:, None]
    options = dict(max_new_tokens=8, suppress=text_only(CONFIG))
    out = generator(held, images, **options)
    np.testing.assert_array_equal(generator(rows, **options).tokens, out.tokens)
    assert len(np.unique(out.tokens)) > 4
    expected = uncached(lambda rows: _without(read(rows)), rows, rows, 1.0, 8)
    np.testing.assert_array_equal(out.tokens, expected)
    # The picture counts, of prompts and of negative ones.
    others = generator(held, -images[::-1], **options).tokens
    assert others.tolist() != out.tokens.tolist()
    guided = generator(held, images, guidance=3.0, negative=[[1, 5, 6]], **options).tokens
    by_ids = generator(
        rows, guidance=3.0, negative=held[:1], negative_images=images[:1], **options
    ).tokens
    expected = uncached(lambda rows: _without(read(rows)), rows, [[1, 5, 6]] * 2, 3.0, 8)
    np.testing.assert_array_equal(guided, expected)
    expected = uncached(lambda texts: _without(read(texts)), rows, rows[:1] * 2, 3.0, 8)
    np.testing.assert_array_equal(by_ids, expected)


def _without(logits):
    return np.where(np.isin(np.arange(TEXT + CODES), text_only(CONFIG)), -1e30, logits)


def test_streams_of_text_and_images(model, generator):
    """Whatever is drawn, images are whole; what is left of the last is known."""
    rows = [*texts(), *to_draw()]
    out = generator(rows, max_new_tokens=70, key=jax.random.key(0), **DRAWN).tokens
    painter, seen = Painter(model, mean=MEAN, std=STD, batch_size=4), 0
    whole, images = [], []
    for row, written in zip(rows, out.tolist(), strict=True):
        stream = [*row, *written]
        try:
            parts = split(CONFIG, stream)
        except ValueError as error:
            assert "ends within an image" in str(error)
            stream = stream[: len(stream) - stream[::-1].index(BEGIN) - 1]
            parts = split(CONFIG, stream)
        again = []
        for part in parts:
            again += [BEGIN, *part.ids, END] if part.is_image else part.ids.tolist()
        assert again == stream
        whole.append(stream)
        images.append([part.ids for part in parts if part.is_image])
        seen += len(images[-1])
    assert seen > 6 and min(map(len, images)) < max(map(len, images))
    pictures = painter.of(whole)
    for some, expected in zip(pictures, images, strict=True):
        np.testing.assert_array_equal(some, painter(np.reshape(expected, (-1, LENGTH))))


def test_pictures_are_those_of_the_tokenizer(model, ids):
    painter = Painter(model, mean=MEAN, std=STD, batch_size=2)
    many = np.concatenate([ids, ids[::-1], ids[:1]])
    codes = many.reshape(-1, 4, 5)[:, :, :4] - TEXT
    images = np.asarray(model.tokenizer.decode(jnp.asarray(codes)), np.float64)
    levels = np.clip((images * STD + MEAN) * 255, 0, 255)
    pictures = painter(many)
    assert pictures.dtype == np.uint8 and pictures.shape == (5, 8, 8, 3)
    # Rounded, where the next level is not as near.
    assert np.abs(pictures - levels).max() < 0.501
    assert len(np.unique(pictures)) > 20
    with compilations() as compiled:
        assert painter(many[:0]).shape == (0, 8, 8, 3)
        other = draw(lambda: Unified(CONFIG, rngs=nnx.Rngs(0)), scale=0.2)
        changed = Painter(other, mean=MEAN[::-1], std=STD)(many[:2])
    assert not compiled and np.any(changed != pictures[:2])


def test_contact_sheet_shows_every_pixel(model, ids):
    pictures = Painter(model, mean=MEAN, std=STD)(np.concatenate([ids, ids[:1]]))
    sheet = np.asarray(contact_sheet([("a red heart", pictures[:2]), ("a tree", pictures[2:])]))
    places = [(8 + 18, 8), (8 + 18, 8 + 136), (8 + 18 + 136 + 18, 8)]
    for picture, (top, left) in zip(pictures, places, strict=True):
        shown = sheet[top : top + 128, left : left + 128]
        np.testing.assert_array_equal(shown, picture.repeat(16, axis=0).repeat(16, axis=1))
    assert (sheet[8:26] < 128).any()  # words


def test_same_pictures_on_a_mesh(model, generator, monkeypatch):
    monkeypatch.setattr(sharding, "FSDP_MIN_SIZE", 2)  # tiny parameters are sharded too
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    spread = Generator(model, mesh=mesh)
    rows = [*to_draw(), [4, 3, 2, BEGIN]]
    options = dict(max_new_tokens=LENGTH, guidance=2.5, negative=[[1, BEGIN]])
    options |= dict(key=jax.random.key(0), **DRAWN)
    expected = generator(rows, **options).tokens
    out = spread(rows, **options).tokens
    np.testing.assert_array_equal(out, expected)
    pictures = Painter(spread.model, mean=MEAN, std=STD, mesh=mesh)(out)
    whole = Painter(model, mean=MEAN, std=STD)(out)
    assert np.abs(pictures.astype(int) - whole).max() <= 1


def test_models_that_read_and_draw():
    """Janus: `begin` stands before images that are read, too, and each has slots of both kinds."""
    config = JanusConfig(
        encoder=dataclasses.replace(ENCODER, pooling="none"),
        connector=MLPConfig(),
        lm=CONFIG.lm,
        image=CONFIG.image,
        image_token=1000,
    )
    model = draw(lambda: Janus(config, rngs=nnx.Rngs(0)), scale=0.5)
    generator, images = Generator(model), pixels()[None]
    (prompt,) = [[1, BEGIN, *[1000] * 4, END, 2, BEGIN, *[1000] * 4, END, 3, BEGIN]]
    logits = jax.jit(lambda *given: model(*given)[:, -1])

    def read(rows):
        tokens, mask = writers.padded([[0] * 48, *rows])
        return logits(tokens[1:], images, mask[1:])

    out = generator([prompt], images, max_new_tokens=LENGTH + 2).tokens
    np.testing.assert_array_equal(out, uncached(read, [prompt], [prompt], 1.0, LENGTH + 2))
    assert np.unique(out).size > 6
    place = np.full(len(prompt), -1)
    place[2:6], place[9:13] = range(4), range(config.places, config.places + 4)
    again = generator([prompt], images, place=[place], max_new_tokens=LENGTH + 2).tokens
    np.testing.assert_array_equal(again, out)
    # The second image as if it had been drawn: the ids of its codes are after its visual tokens.
    drawn = [*prompt[:9], *[1000] * LENGTH, END, 3, BEGIN]
    where = np.full(len(drawn), -1)
    where[2:6] = range(4)
    where[9 : 9 + LENGTH] = np.arange(LENGTH) + config.places + config.image_tokens
    options = dict(max_new_tokens=LENGTH, guidance=2.0, negative=[prompt], negative_images=images)
    given = generator([drawn], images, place=[where], **options).tokens
    ids = np.asarray(model.image_ids(jnp.asarray(images)))[0, 1]
    drawn[9 : 9 + LENGTH], where[9 : 9 + LENGTH] = ids.tolist(), -1
    np.testing.assert_array_equal(generator([drawn], images, place=[where], **options)[0], given)


IMAGE_IDS = [*[TEXT] * 4, ROW] * 4
WRONG = {
    "unclosed": ([1, BEGIN, *IMAGE_IDS[:7]], r"ends within an image, 14 ids too early.*takes 22"),
    "no end": ([1, BEGIN, *IMAGE_IDS], "within an image, 1 ids too early"),
    "another end": ([BEGIN, *IMAGE_IDS, 5], r"followed by 5, not by end=16"),
    "too few": (
        [BEGIN, *IMAGE_IDS[:8], END, 5],
        r"whose id 8 \(of 20\) is 16.*4 x 4 places, row=17",
    ),
    "no rows": ([BEGIN, *[TEXT] * 16, END], r"id 4 \(of 20\) is 20"),
    "an image in an image": ([BEGIN, *IMAGE_IDS[:8], BEGIN, *IMAGE_IDS, END], "is 15"),
    "codes without begin": ([1, *IMAGE_IDS, END], r"has the id 20 of an image.*begin=15"),
    "an end of nothing": ([1, END], "has the id 16 of an image where text stands"),
}


@pytest.mark.parametrize("case", WRONG)
def test_streams_that_are_none(case):
    ids, message = WRONG[case]
    with pytest.raises(ValueError, match=f"^The stream.*{message}"):
        split(CONFIG, ids)


BAD = {
    **{
        name: (dict(tokens=[[1], ids]), f"^Prompt 1.*{message}")
        for name, (ids, message) in WRONG.items()
        if name not in ("unclosed", "no end")
    },
    "an image without begin": (
        dict(tokens=[[1, *[IMAGE] * LENGTH, 2]], images=np.zeros((1, 1, 8, 8, 3), np.float32)),
        "Prompt 0 has the id 18 of an image where text stands",
    ),
    "negative prompts of text": (
        dict(tokens=to_draw(), negative=[[1]], guidance=2.0),
        r"Prompt 0 ends within an image, after 0 of its ids, its negative one in text.*begin=15",
    ),
    "too long": (dict(tokens=[[1] * 70]), "longer than the model's limit of 64"),
    "no room for the image": (
        dict(tokens=[[*[1] * 50, BEGIN]], max_new_tokens=LENGTH),
        "at most 13 tokens can follow",
    ),
}


@pytest.fixture(scope="module")
def limited():
    """With learned positions."""
    config = dataclasses.replace(CONFIG, lm=dataclasses.replace(CONFIG.lm, rope=None, max_len=64))
    return Generator(draw(lambda: Unified(config, rngs=nnx.Rngs(0))))


@pytest.mark.parametrize("case", BAD)
def test_bad_prompts(limited, case):
    options, message = BAD[case]
    with compilations() as compiled, pytest.raises(ValueError, match=message):
        limited(**{"max_new_tokens": 4, **options})
    assert not compiled


def test_where_all_may_follow_nothing_is_checked(model):
    free = Generator(model.following("any"))
    assert free([[1, TEXT, BEGIN, 2]], max_new_tokens=2).tokens.shape == (1, 2)
