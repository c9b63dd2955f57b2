"""Ranking and accuracy against scikit-learn, and chance levels against simulation."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, top_k_accuracy_score

from mmjax.evaluate import metrics


def random_case(queries=40, candidates=30, labels=8, seed=0):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(queries, candidates)).astype(np.float32)
    candidate_labels = np.concatenate(
        [np.arange(labels), rng.integers(0, labels, candidates - labels)]
    )
    return scores, rng.integers(0, labels, queries), candidate_labels


@pytest.mark.parametrize("chunk", [7, 1000])
def test_retrieval_equals_sklearn_and_plain_loops(chunk):
    scores, queries, candidates = random_case()
    got = metrics.retrieval(lambda part: scores[part], queries, candidates, chunk=chunk)
    ranks, precisions = [], []
    for row, label in zip(scores, queries, strict=True):
        ranks.append(1 + min(np.flatnonzero(candidates[np.argsort(-row)] == label)))
        precisions.append(average_precision_score(candidates == label, row))
    ranks = np.array(ranks)
    for k in (1, 5, 10):
        assert got[f"R@{k}"] == np.mean(ranks <= k)
    assert got["mean_rank"] == np.mean(ranks)
    assert got["median_rank"] == np.median(ranks)
    np.testing.assert_allclose(got["mAP"], np.mean(precisions), rtol=1e-6)


@pytest.mark.parametrize("value", [0.5, np.nan])
def test_a_constant_model_scores_nothing(value):
    _, queries, candidates = random_case()
    got = metrics.retrieval(
        lambda part: np.full((part.stop - part.start, len(candidates)), value), queries, candidates
    )
    assert got["R@1"] == got["R@5"] == 0
    # Also where rounding in the product makes equal candidates differ in the last bit.
    rng = np.random.default_rng(0)
    constant = np.ones((200, 1), np.float32) * rng.normal(size=(1, 512)).astype(np.float32)
    labels = np.arange(200)
    assert metrics.retrieval(metrics.cosine_scores(constant, constant), labels, labels)["R@10"] == 0


def test_chance_equals_simulation():
    _, queries, candidates = random_case()
    expected = metrics.retrieval_chance(queries, candidates)
    rng = np.random.default_rng(1)
    runs = [
        metrics.retrieval(lambda part, s=s: s[part], queries, candidates)
        for s in rng.normal(size=(400, len(queries), len(candidates)))
    ]
    for name, value in expected.items():
        samples = [run[name] for run in runs]
        error = np.std(samples) / np.sqrt(len(samples))
        assert abs(np.mean(samples) - value) < 4 * error, name


def test_chance_with_one_right_candidate():
    labels = np.arange(200)
    chance = metrics.retrieval_chance(labels, labels)
    np.testing.assert_allclose([chance["R@1"], chance["R@5"]], [1 / 200, 5 / 200])
    assert chance["mean_rank"] == 100.5
    one = np.zeros(1, int)
    assert metrics.retrieval_chance(one, one) == {
        "R@1": 1.0, "R@5": 1.0, "R@10": 1.0, "mean_rank": 1.0, "mAP": 1.0,
    }  # fmt: skip


def test_retrieval_refuses_queries_that_cannot_be_answered():
    with pytest.raises(ValueError, match=r"1 query label\(s\) have no candidate \(first: \[3\]\)"):
        metrics.retrieval(lambda part: np.zeros((2, 2)), np.array([0, 3]), np.array([0, 1]))
    with pytest.raises(ValueError, match="no queries"):
        metrics.retrieval(lambda part: np.zeros((0, 2)), np.array([], int), np.array([0, 1]))


def test_top_k_equals_sklearn():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(50, 9)), rng.integers(0, 9, 50)
    got = metrics.top_k(logits, labels)
    for k in (1, 5):
        assert got[f"top{k}"] == top_k_accuracy_score(labels, logits, k=k, labels=np.arange(9))


def test_top_k_pessimism():
    labels = np.array([0, 1, 2, -1, 7])
    assert metrics.top_k(np.zeros((5, 7)), labels) == {"top1": 0.0, "top5": 0.0}
    assert metrics.top_k(np.full((5, 7), np.nan), labels) == {"top1": 0.0, "top5": 0.0}
    assert metrics.top_k(np.eye(7)[[0, 1, 2, 3, 4]], labels)["top1"] == 3 / 5
