"""Examples before questions: which they are, and what the prompt then is."""

import fakes
import numpy as np
import pytest
from asked import colour_questions, image, make, question

from mmjax.evaluate import shots
from mmjax.evaluate.shots import CHOICES, with_shots
from mmjax.registry import UnknownNameError


@pytest.fixture
def context(tmp_path):
    return fakes.make_context(tmp_path)[0]


def support(count=8):
    """Questions with answers of two tokens; their ids say which they are."""
    names = ("red", "green", "blue")
    asked = [
        question(100 + i, "colour", f"what {i}", names[i % 3], image(names[i % 3], i / 100))
        for i in range(count)
    ]
    return [
        one._replace(answer_ids=np.array([50 + i, 9], np.int32), begin=1, visual=1)
        for i, one in enumerate(asked)
    ]


def pixels(questions):
    """The mean colour, of unit norm."""
    means = np.stack([one.images.mean(axis=(0, 1, 2)) for one in questions])
    return means / np.linalg.norm(means, axis=1, keepdims=True)


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
    np.testing.assert_array_equal(
        made.images, np.concatenate([first.images, second.images, asked.images])
    )
    assert (made.visual, made.answers, made.id) == (3, asked.answers, asked.id)
    with pytest.raises(ValueError, match="q100 has no answer"):
        with_shots(asked, [first._replace(answer_ids=None)])


def test_which_examples():
    asked, examples = colour_questions(), support()
    drawn = CHOICES["random"](asked, examples, 4, pixels)
    assert all(len(set(rows)) == 4 for rows in drawn)
    assert len({tuple(rows) for rows in drawn}) > 10
    fewer = CHOICES["random"](asked, examples, 2, pixels)
    assert all(list(few) == list(rows[:2]) for few, rows in zip(fewer, drawn, strict=True))
    similar = CHOICES["rices"](asked, examples, 2, pixels)
    for one, rows in zip(asked, similar, strict=True):
        near = pixels([one])[0] @ pixels([examples[row] for row in rows]).T
        others = [i for i in range(len(examples)) if i not in rows]
        # The two most similar ones, the most similar one last.
        assert near[0] <= near[1]
        assert near[0] >= (pixels([one])[0] @ pixels([examples[i] for i in others]).T).max()


def test_an_evaluator_shows_them(context):
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shots, "_embed", lambda questions, context, params: pixels(questions))
        similar = score(shots=2, shots_from=given, shots_by="rices")
    assert similar["accuracy"] == similar["blind/accuracy"] == 1
    with pytest.raises(ValueError, match=r"2 examples were asked for, but .* has 1"):
        score(shots=2, shots_from=only_red)
    with pytest.raises(ValueError, match="has 3"):
        score(shots=4, shots_from=given, shots_pool=3)
    with pytest.raises(ValueError, match="say with `shots_from`"):
        score(shots=2)
    with pytest.raises(UnknownNameError, match="did you mean 'rices'"):
        score(shots=2, shots_from=given, shots_by="ricse")
