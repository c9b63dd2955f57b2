"""Prompts with images: cached generation beside a loop that reads all again for each token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_generator import compilations, make_model

import mmjax
from mmjax import params, sharding
from mmjax.connectors.mlp import MLPConfig
from mmjax.connectors.qformer import QFormerConfig
from mmjax.generation import Generator
from mmjax.generation.prompts import bucket
from mmjax.models.t5 import T5Config
from mmjax.models.vit import ViTConfig
from mmjax.models.vlm import VLM, Seq2SeqVLM, Seq2SeqVLMConfig, VLMConfig

VOCABULARY, IMAGE, NEW = 97, 1000, 12
PER_IMAGE = 4
ENCODER = ViTConfig(
    image_size=8,
    patch_size=4,
    width=16,
    depth=2,
    heads=2,
    mlp_width=24,
    activation="gelu",
    norm_eps=1e-5,
    pooling="cls",
    position="learned",
)
COUNTS = (2, 0, 1, 3)  # images of the rows


def draw(make, scale=0.3):
    """A model whose weights numpy draws: quicker than compiling initialisers."""
    graph, shapes = params.abstract(make)
    draw = np.random.default_rng(0).standard_normal
    weights = {path: scale * draw(s.shape) + path.endswith("scale") for path, s in shapes.items()}
    return params.merge(graph, {path: jnp.float32(value) for path, value in weights.items()})


def make_vlm(**options):
    config = VLMConfig(
        encoder=ENCODER,
        connector=MLPConfig(),
        lm=make_model().config,
        image_token=IMAGE,
        newline=True,
        **options,
    )
    return draw(lambda: VLM(config, rngs=nnx.Rngs(0)))


def make_questioned():
    """Its connector reads the question."""
    connector = QFormerConfig(
        queries=PER_IMAGE, width=16, depth=2, heads=2, mlp_width=24, vocab_size=50, max_len=16
    )
    lm = make_model().config
    config = VLMConfig(encoder=ENCODER, connector=connector, lm=lm, image_token=IMAGE)
    return draw(lambda: VLM(config, rngs=nnx.Rngs(0)), scale=0.5)


def make_seq2seq():
    lm = T5Config(
        vocab_size=VOCABULARY,
        width=32,
        depth=2,
        decoder_depth=2,
        heads=2,
        head_dim=16,
        mlp_width=48,
        activation="relu",
        gated=False,
        norm_eps=1e-6,
        buckets=8,
        max_distance=32,
        tied=False,
        scale_logits=False,
        decoder_start_id=3,
    )
    config = Seq2SeqVLMConfig(encoder=ENCODER, connector=MLPConfig(), lm=lm, image_token=IMAGE)
    return draw(lambda: Seq2SeqVLM(config, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def model():
    return make_vlm()


@pytest.fixture(scope="module")
def generator(model):
    return Generator(model)


def prompts(counts=COUNTS):
    """(ids, images) of rows of unequal lengths with unequal numbers of images."""
    random = np.random.default_rng(1)
    rows, images = [], []
    for row, count in enumerate(counts):
        ids = random.integers(4, VOCABULARY, 2 + row).tolist()
        for _ in range(count):
            ids += [IMAGE] * PER_IMAGE + random.integers(4, VOCABULARY, 1 + row).tolist()
        rows.append(ids)
        images.append(2 * random.standard_normal((count, 8, 8, 3)).astype(np.float32))
    return rows, images


def places(rows):
    """Counted one by one."""
    result = []
    for row in rows:
        count = iter(range(len(row)))
        result.append([next(count) if token == IMAGE else -1 for token in row])
    return result


def reader(model):
    return jax.jit(lambda tokens, images, mask, given: model(tokens, images, mask, **given))


def uncached(read, rows, images, place, *, penalty=1.0, start=None):
    """The most probable tokens: all is read again for each of them, padded on the right."""
    lengths = np.array([len(row) for row in rows])
    shape = (len(rows), max(lengths) + NEW)
    tokens, where = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
    stacked = np.zeros((len(rows), max(map(len, images)), 8, 8, 3), np.float32)
    for row, (ids, entry, seen) in enumerate(zip(rows, place, images, strict=True)):
        tokens[row, : len(ids)], where[row, : len(ids)] = ids, entry
        stacked[row, : len(seen)] = seen
    decoder = np.zeros((len(rows), NEW + 1), np.int32)
    written, index = [], np.arange(len(rows))
    for step in range(NEW):
        mask = np.arange(shape[1]) < lengths[:, None]
        given, last, known = {"place": where}, lengths - 1, tokens
        if start is not None:
            decoder[:, 0] = start
            given["decoder_tokens"], last, known = decoder, step, decoder[:, : step + 1]
        logits = np.array(read(tokens, stacked, mask, given))[index, last]
        for row, values in enumerate(logits):
            ids = known[row][mask[row] & (where[row] == -1)] if start is None else known[row]
            seen = np.unique(ids)
            values[seen] = np.where(
                values[seen] < 0, values[seen] * penalty, values[seen] / penalty
            )
        written.append(logits.argmax(axis=1))
        if start is None:
            tokens[index, lengths] = written[-1]
            lengths = lengths + 1
        else:
            decoder[:, step + 1] = written[-1]
    return np.stack(written, axis=1)


def test_greedy_is_the_uncached_loop(model, generator):
    rows, images = prompts()
    place, read = places(rows), reader(model)
    expected = uncached(read, rows, images, place)
    out = generator(rows, images, max_new_tokens=NEW).tokens
    np.testing.assert_array_equal(out, expected)
    # What they write is of the images, and goes on changing.
    blank = [np.zeros_like(row) for row in images]
    changed = (generator(rows, blank, max_new_tokens=NEW).tokens != expected).any(axis=1)
    assert changed.tolist() == [count > 0 for count in COUNTS]
    assert max(len(set(row)) for row in expected.tolist()) > 8
    # Places may be said, and arrays padded anywhere.
    tokens, mask = np.full((4, 40), 7), np.zeros((4, 40), bool)
    where = np.full((4, 40), 55)
    for row, ids in enumerate(rows):
        tokens[row, 2 : 2 + len(ids)], where[row, 2 : 2 + len(ids)] = ids, place[row]
        mask[row, 2 : 2 + len(ids)] = True
    out = generator(tokens, images, mask, place=where, max_new_tokens=NEW).tokens
    np.testing.assert_array_equal(out, expected)
    # A newline after the first two visual tokens of the last row, and the order turned around.
    place[3] = [-2 if p == 2 else 11 - p if p >= 0 else -1 for p in place[3]]
    expected = uncached(read, rows, images, place, penalty=1.4)
    out = generator(rows, images, place=place, max_new_tokens=NEW, repetition_penalty=1.4).tokens
    np.testing.assert_array_equal(out, expected)


def test_a_row_does_not_depend_on_its_neighbours(generator):
    rows, images = prompts()
    options = dict(max_new_tokens=NEW, eos_id=50, pad_id=0)
    together = generator(rows, images, **options)
    for row in (1, 2):
        alone = generator([rows[row]], [images[row]], **options)
        length = together.lengths[row]
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row, :length])
    # Beams, in another place and among others; as many, so that nothing more is compiled.
    together = generator(rows, images, num_beams=2, **options)
    others = [rows[3], [4, 5], rows[2], [6]], [-images[3], [], images[2], []]
    among = generator(*others, num_beams=2, **options)
    assert among.lengths[2] == together.lengths[2] == NEW
    np.testing.assert_array_equal(among.tokens[2], together.tokens[2])
    np.testing.assert_allclose(among.scores[2], together.scores[2], atol=1e-5)
    assert among.tokens[0].tolist() != together.tokens[3].tolist()


def test_streams_what_it_returns(generator):
    rows, images = prompts()
    parts = []
    options = dict(max_new_tokens=NEW)
    out = generator(rows, images, **options, stream=parts.append)
    assert len(parts) == NEW
    for row in range(len(rows)):
        assert [token for part in parts for token in part[row]] == out.tokens[row].tolist()
    stop = f"<{out.tokens[0, 4]}>"
    stopped = generator(
        rows,
        images,
        **options,
        stop_strings=stop,
        decode=lambda ids: "".join(f"<{token}>" for token in ids),
    )
    assert stopped.lengths[0] == out.tokens[0].tolist().index(out.tokens[0, 4]) + 1


def test_placeholders_are_not_repeated(generator):
    """Of the ids that hold visual tokens' places, only those of the vocabulary count as seen."""
    rows, images = prompts()
    options = dict(max_new_tokens=NEW, place=places(rows), repetition_penalty=1.4)
    expected = generator(rows, images, **options).tokens
    first = int(expected[0, 0])
    for placeholder, same in ((first - VOCABULARY, True), (VOCABULARY, True), (first, False)):
        held = [[placeholder if token == IMAGE else token for token in row] for row in rows]
        out = generator(held, images, **options).tokens
        assert (out[0].tolist() == expected[0].tolist()) is same


def test_encoder_decoder():
    model = make_seq2seq()
    rows, images = prompts()
    expected = uncached(reader(model), rows, images, places(rows), penalty=1.3, start=3)
    out = mmjax.generate(model, rows, images, max_new_tokens=NEW, repetition_penalty=1.3)
    np.testing.assert_array_equal(out, expected)


def test_connectors_that_read_the_question():
    """Each row's question goes to each of its images, whatever the others' are."""
    model = make_questioned()
    rows, images = prompts((2, 1))
    read = jax.jit(model)
    firsts = []
    for question in ([5, 6, 7], [8, 9, 10], [11, 3, 12]):
        text = [question, [4] * 9]
        out = mmjax.generate(model, rows, images, text=text, max_new_tokens=1)
        both = jnp.asarray([question] * 2, jnp.int32)
        alone = read(jnp.asarray(rows[:1]), jnp.asarray(images[:1]), text=both)
        assert out[0, 0] == alone[0, -1].argmax()
        firsts.append(out[0, 0])
    assert len(set(firsts)) > 1


def test_numbers_of_images_and_new_weights_share_programs(model, generator):
    options = dict(max_new_tokens=NEW)
    rows, images = prompts()
    first = generator(rows, images, **options).tokens
    graph, leaves = params.split(model)
    other = params.merge(graph, {path: 0.9 * x for path, x in leaves.items()})
    with compilations() as compiled:
        generator(*prompts((1, 2, 0, 3)), **options)
        # As an evaluator does, again and again.
        second = Generator(other)(rows, images, **options).tokens
    assert not compiled
    assert first.tolist() != second.tolist()
    # These numbers of images are compiled for.
    sizes = [bucket(count, 1) for count in range(1, 14)]
    assert sizes == [1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16]


def test_same_tokens_on_a_mesh(model, generator, monkeypatch):
    monkeypatch.setattr(sharding, "FSDP_MIN_SIZE", 2)  # tiny parameters are sharded too
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    rows, images = prompts()
    spread = Generator(model, mesh=mesh)
    prompt = spread.place(spread._read(rows, images, None, None, None, None), batch=4)
    assert prompt.sight["images"].sharding.shard_shape((4, 3, 8, 8, 3))[0] == 1
    expected = generator(rows, images, max_new_tokens=NEW).tokens
    np.testing.assert_array_equal(spread(rows, images, max_new_tokens=NEW).tokens, expected)


ROWS = [[5, *[IMAGE] * PER_IMAGE, 6], [7, 8]]
PICTURES = [np.zeros((1, 8, 8, 3)), np.zeros((0, 8, 8, 3))]
BAD = {
    "too few images": (dict(images=PICTURES[1:] * 2), r"Prompt 0 has 4 places .* 0 image\(s\)"),
    "no images": (dict(images=None), "Prompt 0 has 4 places"),
    "too many images": (dict(images=PICTURES[:1] * 2), r"Prompt 1 has 0 places .* 1 image\(s\)"),
    "images for other rows": (dict(images=PICTURES[:1]), "images are of 1 rows, tokens of 2"),
    "one image, no rows of them": (dict(images=np.zeros((2, 8, 8, 3))), "shape"),
    "another size": (dict(images=[np.zeros((1, 9, 8, 3)), []]), r"\(1, 9, 8, 3\).*8, 8, 3\]"),
    "bytes": (dict(images=[np.zeros((1, 8, 8, 3), np.uint8), []]), "uint8: give normalised"),
    "a place beyond": (dict(place=[[-1, 0, 1, 2, 4, -1], [-1] * 2]), "5 places"),
    "a place without images": (dict(place=[[-1] * 6, [0, -1]]), "Prompt 1 has 1 places"),
    "a place below": (dict(place=[[-1, 0, 1, -3, 3, -1], [-1] * 2]), "lowest .* is -2"),
    "places of other rows": (dict(place=[[-1] * 2, [-1] * 2]), "an entry for each token"),
    "words outside": (dict(place=[[-1, -1, 0, 1, 2, -1], [-1] * 2]), "vocabulary has 97 tokens"),
    "a question that nobody reads": (dict(text=[[5], [6]]), "'mlp' reads no text"),
    "questions for other rows": (dict(text=[[5]]), "text has 1 rows, tokens 2"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(generator, case):
    options, message = BAD[case]
    options = {"images": PICTURES, "max_new_tokens": 4, **options}
    with compilations() as compiled, pytest.raises(ValueError, match=message):
        generator(ROWS, **options)
    assert not compiled


def test_language_models_take_no_places():
    with pytest.raises(ValueError, match="LM takes no place"):
        mmjax.generate(make_model(), [[5]], place=[[-1]], max_new_tokens=1)
