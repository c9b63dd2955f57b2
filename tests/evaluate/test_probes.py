"""k-NN and logistic regression against scikit-learn."""

import numpy as np
import pytest
from fakes import SIZE, make_context
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from mmjax.evaluate import FEATURES, make_evaluator
from mmjax.evaluate.probes import knn_votes, logistic_regression


@pytest.fixture(scope="module")
def digits():
    """(features, labels) of 400 training and 200 test digits, standardised."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)[:, : SIZE * SIZE * 3]
    return (images[:400], labels[:400]), (images[400:600], labels[400:600])


def test_knn_votes_equal_sklearn(digits):
    (features, classes), (queries, _) = digits
    reference = KNeighborsClassifier(
        n_neighbors=7, metric="cosine", weights=lambda distance: np.exp(-distance / 0.07)
    ).fit(features, classes)
    votes = knn_votes(features, classes, queries, 10, k=7, temperature=0.07, chunk=33)
    shares = votes / votes.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(shares, reference.predict_proba(queries), atol=1e-4)


@pytest.mark.parametrize("c", [0.01, 10.0])
def test_logistic_regression_equals_sklearn(digits, c):
    (features, classes), (queries, _) = digits
    reference = LogisticRegression(C=c, max_iter=5000, tol=1e-8).fit(features, classes)
    weights, bias = logistic_regression(features, classes, 10, c, iterations=2000)
    logits = queries @ weights + bias
    expected = reference.decision_function(queries)
    np.testing.assert_allclose(
        logits - logits.mean(1, keepdims=True),
        expected - expected.mean(1, keepdims=True),
        atol=2e-3 * np.abs(expected).max(),
    )


def digits_data(part):
    images, labels = part
    images = images.reshape(-1, SIZE, SIZE, 3)
    return {"examples": {"image": images, "label": labels.astype(np.int32) * 10}}


@pytest.mark.parametrize(
    "config, score",
    [(dict(name="linear_probe"), "top1"), (dict(name="knn", k=[5, 1000]), "k5/top1")],
    ids=["linear_probe", "knn"],
)
def test_probes_on_digits(digits, config, score, tmp_path):
    context, params = make_context(tmp_path, devices=2, batch_size=64)
    train, test = map(digits_data, digits)
    config |= dict(train=train, test=test, features="pooled")
    scores = make_evaluator(config, context, "config.evals.probe").run(params)
    assert scores[score] > 0.85
    assert all(0 <= value <= 10 for value in scores.values())


def test_labels_that_training_lacks_are_wrong(digits, tmp_path):
    context, params = make_context(tmp_path, batch_size=64)
    train, test = map(digits_data, digits)
    test["examples"]["label"] = np.full(200, 55, np.int32)
    config = dict(name="knn", train=train, test=test, features="pooled", k=[3])
    assert make_evaluator(config, context, "config.evals.probe").run(params)["k3/top5"] == 0


def test_unknown_features(tmp_path):
    context, _ = make_context(tmp_path)
    with pytest.raises(ValueError, match="did you mean 'pooled'"):
        make_evaluator(
            dict(name="knn", train={}, test={}, features="pool"), context, "config.evals.knn"
        )
    assert FEATURES.names() == ["embedding", "image_tower", "pooled"]
