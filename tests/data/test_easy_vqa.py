"""easy-VQA: as its package has it, in the form of questions."""

import builtins
import io
import pickle

import numpy as np
import pytest
from PIL import Image

from mmjax.data.sources import open_source
from mmjax.registry import UnknownNameError

easy_vqa = pytest.importorskip("easy_vqa")

ANSWERS = {
    "easy_color": {"red", "green", "blue", "black", "gray", "teal", "brown", "yellow"},
    "easy_shape": {"circle", "rectangle", "triangle"},
    "easy_yesno": {"yes", "no"},
}


@pytest.fixture(scope="module")
def source():
    return open_source(dict(name="easy_vqa", split="test"))[0]


def test_all_questions_and_the_images_they_are_about(source):
    """The figures are those of the package's own README."""
    records = [source[i] for i in range(len(source))]
    rows = [row for record in records for row in record["questions"]]
    assert len(records) == 1000 and len(rows) == 9673
    assert sum(row["group"] == "easy_yesno" for row in rows) == 7136
    assert len(open_source(dict(name="easy_vqa", split="train"))[0]) == 4000
    questions, answers, numbers = easy_vqa.get_test_questions()
    paths = easy_vqa.get_test_image_paths()
    for number in (0, 7, 999):
        with open(paths[number], "rb") as handle:
            assert records[number]["image"] == handle.read()
        asked = [(row["question"], row["answer"]) for row in records[number]["questions"]]
        assert asked == [
            (q, a) for q, a, n in zip(questions, answers, numbers, strict=True) if n == number
        ]
    assert {*ANSWERS} == {row["group"] for row in rows}
    for group, known in ANSWERS.items():
        assert {row["answer"] for row in rows if row["group"] == group} == known


def test_the_picture_has_the_color_that_is_answered(source):
    """A check of the pairing with the pixels themselves."""
    level = {"red": 0, "green": 1, "blue": 2}
    checked = 0
    for index in range(60):
        record = source[index]
        for row in record["questions"]:
            if row["group"] == "easy_color" and row["answer"] in level:
                pixels = np.asarray(Image.open(io.BytesIO(record["image"])).convert("RGB"), int)
                shape = pixels[np.abs(pixels - pixels[0, 0]).sum(-1) > 100]
                assert np.median(shape, axis=0).argmax() == level[row["answer"]]
                checked += 1
    assert checked > 10


def test_copies_give_the_same(source):
    copy = pickle.loads(pickle.dumps(source))
    assert copy[3] == source[3] and copy.id(3) == "easy_vqa/test#3" == copy[3]["id"]


def test_errors_say_what_to_do(monkeypatch):
    with pytest.raises(UnknownNameError, match="train"):
        open_source(dict(name="easy_vqa", split="trian"))
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "easy_vqa":
            raise ImportError("No module named 'easy_vqa'", name="easy_vqa")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install -e \.\[demo\]"):
        open_source(dict(name="easy_vqa"))


def test_captions_say_what_the_questions_tell(source):
    for index in range(len(source)):
        record = source[index]
        caption = record["caption"].split()
        assert 1 <= len(caption) <= 2
        said = {row["answer"] for row in record["questions"] if row["group"] != "easy_yesno"}
        assert said <= set(caption)
        for row in record["questions"]:
            words = set(row["question"].rstrip("?").split())
            known = words & (ANSWERS["easy_color"] | ANSWERS["easy_shape"])
            if row["group"] != "easy_yesno" or (
                row["answer"] == "yes" and not words & {"no", "not"}
            ):
                assert known <= set(caption)
