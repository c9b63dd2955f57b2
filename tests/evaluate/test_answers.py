"""Reading of answers beside what the official scripts of VQA and POPE give."""

import pytest

from mmjax.evaluate.answers import exact_match, normalise, says_yes, vqa_accuracy

# What processPunctuation and processDigitArticle of vqaEval.py (GT-Vision-Lab/VQA, commit a013f00)
# make of these.
OFFICIAL = {
    "The Cat.": "cat",
    "two  dogs": "2 dogs",
    "None": "0",
    "1,000": "1000",
    "a red, blue": "red blue",
    "red/blue": "red blue",
    "t-shirt": "t shirt",
    "dont know": "don't know",
    "youdve": "youdve",
    "couldnt've": "couldn't've",
    "somebody'd": "somebodyd",
    "lets go": "lets go",
    "Im here": "im here",
    "3.5 m.": "3.5 m",
    "5 p.m.": "5 pm",
    "what?!": "what",
    "it's a (big) one": "it's big 1",
    "$10": "$10",
    "an\nold tv\t": "old tv",
    '"stop"': "stop",
    "no , yes": "no yes",
    "a.b": "ab",
    "1 , 2": "1 2",
    "x_y-z": "x y z",
    "Ten o'clock": "10 o'clock",
    "yall'd've": "y'all'd've",
}


@pytest.mark.parametrize("answer", OFFICIAL)
def test_normalisation_is_the_official_one(answer):
    assert normalise(answer) == OFFICIAL[answer]


def test_vqa_accuracy_of_ten_annotators():
    """As published: 0, 0.3, 0.6, 0.9 and 1 where none, 1, 2, 3, or more of ten agree."""
    for agree, expected in enumerate((0, 0.3, 0.6, 0.9, 1, 1)):
        right = ["The red one"] * agree + [f"other {i}" for i in range(10 - agree)]
        assert vqa_accuracy("red 1.", right) == pytest.approx(expected)


def test_few_answers_are_alternatives():
    assert vqa_accuracy("Two", ["2"]) == 1
    assert vqa_accuracy("couch", ["sofa", "couch"]) == 1
    assert vqa_accuracy("chair", ["sofa", "couch"]) == 0
    assert exact_match(" Sofa ", ["couch", "sofa"])
    assert not exact_match("the sofa", ["sofa"])


def test_pope_reads_the_first_sentence():
    """As evaluate.py of RUCAIBox/POPE."""
    for answer in ("No", "no, there is no dog", "There is not. Yes", "No."):
        assert not says_yes(answer)
    for answer in ("Yes", "yes. No", "There is a knot", "", "I cannot see"):
        assert says_yes(answer)
