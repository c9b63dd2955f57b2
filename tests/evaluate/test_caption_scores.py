"""Scores of captions beside published values and the libraries they are of."""

import numpy as np
import pytest

from mmjax.evaluate import EVALUATORS
from mmjax.evaluate.caption_scores import CaptionScores

pytest.importorskip("sacrebleu")
pytest.importorskip("nltk")
pytest.importorskip("rouge_score")

# The example of github.com/jmhessel/clipscore and what its README says the scores are, which were
# computed by COCO's evaluation.
REFERENCES = [
    [
        "two cats are sleeping next to each other.",
        "a grey cat is cuddling with an orange cat on a blanket.",
        "the orange cat is happy that the black cat is close to it.",
    ],
    [
        "a dog is wearing ear muffs as it lies on a carpet.",
        "a black dog and an orange cat are looking at the photographer.",
        "headphones are placed on a dogs ears.",
    ],
]
GOOD = [
    "an orange cat and a grey cat are lying together.",
    "a black dog wearing headphones looks at the camera as an orange cat walks in the background.",
]
BAD = [
    "a calico cat and a white cat are lying together.",
    "a black dog wearing a hat looks at the camera as a tabby walks in the background.",
]
PUBLISHED = {
    "good": (GOOD, (0.6667, 0.4899, 0.3469, 0.0000, 0.4280, 0.5637)),
    "bad": (BAD, (0.4815, 0.2404, 0.1359, 0.0000, 0.3121, 0.2790)),
}
SHARED = ("BLEU_1", "BLEU_2", "BLEU_3", "BLEU_4", "ROUGE_L", "CIDEr")


def score(captions, references):
    scores = CaptionScores(references)
    rows = [scores.count(*pair) for pair in zip(captions, references, strict=True)]
    sums = np.append(len(rows), np.sum(rows, axis=0))
    return EVALUATORS["captioning"].scoring.of(sums)


@pytest.mark.parametrize("captions, published", PUBLISHED.values(), ids=PUBLISHED)
def test_equal_to_the_published_scores_of_coco(captions, published):
    found = score(captions, REFERENCES)
    np.testing.assert_allclose([found[name] for name in SHARED], published, atol=5e-5)


def test_more_captions_with_unequal_numbers_of_references():
    """Of pycocoevalcap 1.2 (its parts in Python), for these words."""
    references = [
        ["the cat sits on the big red table", "a cat is on the table"],
        ["two dogs"],
        ["a red ball in the grass", "the ball", "a ball lies in the green grass"],
        ["a man rides a horse on the beach"],
    ]
    captions = [
        "the cat is on the red table",
        "two dogs two dogs",
        "",
        "a man on the beach rides a brown horse",
    ]
    found = score(captions, references)
    expected = (0.85, 0.70710678, 0.47495713, 0.31415403, 0.53669344, 2.49328714)
    np.testing.assert_allclose([found[name] for name in SHARED], expected, atol=1e-6)
    assert np.isnan(EVALUATORS["captioning"].scoring.of(np.zeros(14))["BLEU_4"])


def test_meteor_without_synonyms():
    """Hypothesis and references of NLTK's documentation, and its value: no synonym is needed."""
    said = (
        "It is a guide to action which ensures that the military always obeys the commands of the "
        "party"
    )
    right = (
        "It is a guide to action that ensures that the military will forever heed Party commands"
    )
    assert round(score([said], [[right]])["METEOR"].item(), 4) == 0.6944


def test_an_image_without_a_reference():
    with pytest.raises(ValueError, match="no reference caption"):
        CaptionScores([["a cat"], []])
