"""Evaluators of questions whose model is a function of pixels: controls, groups, files."""

import json

import asked
import fakes
import numpy as np
import pytest
from PIL import Image

from mmjax.config import ConfigError
from mmjax.evaluate import captioning, make_evaluator, sheets
from mmjax.evaluate.answer_sheet import spread
from mmjax.evaluate.asking import batches, distinct
from mmjax.evaluate.controls import CONTROLS, image_names
from mmjax.evaluate.likelihood import Likelihood
from mmjax.registry import UnknownNameError


@pytest.fixture
def context(tmp_path):
    return fakes.make_context(tmp_path)[0]


def read_lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_a_model_that_looks_beside_its_controls(context):
    evaluator = asked.make("vqa", context, asked.colour_questions(12), title="Colours")
    scores = evaluator.run({})
    assert scores["n"] == 24 and scores["images"] == 12
    assert scores["accuracy"] == scores["macro/accuracy"] == 1
    assert scores["colour/exact_match"] == 0 and scores["yes/no/exact_match"] == 1
    # Blind it says "red" and "yes": right for a third.
    assert (
        scores["colour/blind/accuracy"] == scores["yes/no/blind/accuracy"] == pytest.approx(1 / 3)
    )
    assert scores["gain"] == pytest.approx(2 / 3)
    assert scores["gain_low"] > 0.4 and scores["gain_high"] < 0.95
    assert scores["colour/majority/accuracy"] == pytest.approx(1 / 3)
    assert scores["yes/no/majority/accuracy"] == pytest.approx(2 / 3)
    assert 0 < scores["colour/shuffled/accuracy"] < 1
    assert scores == evaluator.run({})
    lines = evaluator.describe(scores).splitlines()
    assert lines[0] == "Colours" and lines[1].split() == [
        "questions", "accuracy", "blind", "shuffled", "majority", "gain", "exact_match",
    ]  # fmt: skip
    assert [line.split("  ")[0] for line in lines[2:]] == [
        "colour", "yes/no", "all", "mean of groups",
    ]  # fmt: skip
    assert "100.0% [75.8, 100.0]" in lines[2] and "+66.7%" in lines[2]


def test_blind_has_no_pixels_and_the_same_places():
    questions = asked.colour_questions(4)
    for question, blind in zip(questions, CONTROLS["blind"](questions), strict=True):
        assert not blind.images.any() and blind.images.shape == question.images.shape
        assert blind._replace(images=None) == question._replace(images=None)


def test_shuffled_is_a_derangement_of_images():
    questions = asked.colour_questions(9)
    wide = np.zeros((1, 4, 8, 3), np.float32)
    nothing = np.zeros((0, 4, 4, 3), np.float32)
    questions += [
        asked.question(90, "a", "?", "x", wide),
        asked.question(91, "a", "?", "x", nothing),
    ]
    names = image_names(questions)
    others = CONTROLS["shuffled"](questions)
    assert others[-2:] == [None, None]  # there is nothing to exchange it with
    given = dict(zip(names[:-2], image_names(others[:-2]), strict=True))
    assert sorted(given) == sorted(given.values()) and len(given) == 9
    assert all(name != other for name, other in given.items())
    assert image_names(CONTROLS["shuffled"](questions)[:-2]) == image_names(others[:-2])


def test_what_the_shuffle_cannot_ask_does_not_count(context):
    questions = asked.colour_questions(6)
    alone = [q._replace(images=np.zeros((1, 4, 8, 3), np.float32), group="wide") for q in questions]
    scores = asked.make("vqa", context, questions + alone[:1]).run({})
    assert scores["wide/n"] == 1 and "wide/blind/accuracy" in scores
    assert "wide/shuffled/accuracy" not in scores
    both = (scores["colour/shuffled/accuracy"] + scores["yes/no/shuffled/accuracy"]) / 2
    assert scores["shuffled/accuracy"] == pytest.approx(both)
    with pytest.raises(ValueError, match="'shuffled' has nothing to ask"):
        asked.make("vqa", context, alone[:1]).run({})


def test_files_of_answers(context):
    questions = asked.colour_questions(12)
    asked.make("vqa", context, questions, answers="answers.jsonl", limit=5).run({})
    rows = read_lines(context.workdir / "answers.jsonl")
    assert len(rows) == 5
    assert rows[2] == {
        "id": "q2",
        "group": "colour",
        "question": "What colour is picture 1?",
        "right": ["green"],
        "accuracy": 1.0,
        "model": "Green.",
        "blind": "Red.",
        "shuffled": rows[2]["shuffled"],
        "blind/accuracy": 0.0,
        "shuffled/accuracy": float(rows[2]["shuffled"] == "Green."),
    }


def test_sheet_shows_right_and_wrong_in_colour(context):
    def sometimes(question):
        return asked.looks(question) if question.id != "q2" else "a violet hue"

    questions = asked.colour_questions(3)
    asked.make("vqa", context, questions, sometimes, sheet="answers.png").run({})
    pixels = np.asarray(Image.open(context.workdir / "answers.png").convert("RGB")).astype(int)

    def frames(colour):
        tone = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
        rows = np.sum(np.abs(pixels - tone).max(-1) < 3, axis=1)
        return np.sum(np.diff(np.flatnonzero(rows > 100)) > 1) + 1

    assert frames(sheets.RED) >= 2 and frames(sheets.GREEN) >= 2  # lines of frames
    assert spread(["b", "a", "a", "a", "b"], 4) == [1, 3, 0, 4]
    assert spread(["a"], 12) == [0]


def test_presence(context):
    questions = [q for q in asked.colour_questions(12) if q.group == "yes/no"]
    scores = asked.make("pope", context, questions).run({})
    assert scores["f1"] == scores["precision"] == scores["recall"] == 1
    assert scores["yes_ratio"] == pytest.approx(1 / 3)
    assert scores["blind/yes_ratio"] == 1 and scores["blind/recall"] == 1
    assert scores["majority/accuracy"] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="'pope' asks for yes or no"):
        asked.make("pope", context, asked.colour_questions(3)).run({})


def test_multiple_choice(context):
    choices = tuple(asked.COLOURS)
    questions = [
        asked.question(
            i, "", "Which?", choices[i % 3], asked.image(choices[i % 3], i / 50), choices
        )
        for i in range(9)
    ]
    ids = tuple(np.arange(n, dtype=np.int32) for n in (1, 2, 3))
    questions = [question._replace(choice_ids=ids) for question in questions]

    def likely(question):
        """Sees, but thinks little of long choices; blind it does not prefer any."""
        seen = question.images[0, 0, 0] * (0, 1, 1)
        return [Likelihood(float(3 * seen[i] - i), i + 1) for i in range(3)]

    scores = asked.make("multiple_choice", context, questions, likely).run({})
    # Of red: 0, -4, -5; of green: 0, 2, -5; of blue: 0, -4, 1.
    assert scores["accuracy"] == 1
    scores = asked.make(
        "multiple_choice", context, questions, lambda q: [Likelihood(-1.0, 1)] * 3
    ).run({})
    assert scores["accuracy"] == 0  # ties are no answers
    assert scores["majority/accuracy"] == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="'red' must be one of the choices"):
        broken = [questions[0]._replace(choices=("green", "blue"))]
        asked.make("multiple_choice", context, broken, likely).run({})
    with pytest.raises(ValueError, match="9 of 9 questions have no choices"):
        without = [question._replace(choice_ids=None) for question in questions]
        asked.make("multiple_choice", context, without, likely).run({})


def test_perplexity_counts_tokens(context):
    questions = [
        q._replace(answer_ids=np.zeros(1 + i % 3, np.int32))
        for i, q in enumerate(asked.colour_questions(6))
    ]
    rates = {"colour": 0.5, "yes/no": 2.0}

    def likely(question):
        rate = rates[question.group] * (1 if question.images.any() else 3)
        return Likelihood(-rate * len(question.answer_ids), len(question.answer_ids))

    scores = asked.make("perplexity", context, questions, likely, controls=("blind",)).run({})
    tokens = {"colour": 0, "yes/no": 0}
    for question in questions:
        tokens[question.group] += len(question.answer_ids)
    loss = sum(rates[g] * n for g, n in tokens.items()) / sum(tokens.values())
    assert scores["loss"] == pytest.approx(loss)
    assert scores["perplexity"] == pytest.approx(np.exp(loss))
    assert scores["yes/no/gain"] == pytest.approx(4.0)  # nats less than blind
    assert scores["macro/loss"] == pytest.approx(1.25)


def test_captions(context):
    pytest.importorskip("sacrebleu")
    words = {"red": "a red square on white paper", "green": "a green one", "blue": "nothing blue"}
    questions = [
        asked.question(i, "", "", (words[colour], "a square"), asked.image(colour, i / 9))
        for i, colour in enumerate(words)
    ]

    def caption(question):
        return words[asked.looks(question).lower().strip(".")]

    evaluator = asked.make("captioning", context, questions, caption)
    scores = evaluator.run({})
    assert scores["BLEU_4"] == scores["BLEU_1"] == scores["ROUGE_L"] == 1
    assert scores["CIDEr"] > scores["CIDEr_low"] > scores["blind/CIDEr"]
    assert scores["gain"] == scores["CIDEr"] - scores["blind/CIDEr"]
    assert "majority/CIDEr" not in scores
    assert "CIDEr" in evaluator.describe(scores)


def test_clip_score_equals_the_official_one(context, monkeypatch):
    """What get_clip_score and get_refonlyclipscore of github.com/jmhessel/clipscore give."""
    texts = {"a": (1, 2, 0), "b": (0, 1, -1), "c": (-1, -2, 1)}
    texts |= {"r1": (1, 1, 1), "r2": (0, 3, 1), "r3": (2, -1, -1)}
    pictures = {b"1": (2, 1, 1), b"2": (0, 1, -3), b"3": (1, 1, 0)}

    def unit(rows):
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    class Embedder:
        def images(self, sources):
            return unit(np.array([pictures[source] for source in sources]))

        def texts(self, texts_given, *, truncation):
            assert truncation
            found = [texts[text.removeprefix("A photo depicts ")] for text in texts_given]
            return unit(np.array(found))

    monkeypatch.setattr(captioning, "open_embedder", lambda weights, batch_size: Embedder())
    rights = [("r1", "r2"), ("r2", "r3"), ("r3",)]
    questions = [
        asked.question(i, "", said, right, asked.image("red", i / 9), shown=picture)
        for i, (said, right, picture) in enumerate(zip("abc", rights, pictures, strict=True))
    ]
    options = dict(weights="clip", controls=(), answers="a.jsonl")
    evaluator = asked.make("clipscore", context, questions, lambda q: q.text, **options)
    scores = evaluator.run({})
    rows = read_lines(context.workdir / "a.jsonl")
    single = [row["CLIPScore"] for row in rows]
    np.testing.assert_allclose(single, [1.82574186, 2.23606798, 0], atol=1e-7)
    assert scores["RefCLIPScore"] == pytest.approx(np.mean([1.15859157, 0.74535599, 0]))
    assert "gain" not in scores


def test_bad_configs(context):
    with pytest.raises(UnknownNameError, match="did you mean 'blind'"):
        asked.make("vqa", context, [], controls=("blimd",))
    with pytest.raises(ValueError, match="batch_size a multiple of 8"):
        wide, _ = fakes.make_context(context.workdir, devices=8)
        asked.make("vqa", wide, [], batch_size=4)
    with pytest.raises(ValueError, match="no questions to ask"):
        asked.make("vqa", context, []).run({})
    with pytest.raises(ValueError, match=r"called \['blind'\]"):
        asked.make("vqa", context, [asked.question(0, "blind", "?", "x", asked.image("red"))]).run(
            {}
        )
    with pytest.raises(ConfigError, match=r"max_new_token is unknown.*'max_new_tokens'"):
        make_evaluator(dict(name="vqa", data={}, max_new_token=3), context, "config.evals.it")


def test_batches_and_distinct():
    assert list(batches([(1, 8), (0, 9), (1, 4)], 2)) == [[1, 2], [0, 0]]
    assert distinct("abca") == ([0, 1, 2], [0, 1, 2, 0])
