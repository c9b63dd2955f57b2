"""The nearest of many vectors: exactly, or by a library for vector search."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmjax.registry import Registry

# Rows of the index that are compared at a time: 64 MiB of float32 scores for 256 queries.
_BLOCK = 2**16


class Hits(NamedTuple):
    """scores [Q, k] float32, best first; rows [Q, k], where they stand in the index."""

    scores: np.ndarray
    rows: np.ndarray


Search = Callable[[np.ndarray, int], Hits]
# (embeddings [N, D], a path without suffix for a file that may be kept) -> (queries [Q, D], k <= N)
# -> Hits.
BACKENDS: Registry[Callable[[np.ndarray, Path], Search]] = Registry("search backend")


@BACKENDS.register("exact")
def exact(embeddings: np.ndarray, path: Path) -> Search:
    """Compares with every row, a block of rows at a time: `embeddings` may be a memory map.

    Rows with equal scores come in the order of the index.
    """

    def search(queries: np.ndarray, k: int) -> Hits:
        best = Hits(np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64))
        for start in range(0, len(embeddings), _BLOCK):
            scores = queries @ embeddings[start : start + _BLOCK].T
            rows = np.broadcast_to(np.arange(start, start + scores.shape[1]), scores.shape)
            best = _best(
                *(np.concatenate(pair, axis=1) for pair in zip(best, (scores, rows), strict=True)),
                k,
            )
        return best

    return search


def _best(scores: np.ndarray, rows: np.ndarray, k: int) -> Hits:
    k = min(k, scores.shape[1])
    chosen = np.empty((len(scores), k), np.int64)
    for i, line in enumerate(scores):
        threshold = np.partition(line, -k)[-k]
        # All that may be among the best, equal ones included, for their order to be decided.
        candidates = np.flatnonzero(line >= threshold)
        chosen[i] = candidates[np.lexsort((rows[i, candidates], -line[candidates]))[:k]]
    return Hits(np.take_along_axis(scores, chosen, 1), np.take_along_axis(rows, chosen, 1))


@BACKENDS.register("faiss")
def faiss(embeddings: np.ndarray, path: Path) -> Search:
    """Approximately, by faiss's HNSW graph (Malkov and Yashunin, 2016), for millions of rows.

    The graph is built once and kept beside the embeddings.

    Raises:
      ImportError: faiss is not installed.
    """
    try:
        import faiss as library
    except ImportError as error:
        raise ImportError(
            "The backend 'faiss' needs the package faiss-cpu: pip install mmjax[search]. "
            "Or use the backend 'exact'."
        ) from error
    file = path.with_suffix(".faiss")
    if file.exists():
        graph = library.read_index(str(file))
    else:
        graph = library.IndexHNSWFlat(embeddings.shape[1], 32, library.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction = 200
        graph.add(np.ascontiguousarray(embeddings))
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        library.write_index(graph, str(temporary))
        os.replace(temporary, file)

    def search(queries: np.ndarray, k: int) -> Hits:
        graph.hnsw.efSearch = max(128, 2 * k)
        hits = Hits(*graph.search(np.ascontiguousarray(queries, np.float32), k))
        if (hits.rows < 0).any():  # the graph did not lead to k rows
            return exact(embeddings, path)(queries, k)
        return hits

    return search
