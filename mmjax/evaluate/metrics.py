"""Scores of rankings and classifications, in numpy, with what chance would give.

Ties are broken against the model everywhere: a model that gives every candidate the same score gets
rank last, not first. NaN scores rank last too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

# Scores that differ by less are equal: a matrix product may give identical rows results that differ
# in the last bit, and which of them is larger depends on the blocking of the product.
TIE_DECIMALS = 6

Score = Callable[[slice], np.ndarray]


def cosine_scores(queries: np.ndarray, candidates: np.ndarray) -> Score:
    """A function from a slice of queries to their cosine similarities with all candidates."""
    queries, candidates = _unit(queries), _unit(candidates)
    return lambda part: queries[part] @ candidates.T


def _unit(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def slices(total: int, chunk: int) -> Iterator[slice]:
    """Slices of `chunk` (the last one shorter) that cover range(total)."""
    return (slice(start, min(start + chunk, total)) for start in range(0, total, chunk))


def retrieval(
    score: Score,
    query_labels: np.ndarray,
    candidate_labels: np.ndarray,
    *,
    at: Sequence[int] = (1, 5, 10),
    chunk: int = 256,
) -> dict[str, float]:
    """How high the right candidates rank; a candidate is right if it has the query's label.

    Args:
      score: from a slice of queries to [chunk, candidates], higher is better.
      query_labels: [queries], integers.
      candidate_labels: [candidates], integers. Several candidates may have one label.
      at: the k of R@k.
      chunk: queries ranked at a time; memory is O(chunk * candidates).

    Returns:
      R@k: share of the queries with a right candidate among the first k. mean_rank, median_rank: of
      the best right candidate, counted from 1. mAP: mean over the queries of the average precision.
      `queries` and `candidates`: how many there were.

    Raises:
      ValueError: if a query has no right candidate, or there are no queries.
    """
    if len(query_labels) == 0:
        raise ValueError("There are no queries to rank candidates for.")
    missing = np.setdiff1d(query_labels, candidate_labels)
    if len(missing):
        raise ValueError(
            f"{len(missing)} query label(s) have no candidate (first: {missing[:5].tolist()}): "
            "the queries' own images and texts must be among the candidates."
        )
    best, precision = [], []
    for part in slices(len(query_labels), chunk):
        scores = np.round(score(part), TIE_DECIMALS)
        right = query_labels[part, None] == candidate_labels[None]
        # By falling score (NaN last), and within one score the wrong candidates first.
        order = np.lexsort((right, -scores), axis=-1)
        right = np.take_along_axis(right, order, axis=-1)
        best.append(1 + np.argmax(right, axis=-1))
        places = np.arange(1, right.shape[1] + 1)
        precisions = np.cumsum(right, axis=-1) / places * right
        precision.append(precisions.sum(-1) / right.sum(-1))
    rank, precision = np.concatenate(best), np.concatenate(precision)
    return {f"R@{k}": float(np.mean(rank <= k)) for k in at} | {
        "mean_rank": float(np.mean(rank)),
        "median_rank": float(np.median(rank)),
        "mAP": float(np.mean(precision)),
        "queries": float(len(query_labels)),
        "candidates": float(len(candidate_labels)),
    }


def retrieval_chance(
    query_labels: np.ndarray, candidate_labels: np.ndarray, *, at: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """What `retrieval` expects of candidates in random order: R@k, mean_rank and mAP, exactly.

    A query with p right ones among n candidates has one among the first k with probability
    1 - C(n-p, k) / C(n, k), its best one at (n+1) / (p+1) on average.
    """
    total = len(candidate_labels)
    labels, counts = np.unique(candidate_labels, return_counts=True)
    positives = dict(zip(labels.tolist(), counts.tolist(), strict=True))
    harmonic = sum(1 / place for place in range(1, total + 1))

    def values(right: int) -> list[float]:
        misses = [
            math.comb(total - right, k) / math.comb(total, k) if k <= total else 0 for k in at
        ]
        # At place i, a right one has (right-1)/(total-1) * (i-1) others before it on average.
        density = (right - 1) / max(total - 1, 1)
        average_precision = (density * (total - harmonic) + harmonic) / total
        return [*(1 - miss for miss in misses), (total + 1) / (right + 1), average_precision]

    cache = {right: values(right) for right in set(positives.values())}
    means = np.mean([cache[positives[label]] for label in query_labels.tolist()], axis=0)
    names = [*(f"R@{k}" for k in at), "mean_rank", "mAP"]
    return dict(zip(names, map(float, means), strict=True))


def label_ranks(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The rank (from 1) of each row's label among its logits.

    Args:
      logits: [N, K].
      labels: [N]; one outside of [0, K) ranks last + 1, so that it never counts as right.
    """
    known = (labels >= 0) & (labels < logits.shape[1])
    rows = np.arange(len(labels))
    target = np.where(known, logits[rows, np.where(known, labels, 0)], -np.inf)
    # "Not smaller" rather than "larger": ties and NaN count against the model.
    return np.where(known, np.sum(~(logits < target[:, None]), axis=1), logits.shape[1] + 1)


def top_k(logits: np.ndarray, labels: np.ndarray, at: Sequence[int] = (1, 5)) -> dict[str, float]:
    """The share of rows whose label is among the k largest logits, for each k below the classes.

    Raises:
      ValueError: if there are no rows.
    """
    if len(labels) == 0:
        raise ValueError("There are no examples to classify.")
    ranks = label_ranks(logits, labels)
    return {f"top{k}": float(np.mean(ranks <= k)) for k in at if k < logits.shape[1]}
