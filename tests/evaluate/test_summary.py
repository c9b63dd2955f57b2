"""Intervals beside scipy's, scores by group beside scikit-learn's."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import precision_recall_fscore_support

from mmjax.evaluate import EVALUATORS
from mmjax.evaluate.intervals import percentiles, resampled, wilson
from mmjax.evaluate.summary import Scoring, means, summarise

ACCURACY = Scoring(means("accuracy"), main="accuracy", shares=("accuracy",))


@pytest.mark.parametrize("right, count", [(0, 5), (5, 5), (3, 7), (81, 100), (1, 1000)])
def test_wilson_equals_scipy(right, count):
    low, high = wilson(np.array(right / count), np.array(count))
    expected = stats.binomtest(right, count).proportion_ci(method="wilson")
    np.testing.assert_allclose((low, high), expected, atol=1e-12)


def test_bootstrap_of_clusters():
    """With one row in each cluster it is scipy's percentile bootstrap, but for what is drawn."""
    values = np.random.default_rng(1).gamma(2.0, size=200)
    totals = np.stack([values, np.ones(200)], axis=1)
    sums = resampled(totals)
    ours = percentiles(sums[:, 0] / sums[:, 1])
    expected = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=0)
    error = expected.standard_error
    np.testing.assert_allclose(ours, expected.confidence_interval, atol=0.2 * error)
    np.testing.assert_array_equal(resampled(totals), sums)
    # Nine copies of each row are no more information, if they belong to one cluster.
    ninefold = resampled(9 * totals)
    np.testing.assert_allclose(percentiles(ninefold[:, 0] / ninefold[:, 1]), ours)


def scores_of(right, blind, groups, clusters):
    counts = {
        name: np.stack([np.ones(len(groups)), x], axis=1)
        for name, x in {"model": right, "blind": blind}.items()
    }
    return summarise(ACCURACY, counts, groups, clusters)


def test_groups_and_their_mean():
    right = np.array([1, 1, 1, 0, 1, 0, 1])
    blind = np.array([1, 0, 0, 0, 1, 1, 0])
    groups = ["a", "a", "a", "a", "b", "b", ""]
    found = scores_of(right, blind, groups, range(7))
    assert found["n"] == found["images"] == 7 and (found["a/n"], found["b/n"]) == (4, 2)
    assert found["accuracy"] == pytest.approx(5 / 7)
    assert (found["a/accuracy"], found["b/accuracy"]) == (0.75, 0.5)
    assert found["macro/accuracy"] == 0.625
    assert found["a/gain"] == 0.5 and found["b/gain"] == -0.5 and found["macro/gain"] == 0
    assert found["gain"] == pytest.approx(2 / 7)
    assert all(f"{name}/accuracy" not in found for name in ("", "c"))


def test_intervals_know_that_questions_share_images():
    rng = np.random.default_rng(0)
    answers = rng.integers(0, 2, 50)
    alone = scores_of(answers, 0 * answers, [""] * 50, range(50))
    eightfold = np.repeat(answers, 8)
    shared = scores_of(eightfold, 0 * eightfold, [""] * 400, np.repeat(np.arange(50), 8))
    apart = scores_of(eightfold, 0 * eightfold, [""] * 400, range(400))

    def width(found, name="accuracy"):
        return found[f"{name}_high"] - found[f"{name}_low"]

    assert width(shared) == pytest.approx(width(alone), rel=0.1)
    assert width(apart) < 0.5 * width(shared)
    assert width(shared, "gain") == pytest.approx(width(alone, "gain"), rel=0.1)


def test_no_error_among_few_questions_proves_little():
    ones = np.ones(20)
    found = scores_of(ones, ones, ["a"] * 10 + ["b"] * 10, range(20))
    expected = stats.binomtest(10, 10).proportion_ci(method="wilson").low
    assert found["a/accuracy_low"] == pytest.approx(expected)
    assert found["accuracy_high"] == 1
    assert found["macro/accuracy_low"] == pytest.approx(found["accuracy_low"])
    assert found["gain_low"] == found["gain_high"] == 0


def test_presence_equals_sklearn():
    rng = np.random.default_rng(0)
    right, said = rng.integers(0, 2, (2, 60)).astype(bool)
    counts = np.stack([right & said, ~right & said, ~right & ~said, right & ~said], axis=1)
    found = EVALUATORS["pope"].scoring.of(np.append(60, counts.sum(axis=0)))
    precision, recall, f1, _ = precision_recall_fscore_support(right, said, average="binary")
    assert found["precision"] == pytest.approx(precision)
    assert found["recall"] == pytest.approx(recall)
    assert found["f1"] == pytest.approx(f1)
    assert found["accuracy"] == np.mean(right == said)
    assert found["yes_ratio"] == np.mean(said)
