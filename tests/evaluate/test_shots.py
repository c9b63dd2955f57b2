"""Which examples stand before a question, and that an evaluator shows them."""

import dataclasses

import fakes
import numpy as np
import pytest
from asked import Given, colour_questions, image, make, picture, question
from flax import nnx

from mmjax import params
from mmjax.connectors.mlp import MLPConfig
from mmjax.evaluate import asking, similarity
from mmjax.evaluate.asking import before_first
from mmjax.evaluate.shots import CHOICES, Choosing, falling, with_shots
from mmjax.evaluate.similarity import EmbedderFeatures, ModelFeatures
from mmjax.models.lm import LMConfig
from mmjax.models.mllama import Mllama, MllamaConfig
from mmjax.models.tiled_vit import TiledViTConfig
from mmjax.nn.rope import Rope
from mmjax.registry import UnknownNameError


@pytest.fixture
def context(tmp_path):
    return fakes.make_context(tmp_path)[0]


def support(count=8):
    """Questions with answers of two tokens; their ids say which they are."""
    names = ("red", "green", "blue")
    asked = [
        question(100 + i, "colour", f"what {i}", names[i % 3], image(names[i % 3], 0.3 + i / 100))
        for i in range(count)
    ]
    return [
        one._replace(answer_ids=np.array([50 + i, 9], np.int32), begin=1, visual=1)
        for i, one in enumerate(asked)
    ]


def pixels(seen):
    """The mean colour, of unit norm."""
    means = np.stack([np.asarray(one.images).mean(axis=(0, 1, 2)) for one in seen])
    return means / np.linalg.norm(means, axis=1, keepdims=True)


def choose(by, asked, examples, count, seed=0):
    return CHOICES[by](Choosing(asked, Given(examples), count, seed, pixels))


def test_a_prompt_with_examples():
    first, second, *_ = support()
    asked = colour_questions()[0]._replace(begin=1, visual=1)
    made = with_shots(asked, [first, second])
    # A stream begins once; each example has its own image and ends with its answer.
    np.testing.assert_array_equal(
        made.ids, [*first.ids, 50, 9, *second.ids[1:], 51, 9, *asked.ids[1:]]
    )
    shown = np.flatnonzero(made.place >= 0)
    assert (made.ids[shown] == 2).all() and made.place[shown].tolist() == [0, 1, 2]
    expected = np.concatenate([first.images, second.images, asked.images])
    np.testing.assert_array_equal(np.asarray(made.images), expected)
    assert made.images.shape == expected.shape and len(made.images) == 3
    assert (made.visual, made.answers, made.id) == (3, asked.answers, asked.id)
    with pytest.raises(ValueError, match="q100 has no answer"):
        with_shots(asked, [first._replace(answer_ids=None)])


def test_random_examples():
    asked, examples = colour_questions(), support()
    drawn = choose("random", asked, examples, 4)
    assert all(len(set(rows)) == 4 for rows in drawn)
    assert len({tuple(rows) for rows in drawn}) > 10
    fewer = choose("random", asked, examples, 2)
    assert all(few == rows[:2] for few, rows in zip(fewer, drawn, strict=True))
    assert choose("random", asked, examples, 4) == drawn
    assert choose("random", asked, examples, 4, seed=1) != drawn


def test_similar_examples():
    """The nearest ones by the cosine, the nearest last, as `RICES.find` of open_flamingo has it."""
    rng = np.random.default_rng(0)
    asked = [
        question(i, "", "", "a", rng.normal(size=(1, 4, 4, 3)).astype(np.float32))
        for i in range(30)
    ]
    asked, examples = asked[:5], asked[5:]
    given = Given(examples)
    cosines = (
        pixels([given.seen_of(one) for one in asked])
        @ pixels([given.seen(row) for row in range(25)]).T
    )
    expected = np.argsort(cosines, axis=1)[:, -4:]
    assert choose("rices", asked, examples, 4) == expected.tolist()


def test_a_question_is_no_example_of_its_own():
    examples = support()
    copy = examples[3]._replace(id="another record")  # about the same image
    for by in CHOICES.names():
        rows = choose(by, examples, [*examples, copy], 7)
        assert all(number not in some for number, some in enumerate(rows))
        assert not {3, 8} & set(rows[3]) and len(set(rows[3])) == 7
        with pytest.raises(
            ValueError, match=r"8 examples .* of 9 questions has 7 .* of q103: lower"
        ):
            choose(by, [examples[3]], [*examples, copy], 8)


def test_falling():
    values = np.random.default_rng(0).integers(0, 40, 100)
    for first in (1, 7, 100, 300):
        order = list(falling(values, first))
        assert sorted(order) == list(range(100))
        assert values[order].tolist() == sorted(values, reverse=True)


def test_an_evaluator_shows_them(context, monkeypatch):
    """The model says what the last example before the question was answered with."""
    asked = [one for one in colour_questions(9) if one.group == "colour"]
    answers = {50 + i: one.answers[0] for i, one in enumerate(support())}

    def copies(question):
        return ([answers[i] for i in question.ids if i in answers] or ["nothing"])[-1]

    def score(**fields):
        fields = dict(controls=("blind",)) | fields
        return make("vqa", context, asked, answer=copies, **fields).run({})

    given = {"given": support()}
    assert score()["accuracy"] == 0
    only_red = {"given": support()[:1]}
    scores = score(shots=1, shots_from=only_red)
    assert scores["accuracy"] == pytest.approx(1 / 3) and scores["images"] == 9
    assert score(shots_text_only=1, shots_from=only_red)["accuracy"] == pytest.approx(1 / 3)
    with monkeypatch.context() as patch:
        features = lambda context, size: lambda params, seen: pixels(seen)  # noqa: E731
        patch.setattr(asking, "ModelFeatures", features)
        similar = score(shots=2, shots_from=given, shots_by="rices")
    assert similar["accuracy"] == similar["blind/accuracy"] == 1
    with pytest.raises(ValueError, match=r"2 examples were asked for, but .* of 1 questions has 1"):
        score(shots=2, shots_from=only_red)
    with pytest.raises(ValueError, match="of 3 questions has 3"):
        score(shots=4, shots_from=given, shots_pool=3)
    with pytest.raises(ValueError, match="say with `shots_from`"):
        score(shots=2)
    with pytest.raises(ValueError, match="one of them is 0"):
        score(shots=2, shots_text_only=2, shots_from=given)
    with pytest.raises(ValueError, match="leave `shots_weights` out"):
        score(shots=2, shots_from=given, shots_weights="clip")
    with pytest.raises(UnknownNameError, match="did you mean 'rices'"):
        score(shots=2, shots_from=given, shots_by="ricse")


def test_an_embedder_sees_each_image_once(monkeypatch):
    seen_by_it = []

    class Embedder:
        batch_size = 2

        def prepare(self, source):
            seen_by_it.append(source)
            return source

        def prepared_images(self, prepared):
            assert len(prepared) <= 2
            return np.array([[float(len(source))] for source in prepared])

    monkeypatch.setattr(similarity, "open_embedder", lambda weights, batch_size: Embedder())
    embed = EmbedderFeatures("clip", 2)
    asked = [
        one._replace(picture=picture("red")[: 9 + i // 2])
        for i, one in enumerate(colour_questions(3))
    ]
    given = Given(asked)
    vectors = embed({}, [given.seen(row) for row in range(6)])
    assert vectors[:, 0].tolist() == [9, 9, 10, 10, 11, 11] and len(seen_by_it) == 3
    embed({}, [given.seen(0)])
    assert len(seen_by_it) == 3


def test_models_without_features_of_single_pictures(context):
    blocks = dict(width=16, heads=2, mlp_width=16, norm_eps=1e-5)
    config = MllamaConfig(
        encoder=TiledViTConfig(
            image_size=8,
            patch_size=4,
            depth=1,
            global_depth=1,
            activation="gelu",
            tiles=2,
            shapes=((1, 1), (1, 2)),
            **blocks,
        ),
        connector=MLPConfig(),
        lm=LMConfig(
            vocab_size=20,
            max_len=32,
            depth=1,
            activation="silu",
            tied=False,
            rope=Rope(theta=1e4),
            **blocks,
        ),
        image_token=19,
        features=(0,),
        looks=(1,),
    )
    graph, shapes = params.abstract(lambda: Mllama(config, rngs=nnx.Rngs(0)))
    features = ModelFeatures(dataclasses.replace(context, graphdef=graph), 8)
    with pytest.raises(ValueError, match=r"a Mllama has none of single pictures: .*shots_weights"):
        features(shapes, [])


def test_answers_end_before_the_first_of_some_texts():
    assert before_first(("Question", "Short"), "a dog Short Question") == "a dog"
    assert before_first(("Question",), "a dog ") == "a dog "
    assert before_first((), "Question") == "Question"
