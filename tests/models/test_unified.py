"""The unified model: its grammar, its options, and decoding with a cache beside the whole."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mmjax
from mmjax.models import Unified, UnifiedConfig, VQGANConfig
from mmjax.models.lm import LMConfig
from mmjax.models.unified import ApartConfig, CodesConfig
from mmjax.nn.rope import Rope
from mmjax.quantizers import CodebookConfig, ResidualConfig

TEXT, CODES = 20, 12
BEGIN, END, ROW, IMAGE = 15, 16, 17, 18
LM = LMConfig(
    vocab_size=TEXT + CODES,
    max_len=64,
    width=24,
    depth=2,
    heads=3,
    mlp_width=40,
    activation="silu",
    norm_eps=1e-5,
    tied=False,
    rope=Rope(10_000.0),
)
BOOK = CodebookConfig(size=CODES, width=4)
TOKENIZER = VQGANConfig(
    image_size=8,
    quantizer=BOOK,
    width=4,
    multipliers=(1, 2),
    depth=1,
    latent=4,
    middle_attends=False,
    groups=2,
)
CONFIG = UnifiedConfig(
    LM, CodesConfig(TOKENIZER, ids=TEXT, begin=BEGIN, end=END), image_token=IMAGE
)
OPTIONS = {
    "plain": CONFIG,
    "rows": dataclasses.replace(
        CONFIG,
        image=dataclasses.replace(CONFIG.image, row=ROW),
        modality_embeddings=True,
        grid_positions=True,
        lm=dataclasses.replace(LM, experts=2, qk_norm=True, dropout=0.1),
    ),
    "apart": dataclasses.replace(
        CONFIG,
        lm=dataclasses.replace(LM, vocab_size=TEXT, tied=True),
        image=dataclasses.replace(CONFIG.image, end=None),
        apart=ApartConfig(embed_width=6, depth=2, hidden=10, head_hidden=14),
    ),
    "residual": dataclasses.replace(
        CONFIG,
        image=dataclasses.replace(
            CONFIG.image,
            tokenizer=dataclasses.replace(
                TOKENIZER, quantizer=ResidualConfig(dataclasses.replace(BOOK, size=6), depth=2)
            ),
        ),
        modality_embeddings=True,
    ),
}


def make(config):
    """A model with weights that are not all but zero."""
    model = Unified(config, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [
        leaf + 0.3 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return nnx.merge(graph, jax.tree.unflatten(tree, leaves))


@pytest.fixture(scope="module", params=OPTIONS)
def model(request):
    return make(OPTIONS[request.param])


def stream(model, count=2):
    """Text, an image, text, padded on the left; and its images, pixels."""
    length = model.config.image.length
    end = [] if model.config.image.end is None else [END]
    rows = [
        [1, 2, 3, BEGIN, *[IMAGE] * length, *end, 4, 5, 6],
        [7, BEGIN, *[IMAGE] * length, *end, 8],
    ][:count]
    longest = max(map(len, rows))
    tokens = np.array([[0] * (longest - len(row)) + row for row in rows], np.int32)
    mask = np.array([[False] * (longest - len(row)) + [True] * len(row) for row in rows])
    images = np.random.default_rng(0).uniform(-1, 1, (count, 1, 8, 8, 3)).astype(np.float32)
    return jnp.array(tokens), jnp.array(images), jnp.array(mask)


def run(model, *arguments, **options):
    """Compiled: one operation after the other takes longer."""
    return jax.jit(lambda a, o: model.run(*a, **o))(arguments, options)


def by_grammar(config, ids):
    """Which tokens may follow a row of ids, read from left to right as the documentation says."""
    image, allowed = config.image, []
    codes = image.all_ids
    words = [
        i for i in range(config.vocab_size) if i not in codes and i not in (image.end, image.row)
    ]
    inside = None
    for token in ids:
        if inside is not None:
            inside = None if inside == image.length else inside + 1
        if token == image.begin:
            inside = 0
        if inside == image.length and image.end is None:
            inside = None
        if inside is None:
            allowed.append(set(words))
        elif inside == image.length:
            allowed.append({image.end})
        elif image.row is not None and inside % image.row_length == image.row_length - 1:
            allowed.append({image.row})
        else:
            each = image.tokenizer.quantizer.size
            depth = inside % image.row_length % image.depth
            allowed.append({int(i) for i in codes[depth * each : (depth + 1) * each]})
    return allowed


def test_only_what_the_grammar_allows_has_logits(model):
    tokens, images, mask = stream(model)
    out = run(model, tokens, images, mask)
    lowest = float(jnp.finfo(jnp.float32).min)
    rows = zip(np.array(out.tokens), np.array(mask), np.array(out.logits), strict=True)
    for row, valid, logits in rows:
        expected = by_grammar(model.config, row[valid])
        for given, allowed in zip(logits[valid], expected, strict=True):
            assert set(np.flatnonzero(given > lowest).tolist()) == allowed


def test_follow_says_what_is_masked():
    model = make(CONFIG)
    tokens, images, mask = stream(model)
    plain = np.array(run(model.following("any"), tokens, images, mask).logits)
    never = np.array(run(model.following("never"), tokens, images, mask).logits)
    lowest = float(jnp.finfo(jnp.float32).min)
    assert np.all(plain > lowest)
    codes = model.config.image.all_ids
    assert np.all(never[..., codes] == lowest)
    np.testing.assert_array_equal(
        np.delete(never, codes, axis=-1), np.delete(plain, codes, axis=-1)
    )


def test_steps_equal_the_whole(model):
    tokens, images, mask = stream(model)
    ids = jax.jit(model.fill)(tokens, images, mask)
    whole = np.array(run(model, ids, mask=mask).logits)
    half = ids.shape[1] // 2  # within the image
    start = jax.jit(lambda *a: model.prefill(*a, length=ids.shape[1]))
    logits, cache = start(ids[:, :half], mask[:, :half])
    step = jax.jit(model.unstack().step)
    for place in range(half, ids.shape[1]):
        np.testing.assert_allclose(logits, whole[:, place - 1], atol=2e-5)
        logits, cache = step(ids[:, place], cache)
    np.testing.assert_allclose(logits, whole[:, -1], atol=2e-5)


def test_codes_become_the_images_of_the_tokenizer(model):
    _, images, _ = stream(model)
    ids = jax.jit(model.image_ids)(images)[:, 0]
    assert ids.shape == (2, model.config.image.length)
    there_and_back = jax.jit(lambda x: model.tokenizer.decode(model.tokenizer.encode(x)))
    expected = there_and_back(images[:, 0])
    np.testing.assert_allclose(jax.jit(model.images_of)(ids), expected, atol=1e-6)
    if model.config.image.row is not None:
        assert np.all(ids.reshape(2, 4, -1)[:, :, -1] == ROW)


def test_packed_samples_are_as_if_alone(model):
    tokens, images, mask = stream(model)
    alone = np.array(run(model, tokens, images, mask).logits)[np.array(mask)]
    row = tokens[mask][None]
    segments = jnp.repeat(jnp.array([1, 2]), mask.sum(axis=1))[None]
    packed = run(model, row, images.reshape(1, 2, 8, 8, 3), segments=segments).logits[0]
    np.testing.assert_allclose(packed, alone, atol=2e-5)


def test_ids_that_are_listed_say_which_code_is_which():
    order = tuple(np.random.default_rng(0).permutation(CODES) + TEXT)
    image = dataclasses.replace(CONFIG.image, ids=tuple(int(i) for i in order))
    plain, permuted = make(CONFIG), make(dataclasses.replace(CONFIG, image=image))
    _, images, _ = stream(plain)
    ids, others = (jax.jit(model.image_ids)(images) for model in (plain, permuted))
    np.testing.assert_array_equal(others, np.array(order)[np.array(ids) - TEXT])
    drawn, again = jax.jit(plain.images_of)(ids[:, 0]), jax.jit(permuted.images_of)(others[:, 0])
    np.testing.assert_array_equal(drawn, again)


def test_dropout_needs_a_key_and_changes_what_is_computed():
    model = make(OPTIONS["rows"])
    tokens, images, mask = stream(model)
    plain = np.array(run(model, tokens, images, mask).hidden)
    first, again, other = (
        np.array(run(model, tokens, images, mask, rng=jax.random.key(k)).hidden) for k in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - plain).max() > 0.01
    assert np.abs(first - other).max() > 0.01


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (dict(lm=dataclasses.replace(LM, vocab_size=TEXT)), "outside of a vocabulary of 20"),
        (dict(image=dataclasses.replace(CONFIG.image, end=BEGIN)), "must all differ"),
        (dict(follow="gramar"), "did you mean 'grammar'"),
        (dict(lm=dataclasses.replace(LM, rope=None, max_len=17)), "no room for an image of 16 ids"),
        (dict(lm=dataclasses.replace(LM, experts=3)), "lm.experts=3"),
        (dict(apart=ApartConfig()), "must begin with lm.vocab_size=32"),
    ],
)
def test_configs_that_cannot_be(wrong, match):
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(CONFIG, **wrong)


def test_images_that_do_not_make_whole_codes_are_refused():
    model = make(CONFIG)
    with pytest.raises(ValueError, match="9 x 8 pixels do not make whole codes"):
        model.image_ids(jnp.zeros((1, 1, 9, 8, 3)))
    with pytest.raises(ValueError, match="An image has 16 ids, not 15"):
        model.images_of(jnp.zeros((1, 15), jnp.int32))


def test_build_from_a_config():
    model = mmjax.build({"name": "unified", **dataclasses_to_dict(CONFIG)}, rngs=nnx.Rngs(0))
    assert model.config == CONFIG


def dataclasses_to_dict(config):
    return {k: v for k, v in dataclasses.asdict(config).items() if k != "name"}
