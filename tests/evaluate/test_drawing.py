"""Evaluators of models that draw and name images, with a tiny random model and real data."""

import dataclasses
import functools
import io
import json

import fakes
import hf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from scipy import stats

from mmjax import params, sharding
from mmjax.convert import ConversionError
from mmjax.data import open_questions
from mmjax.data.tokenizer import train_tokenizer
from mmjax.evaluate import codes, drawing, make_evaluator
from mmjax.evaluate.drawing_sheet import DPI, sheet_size
from mmjax.evaluate.image_metrics import frechet_distance
from mmjax.evaluate.likelihood import answer_arrays, answer_log_probs
from mmjax.generation import Generator
from mmjax.models.lm import LMConfig
from mmjax.models.unified import CodesConfig, Unified, UnifiedConfig
from mmjax.models.vqgan import VQGANConfig
from mmjax.nn.rope import Rope
from mmjax.quantizers import CodebookConfig

COLOURS = {
    "red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 80, 220), "gray": (150, 150, 150),
}  # fmt: skip
SHAPES = {"dot": (3, 3), "bar": (1, 6), "pole": (6, 1), "field": (6, 6), "o'clock": (2, 4)}
NAMES = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
ALSO = {name: [f"my {name}"] for name in NAMES[::2]}
BEGIN, END, CODE, SIZE, LENGTH = 4, 5, 6, 8, 4 * 4
CODES, VOCABULARY = 24, 120
CONFIG = UnifiedConfig(
    lm=LMConfig(
        vocab_size=VOCABULARY + CODES,
        max_len=48,
        width=24,
        depth=2,
        heads=3,
        mlp_width=40,
        activation="silu",
        norm_eps=1e-5,
        tied=False,
        rope=Rope(10_000.0),
    ),
    image=CodesConfig(
        VQGANConfig(
            image_size=SIZE,
            quantizer=CodebookConfig(size=CODES, width=4),
            width=4,
            multipliers=(1, 2),
            depth=1,
            latent=4,
            middle_attends=False,
            groups=2,
        ),
        ids=VOCABULARY,
        begin=BEGIN,
        end=END,
    ),
    image_token=CODE,
)
DRAWN = dict(temperature=0.8, top_k=12)


def weights(seed):
    """Those that numpy draws: not all but zero."""
    graph, shapes = params.abstract(lambda: Unified(CONFIG, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(seed)
    return graph, {
        path: jnp.float32(0.4 * rng.standard_normal(s.shape) + path.endswith("scale"))
        for path, s in shapes.items()
    }


@pytest.fixture(scope="module")
def tokenizer():
    texts = [*NAMES, *(name for also in ALSO.values() for name in also)]
    found = train_tokenizer("wordpiece", texts, VOCABULARY, ("<image>", "</image>", "<code>"))
    assert found.backend.token_to_id("</image>") == END
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A picture of each name, and a file of records."""
    root, records = tmp_path_factory.mktemp("records"), []
    for number, name in enumerate(NAMES):
        colour, shape = name.split()
        pixels = np.full((SIZE, SIZE, 3), 255, np.uint8)
        height, width = SHAPES[shape]
        pixels[1 : 1 + height, 1 : 1 + width] = COLOURS[colour]
        Image.fromarray(pixels).save(root / f"{number}.png")
        records.append(
            {"image": f"{number}.png", "text": name, "also": ALSO.get(name, []), "colour": colour}
        )
    (root / "records.json").write_text(json.dumps(records))
    return root


def data(root, form, **fields):
    return dict(
        sources=[
            dict(name="json", path=str(root / "records.json"), form=dict(name=form, **fields))
        ],
        conversation=dict(
            template="stream",
            max_len=48,
            images=1,
            layout=dict(
                name="codes",
                preset="siglip",
                size=SIZE,
                tokens=LENGTH,
                begin="<image>",
                end="</image>",
            ),
            image_token=CODE,
        ),
    )


@pytest.fixture
def named(root):
    return data(root, "caption", prompts=("",), also_field="also")


@pytest.fixture
def drawn(root):
    return data(root, "drawing")


def make_context(workdir, tokenizer, devices=1):
    base, _ = fakes.make_context(workdir)
    graph, arrays = weights(0)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=devices), jax.devices()[:devices])
    where = sharding.parameter_shardings(arrays, sharding.DEFAULT_RULES, mesh)
    placed = {path: jax.device_put(leaf, where[path]) for path, leaf in arrays.items()}
    context = dataclasses.replace(
        base, graphdef=graph, mesh=mesh, tokenizer=tokenizer, open_questions=open_questions
    )
    return context, placed


@pytest.fixture
def context(tmp_path, tokenizer):
    return make_context(tmp_path, tokenizer)


class Encoder:
    """Images by their pixels, and texts by their colour and shape, as they would be drawn."""

    def __init__(self, noise=0.0):
        self.noise, self.embedded = noise, 0

    def images(self, pictures):
        assert all(p.dtype == np.uint8 and p.shape == (SIZE, SIZE, 3) for p in pictures)
        self.embedded += len(pictures)
        return self._unit([255.0 - np.float32(picture).ravel() for picture in pictures])

    def texts(self, texts, truncation=False):
        drawn = np.zeros((len(texts), SIZE, SIZE, 3), np.float32)
        for one, text in zip(drawn, texts, strict=True):
            colour, shape = text.split()[-2:]
            height, width = SHAPES[shape]
            one[1 : 1 + height, 1 : 1 + width] = 255.0 - np.float32(COLOURS[colour])
        return self._unit(drawn.reshape(len(texts), -1))

    def _unit(self, x):
        x = np.asarray(x, np.float32) + 1e-3
        return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.fixture
def encoder(monkeypatch):
    found = Encoder()
    monkeypatch.setattr(drawing, "open_embedder", lambda where, batch_size: found)
    return found


def evaluator(context, name, given, **fields):
    return make_evaluator(dict(name=name, data=given, **fields), context, "config.evals.it")


encode = jax.jit(lambda model, images: model.image_ids(images))
decode = jax.jit(lambda model, ids: model.images_of(ids))


# --- questions


def test_questions_of_drawings_are_prompts_without_the_image(drawn, tokenizer):
    questions = list(open_questions(drawn, tokenizer))
    assert [question.text for question in questions] == NAMES
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    for question in questions:
        assert question.drawn and question.answers == (question.text,)
        words = tokenizer.backend.encode(question.text, add_special_tokens=False).ids
        assert question.ids.tolist() == [bos, *words] and question.begin == 1
        assert (question.place == -1).all() and question.answer_ids.tolist() == [eos]
        assert question.images.shape == (1, SIZE, SIZE, 3)
        assert codes.drawing_prompt(question, CONFIG.image).tolist() == [bos, *words, BEGIN]
        assert codes.lone_prompt(question, CONFIG.image).tolist() == [bos, BEGIN]


def test_questions_of_captions_have_all_names(root, tokenizer):
    given = data(root, "caption", prompts=("",), also_field="also", group_field="colour")
    questions = list(open_questions(given, tokenizer))
    assert [question.answers for question in questions] == [
        (name, *ALSO.get(name, ())) for name in NAMES
    ]
    assert [question.group for question in questions] == [name.split()[0] for name in NAMES]
    for question in questions:
        assert not question.drawn
        ids = question.ids.tolist()
        assert ids == [tokenizer.bos_id, BEGIN, *[CODE] * LENGTH, END]
        assert question.answer_ids[-1] == tokenizer.eos_id
    # Names of records that have none are no error; a field that is none is.
    with pytest.raises(ValueError, match="alsoo"):
        list(open_questions(data(root, "caption", also_field="alsoo"), tokenizer))


def test_images_that_are_vectors_cannot_be_drawn(drawn, tokenizer):
    layout = dict(name="whole", preset="siglip", size=SIZE, tokens=LENGTH)
    vectors = drawn | {"conversation": drawn["conversation"] | {"layout": layout}}
    with pytest.raises(ValueError, match="'codes'"):
        next(iter(open_questions(vectors, tokenizer)))


# --- names


def test_names_are_what_the_model_writes(context, named, tokenizer):
    context, arrays = context
    scores = evaluator(
        context, "naming", named, max_new_tokens=6, batch_size=8, answers="naming.jsonl"
    ).run(arrays)
    lines = [json.loads(x) for x in (context.workdir / "naming.jsonl").read_text().splitlines()]
    questions = list(open_questions(named, tokenizer))
    # Written by a loop that reads all again.
    never = [*range(VOCABULARY, VOCABULARY + CODES), BEGIN, END]
    for question, line in zip(questions[:3], lines[:3], strict=True):
        tokens = question.ids.tolist()
        for _ in range(6):
            padded = np.pad(tokens, (0, 48 - len(tokens)))
            step = np.array(forward()(padded, question.images)[len(tokens) - 1])
            step[never] = -np.inf
            tokens.append(int(step.argmax()))
            if tokens[-1] == tokenizer.eos_id:
                break
        said = tokens[len(question.ids) :]
        assert line["model"] == tokenizer.decode(said)
        assert line["accuracy"] == (line["model"] in question.answers)
    assert len({line["model"] for line in lines}) > 1
    assert scores["n"] == len(NAMES) and scores["accuracy"] <= scores["accuracy_high"]
    assert scores["majority/accuracy"] == 1 / len(NAMES)


def test_right_names_count_whatever_the_tokenizer_does_with_spaces(context, named, tokenizer):
    context, _ = context
    naming = evaluator(context, "naming", named)
    questions = list(open_questions(named, tokenizer))
    written = [tokenizer.decode(question.answer_ids) for question in questions]
    assert written != NAMES  # "o ' clock"
    assert naming.count(questions, written).ravel().tolist() == [1] * len(NAMES)
    also = [f"My {name.upper()} " for name in NAMES]
    right = [float(name in ALSO) for name in NAMES]
    assert naming.count(questions, also).ravel().tolist() == right
    assert not naming.count(questions, NAMES[1:] + NAMES[:1]).any()


@functools.cache
def forward(follow="grammar"):
    """Compiled once: streams of 48 tokens, and an image at the places of CODE -> log p."""
    model = params.merge(*weights(0)).following(follow)
    return jax.jit(lambda tokens, images: jax.nn.log_softmax(model(tokens[None], images[None])[0]))


def by_hand(prompt, answer, images=None, follow="grammar"):
    """The log probability of an answer's tokens, in a stream of its own."""
    stream = np.pad([*prompt, *answer], (0, 48 - len(prompt) - len(answer)))
    images = np.zeros((1, SIZE, SIZE, 3), np.float32) if images is None else images
    log_p = np.asarray(forward(follow)(stream, images), np.float64)
    return log_p[np.arange(len(answer)) + len(prompt) - 1, answer].sum()


def test_likelihoods_are_those_of_single_streams(context, named, tokenizer):
    """Padded, in a batch, with images or their ids: log p of words and ends alone."""
    _, arrays = context
    model = params.merge(weights(0)[0], arrays)
    questions = list(open_questions(named, tokenizer))[2:5]
    said = [question.answer_ids for question in questions]
    assert len({len(one) for one in said}) > 1
    found = jax.jit(answer_log_probs)(model, answer_arrays(model, questions, said))
    for question, answer, row in zip(questions, said, np.asarray(found), strict=True):
        expected = by_hand(question.ids, answer, question.images)
        assert row.sum() == pytest.approx(expected, abs=1e-3)
        # In text no code can follow: what is left of their probability makes a difference.
        free = by_hand(question.ids, answer, question.images, "any")
        assert expected > free + 0.1


def test_the_true_name_among_others(context, named, tokenizer):
    context, arrays = context
    choice = evaluator(context, "name_choice", named, others=4, batch_size=16)
    scores = choice.run(arrays)
    assert scores["chance/accuracy"] == 1 / 5
    assert 0 <= scores["accuracy_low"] <= scores["accuracy"] <= scores["accuracy_high"] <= 1
    # A model that knows nothing is about as often right as chance.
    assert scores["shuffled/accuracy_low"] < 1 / 5 < scores["shuffled/accuracy_high"]
    assert "chance" in choice.describe(scores) and "majority" not in choice.describe(scores)
    questions = list(open_questions(named, tokenizer))
    completed = choice.complete(questions)
    again = choice.complete(questions)
    assert [one.choices for one in completed] == [one.choices for one in again]
    assert len({one.choices[1:] for one in completed}) > 10
    encoded = {question.answers[0]: question.answer_ids.tolist() for question in questions}
    for question in completed:
        assert len(set(question.choices)) == 5 and question.choices[0] == question.answers[0]
        assert [ids.tolist() for ids in question.choice_ids] == [
            encoded[name] for name in question.choices
        ]
    # Likelihoods decide.
    first = completed[0]
    totals = [by_hand(first.ids, ids, first.images) for ids in first.choice_ids]
    (said,) = choice.respond(arrays, [first])
    np.testing.assert_allclose([option.total for option in said], totals, atol=1e-3)
    assert choice.count([first], [said])[0, 0] == (np.argmax(totals) == 0)


def test_others_may_be_of_other_data(context, named, root, tokenizer):
    context, _ = context
    with pytest.raises(ValueError, match=r"limit=3: beside each question there are not others=4"):
        evaluator(context, "name_choice", named, others=4, limit=3)
    few = evaluator(context, "name_choice", named, others=len(NAMES))
    with pytest.raises(ValueError, match=r"others=\d+.*only \d+ questions have other answers"):
        few.run({})
    more = evaluator(context, "name_choice", named, others=4, limit=3, others_from=named)
    questions = list(open_questions(named, tokenizer, 3))
    names = {name for question in more.complete(questions) for name in question.choices}
    assert len(names) > 3
    with pytest.raises(ValueError, match=r"wants words, but .*drawing asks for an image"):
        evaluator(context, "name_choice", named, others_from=data(root, "drawing"), others=4)


# --- pictures


def test_the_true_picture_among_others(context, drawn, tokenizer):
    context, arrays = context
    choice = evaluator(
        context, "picture_choice", drawn, others=3, batch_size=16, answers="pictures.jsonl"
    )
    scores = choice.run(arrays)
    assert scores["chance/accuracy"] == 1 / 4
    # Which pictures are the others depends on the directory: chance may go far, but not so far.
    right = round(scores["shuffled/accuracy"] * scores["n"])
    assert stats.binomtest(right, round(scores["n"]), 1 / 4).pvalue > 1e-3
    assert {"accuracy_by_gain", "shuffled/accuracy_by_gain_high"} < set(scores)
    lines = (context.workdir / "pictures.jsonl").read_text().splitlines()
    ranks = [json.loads(line)["model"] for line in lines]
    assert np.mean([rank == "number 1 of 4" for rank in ranks]) == scores["accuracy"]
    # Beside single streams.
    questions = list(open_questions(drawn, tokenizer))
    choice.complete(questions)
    model = params.merge(weights(0)[0], arrays)
    first, others = questions[:2], choice.choose_others(questions)[:2]
    for question, those, said in zip(first, others, choice.respond(arrays, first), strict=True):
        several = [question, *those]
        assert len(said.after_name) == len(several) == 4
        images = jnp.array(np.concatenate([one.images for one in several]))[:, None]
        ids = np.asarray(encode(model, images))[:, 0]
        after = [by_hand([*question.ids, BEGIN], one) for one in ids]
        alone = [by_hand([tokenizer.bos_id, BEGIN], one) for one in ids]
        np.testing.assert_allclose(said.after_name, after, atol=1e-3)
        np.testing.assert_allclose(said.gain, np.subtract(after, alone), atol=2e-3)
        counted = choice.count([question], [said])[0].tolist()
        assert counted == [np.argmax(after) == 0, np.argmax(np.subtract(after, alone)) == 0]


def test_a_shuffled_picture_is_not_compared_with_itself(context, drawn, tokenizer):
    context, arrays = context
    choice = evaluator(context, "picture_choice", drawn, others=len(NAMES) - 1, batch_size=16)
    questions = choice.complete(list(open_questions(drawn, tokenizer)))
    other = questions[0]._replace(images=questions[1].images)
    whole, shuffled = choice.respond(arrays, [questions[0], other])
    assert len(whole.after_name) == len(NAMES) and len(shuffled.after_name) == len(NAMES) - 1
    assert shuffled.after_name[0] in whole.after_name[1:]


# --- drawings


def drawings(context, given, **fields):
    options = dict(limit=12, guidance=(1.0, 2.5), batch_size=8, encoder="somewhere") | DRAWN
    return evaluator(context, "drawing", given, **(options | fields))


def test_figures_are_those_of_the_pictures(context, drawn, tokenizer, encoder):
    """Computed from the pictures again, pair by pair."""
    context, arrays = context
    made = drawings(context, drawn, seed=3, title="Icons")
    scores = made.run(arrays)
    model = params.merge(weights(0)[0], arrays)
    questions = list(open_questions(drawn, tokenizer, 12))
    texts = [question.text for question in questions]
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(3), jnp.arange(12))
    prompts = [[*question.ids, BEGIN] for question in questions]
    real = np.stack(
        [np.asarray(Image.open(io.BytesIO(question.picture))) for question in questions]
    )
    images = jnp.array(np.concatenate([question.images for question in questions]))
    generator = Generator(model, mesh=context.mesh, rules=None)
    ids = {"reconstructed": np.asarray(encode(model, images[:, None]))[:, 0]}
    for name, guidance in (("guidance_1", 1.0), ("guidance_2.5", 2.5)):
        # With other neighbours than in the evaluator.
        parts = [
            generator(
                prompts[rows],
                max_new_tokens=LENGTH,
                guidance=guidance,
                negative=[[tokenizer.bos_id, BEGIN]],
                key=keys[rows],
                **DRAWN,
            ).tokens
            for rows in (slice(0, 8), slice(4, 12))
        ]
        ids[name] = np.concatenate([parts[0][:6], parts[1][2:]])
    assert (ids["guidance_1"] != ids["guidance_2.5"]).any()
    pictures = {"real": real}
    for name, some in ids.items():
        levels = (np.asarray(decode(model, jnp.array(some)), np.float64) * 0.5 + 0.5) * 255
        pictures[name] = np.clip(np.round(levels), 0, 255).astype(np.uint8)
    names = encoder.texts(texts)
    for name, some in pictures.items():
        vectors = encoder.images(list(some))
        pairs = np.array([[float(np.dot(v, t)) for t in names] for v in vectors])
        own = np.diag(pairs)
        others = np.array([np.delete(row, i).mean() for i, row in enumerate(pairs)])
        close = dict(abs=2e-4)
        assert scores[f"{name}/cosine"] == pytest.approx(own.mean(), **close)
        assert scores[f"{name}/CLIPScore"] == pytest.approx(2.5 * own.mean(), **close)
        assert scores[f"{name}/shuffled/cosine"] == pytest.approx(others.mean(), **close)
        gains = 2.5 * (own - others)
        assert scores[f"{name}/gain"] == pytest.approx(gains.mean(), **close)
        # The interval of the mean of so many: about two standard errors to each side.
        width = scores[f"{name}/gain_high"] - scores[f"{name}/gain_low"]
        assert width == pytest.approx(4 * gains.std() / np.sqrt(12), rel=0.2)
        assert scores[f"{name}/R@1"] == np.mean(np.argmax(pairs, axis=1) == np.arange(12))
        if name != "real":
            expected = frechet_distance(vectors, encoder.images(list(real)))
            assert scores[f"{name}/frechet"] == pytest.approx(expected, rel=1e-2, abs=1e-4)
    # The encoder knows real pictures, and those of a random model are of no text.
    assert scores["real/R@1"] == 1 and scores["real/gain_low"] > 0.1
    assert scores["n"] == 12 and scores["chance/R@1"] == 1 / 12
    for name in ("guidance_1", "guidance_2.5"):
        assert abs(scores[f"{name}/gain"]) < 0.1 * scores["real/gain"]
        assert scores[f"{name}/R@1_low"] < 1 / 12 < scores[f"{name}/R@1_high"]
    table = made.describe(scores).splitlines()
    assert table[0] == "Icons" and [row.split("  ")[0] for row in table[2:]] == [
        "guidance 1", "guidance 2.5", "from its codes", "real", "chance",
    ]  # fmt: skip
    assert f"{scores['real/CLIPScore']:.3f} [" in table[5] and "100.0% [" in table[5]


def test_the_same_pictures_whatever_the_batch_and_the_mesh(
    context, drawn, tokenizer, encoder, tmp_path
):
    first, arrays = context
    expected = drawings(first, drawn, guidance=(2.5,)).run(arrays)
    other, placed = make_context(tmp_path, tokenizer, devices=2)
    scores = drawings(other, drawn, guidance=(2.5,), batch_size=4).run(placed)
    assert scores == pytest.approx(expected, abs=1e-3)
    seeded = drawings(first, drawn, guidance=(2.5,), seed=1).run(arrays)
    assert seeded["real/cosine"] == expected["real/cosine"]
    assert seeded["guidance_2.5/cosine"] != expected["guidance_2.5/cosine"]


def test_sheet_and_distractors(context, drawn, encoder):
    context, arrays = context
    made = drawings(
        context, drawn, limit=6, sheet="sheet.png", sheet_rows=4, guidance=(1,), distractors=drawn
    )
    scores = made.run(arrays)
    assert scores["n"] == 6 and scores["chance/R@1"] == 1 / len(NAMES)
    sheet = Image.open(context.workdir / "sheet.png")
    # The real one, what is made of its codes, and one drawing.
    assert sheet.size == tuple(int(side * DPI) for side in sheet_size(4, 3))
    pixels = np.asarray(sheet.convert("RGB")).reshape(-1, 3)
    shown = [COLOURS[name.split()[0]] for name in NAMES]
    assert any((pixels == colour).all(axis=1).sum() > 100 for colour in shown)
    before = encoder.embedded
    again = made.run(arrays)
    assert again == scores
    # Real pictures and texts are known; what is drawn, and made of codes, is not.
    assert encoder.embedded - before == 2 * 6


def test_mistakes_are_told(context, drawn, named, encoder):
    context, arrays = context
    wrong = [
        (dict(guidance=(-1.0,)), "guidance=-1.0 would draw what the text is not"),
        (dict(guidance=(2, 2)), "must be different numbers"),
        (dict(guidance=()), "must be different numbers"),
        (dict(guidance=(float("nan"),)), "must be a number"),
        (dict(temperature=0.0), "temperature=0 takes the most probable token"),
        (dict(batch_size=0), "A batch of 0 texts"),
    ]
    for fields, message in wrong:
        with pytest.raises(ValueError, match=message):
            drawings(context, drawn, **fields)
    with pytest.raises(ValueError, match=r"wants an image, but .*caption asks for words"):
        drawings(context, named)
    with pytest.raises(ValueError, match="wants words"):
        evaluator(context, "naming", drawn)
    with pytest.raises(ValueError, match="none is hidden"):
        evaluator(context, "picture_choice", drawn, controls=("blind",))
    with pytest.raises(ValueError, match="others=0 leaves nothing"):
        evaluator(context, "name_choice", named, others=0)
    with pytest.raises(ValueError, match="two different texts"):
        drawings(context, drawn, limit=1).run(arrays)
    graph, towers = params.split(fakes.Towers(True))
    blind = dataclasses.replace(context, graphdef=graph)
    with pytest.raises(ValueError, match="A Towers draws no images"):
        drawings(blind, drawn).run(towers)


@pytest.mark.torch
def test_an_encoder_that_embeds_no_texts(context, drawn, tmp_path):
    transformers = hf.transformers()
    context, _ = context
    config = transformers.ViTConfig(
        image_size=16, patch_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        intermediate_size=8,
    )  # fmt: skip
    transformers.ViTModel(config).save_pretrained(tmp_path / "vit")
    with pytest.raises(ConversionError, match="ViT, which does not put images and texts"):
        drawings(context, drawn, encoder=str(tmp_path / "vit"))
    with pytest.raises(ConversionError, match="There is no"):
        drawings(context, drawn, encoder=str(tmp_path / "nowhere"))
