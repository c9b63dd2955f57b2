"""Frozen features judged by simple classifiers: k nearest neighbours and logistic regression."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mmjax.evaluate.base import EVALUATORS, Evaluator
from mmjax.evaluate.classification import require_labels
from mmjax.evaluate.context import FEATURES, EvalContext
from mmjax.evaluate.metrics import cosine_scores, slices, top_k
from mmjax.params import Params


class _Probe(Evaluator):
    """Collects features and class indices of a training and a test set."""

    def __init__(
        self,
        *,
        train: Mapping[str, Any],
        test: Mapping[str, Any],
        features: str,
        context: EvalContext,
    ):
        self._train, self._test, self._context = train, test, context
        self._features = context.compile(FEATURES[features])

    def _sets(self, params: Params):
        """(train features, train classes), (test features, test classes), number of classes.

        Classes count the labels of the training set; a test label that it lacks becomes -1.
        """
        train = self._context.collect(self._features, params, self._train)
        test = self._context.collect(self._features, params, self._test)
        train_labels = require_labels(train.labels, "probe")
        test_labels = require_labels(test.labels, "probe")
        classes, train_classes = np.unique(train_labels, return_inverse=True)
        places = np.searchsorted(classes, test_labels).clip(0, len(classes) - 1)
        test_classes = np.where(classes[places] == test_labels, places, -1)
        return (
            (np.asarray(train.outputs, np.float32), train_classes),
            (np.asarray(test.outputs, np.float32), test_classes),
            len(classes),
        )


@EVALUATORS.register("knn")
class KNN(_Probe):
    """Weighted k-nearest-neighbour classification by cosine similarity.

    A neighbour votes for its class with weight exp(similarity / temperature), as in InstDisc (Wu et
    al. 2018, arXiv:1805.01978) and DINO (Caron et al. 2021, arXiv:2104.14294).

    Args:
      train, test: data configs with `label`.
      features: a name in `mmjax.evaluate.context.FEATURES`.
      k: numbers of neighbours to report; those beyond the training set use all of it.
      temperature: of the votes.
      context: of the model.
    """

    def __init__(
        self,
        *,
        train: Mapping[str, Any],
        test: Mapping[str, Any],
        features: str,
        k: Sequence[int] = (10, 20),
        temperature: float = 0.07,
        context: EvalContext,
    ):
        super().__init__(train=train, test=test, features=features, context=context)
        self._k, self._temperature = k, temperature

    def run(self, params: Params) -> dict[str, float]:
        """`k<k>/top1` and `k<k>/top5` for each k."""
        (features, classes), (queries, targets), count = self._sets(params)
        scores = {}
        for k in self._k:
            votes = knn_votes(features, classes, queries, count, k, self._temperature)
            scores |= {f"k{k}/{name}": value for name, value in top_k(votes, targets).items()}
        return scores


def knn_votes(
    features: np.ndarray,
    classes: np.ndarray,
    queries: np.ndarray,
    num_classes: int,
    k: int,
    temperature: float,
    chunk: int = 1024,
) -> np.ndarray:
    """Votes [queries, num_classes] of the k training rows most similar to each query.

    Args:
      features: [N, D], of class `classes` [N] (0 to num_classes - 1).
      queries: [M, D].
      chunk: queries worked on at a time; memory is O(chunk * N).
    """
    k = min(k, len(features))
    similarity = cosine_scores(queries, features)
    votes = np.zeros((len(queries), num_classes), np.float32)
    for part in slices(len(queries), chunk):
        near = similarity(part)
        nearest_rows = np.argpartition(-near, k - 1, axis=1)[:, :k]
        # Relative to the largest possible similarity, 1: no overflow at small temperatures.
        weights = np.exp((np.take_along_axis(near, nearest_rows, axis=1) - 1.0) / temperature)
        rows = np.arange(part.start, part.stop)[:, None]
        np.add.at(votes, (rows, classes[nearest_rows]), weights)
    return votes


@EVALUATORS.register("linear_probe")
class LinearProbe(_Probe):
    """Multinomial logistic regression on standardised frozen features.

    The strength of the penalty is the best of `c` on a validation part of the training set; the
    model is then fitted to all of it, as in CLIP's appendix A.3 (arXiv:2103.00020).

    Args:
      train, test: data configs with `label`.
      features: a name in `mmjax.evaluate.context.FEATURES`.
      c: inverse strengths of the penalty to choose from, as scikit-learn's `C`.
      validation: share of the training set to choose on; it is split at random, always alike.
      iterations: of L-BFGS, at most.
      context: of the model.
    """

    def __init__(
        self,
        *,
        train: Mapping[str, Any],
        test: Mapping[str, Any],
        features: str,
        c: Sequence[float] = (1e-3, 1e-2, 0.1, 1.0, 10.0),
        validation: float = 0.2,
        iterations: int = 500,
        context: EvalContext,
    ):
        super().__init__(train=train, test=test, features=features, context=context)
        if not 0 < validation < 1:
            raise ValueError(
                f"linear_probe's validation share must be in (0, 1), not {validation}."
            )
        self._c, self._validation, self._iterations = tuple(c), validation, iterations

    def run(self, params: Params) -> dict[str, float]:
        """`top1`, `top5` on the test set, the chosen `c`, `validation_top1` of it."""
        (features, classes), (queries, targets), count = self._sets(params)
        order = np.random.default_rng(0).permutation(len(features))
        held = max(1, round(self._validation * len(features)))
        if held >= len(features):
            raise ValueError("linear_probe needs at least two training examples.")
        chosen_on, fitted_on = order[:held], order[held:]

        def fit(rows: np.ndarray, c: float, queries: np.ndarray) -> np.ndarray:
            mean = features[rows].mean(0)
            # A feature that never varies says nothing; it must not become infinite either.
            deviation = features[rows].std(0)
            deviation = np.where(deviation > 1e-6 * np.abs(mean) + 1e-12, deviation, np.inf)
            standard = (features[rows] - mean) / deviation
            weights, bias = logistic_regression(
                standard, classes[rows], count, c, iterations=self._iterations
            )
            return (queries - mean) / deviation @ weights + bias

        accuracy = {
            c: top_k(fit(fitted_on, c, features[chosen_on]), classes[chosen_on], at=(1,))["top1"]
            for c in self._c
        }
        best = max(accuracy, key=lambda c: (accuracy[c], -c))  # of equals the simplest model
        scores = top_k(fit(order, best, queries), targets)
        return scores | {"c": float(best), "validation_top1": accuracy[best]}


def logistic_regression(
    features: np.ndarray,
    classes: np.ndarray,
    num_classes: int,
    c: float,
    *,
    iterations: int = 500,
    tolerance: float = 1e-5,
) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's multinomial `LogisticRegression(C=c)`, by L-BFGS on JAX's default device.

    Minimises the mean cross entropy + ||weights||^2 / (2 c N); the bias is not penalised.

    Args:
      features: [N, D], best standardised.
      classes: [N] in 0 .. num_classes - 1.
      c: inverse strength of the penalty.
      iterations: at most so many.
      tolerance: stop when the gradient's norm is below it.

    Returns:
      weights [D, num_classes], bias [num_classes].
    """
    start = (
        jnp.zeros((features.shape[1], num_classes), jnp.float32),
        jnp.zeros(num_classes, jnp.float32),
    )
    fitted = _minimise(
        start,
        jnp.asarray(features, jnp.float32),
        jnp.asarray(classes, jnp.int32),
        jnp.float32(1.0 / (c * len(features))),
        jnp.float32(tolerance),
        iterations,
    )
    return jax.device_get(fitted)


@functools.partial(jax.jit, static_argnames="iterations")
def _minimise(start, features, classes, penalty, tolerance, iterations: int):
    def objective(params):
        weights, bias = params
        logits = jnp.dot(features, weights, precision=jax.lax.Precision.HIGHEST) + bias
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, classes)
        return jnp.mean(losses) + 0.5 * penalty * jnp.sum(jnp.square(weights))

    optimizer = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(objective)

    def step(carry):
        params, state, _, count = carry
        value, gradient = value_and_grad(params, state=state)
        updates, state = optimizer.update(
            gradient, state, params, value=value, grad=gradient, value_fn=objective
        )
        return optax.apply_updates(params, updates), state, optax.global_norm(gradient), count + 1

    def unfinished(carry):
        return (carry[3] < iterations) & (carry[2] > tolerance)

    begin = (start, optimizer.init(start), jnp.inf, 0)
    return jax.lax.while_loop(unfinished, step, begin)[0]
