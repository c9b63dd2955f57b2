"""Search in a folder of generated images: time to index, time to answer, and whether it is right.

    python -m experiments.bench search [--images 10000] [--size 96] [--backends exact faiss]

The model is a CLIP with random weights (width 192, 6 blocks, 48 pixels, unless --weights names a
real one): times are real, answers are not. They are compared with brute force in float64.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

_CHANGED = 100  # images new, changed and deleted before the second update
_WORDS = ("red", "green", "blue", "yellow", "circle", "square", "triangle", "cat", "dog", "photo")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="experiments.bench search")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--size", type=int, default=96, help="pixels of a side, about")
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--weights", help="a model directory, rather than random weights")
    installed = ["exact", *(["faiss"] if importlib.util.find_spec("faiss") else [])]
    parser.add_argument("--backends", nargs="+", default=installed)
    args = parser.parse_args(argv)
    if args.images < max(2 * _CHANGED, args.k):
        parser.error(f"--images must be at least {max(2 * _CHANGED, args.k)}")

    from experiments._random_clip import write_random_clip
    from mmjax.search import BACKENDS, Embedder, Index, update_index

    for backend in args.backends:
        BACKENDS[backend]
    with tempfile.TemporaryDirectory() as scratch:
        folder, directory = Path(scratch) / "images", Path(scratch) / "index"
        write_images(folder, range(args.images), args.size)
        weights = args.weights or write_random_clip(Path(scratch) / "clip", width=192, depth=6)
        embedder = Embedder.load(weights, batch_size=64)
        embedder.images([Image.new("RGB", (8, 8))] * 2)  # compiles

        def update() -> None:
            done = update_index(directory, folder, embedder, progress=progress)
            print(f"  {done.added} new, {done.changed} changed, {done.removed} removed")

        seconds = _seconds(update)
        print(f"index: {seconds:.1f} s, {args.images / seconds:.0f} images/s")
        print(f"update, nothing to do: {_seconds(update):.2f} s")
        write_images(folder, range(args.images, args.images + _CHANGED), args.size)
        write_images(folder, range(_CHANGED), args.size, seed=1)
        for i in range(_CHANGED, 2 * _CHANGED):
            _file(folder, i).unlink()
        seconds = _seconds(update)
        print(f"update, {_CHANGED} new, {_CHANGED} changed, {_CHANGED} deleted: {seconds:.2f} s")

        seconds = statistics.median(_seconds(lambda: Index(directory)) for _ in range(5))
        index = Index(directory)
        print(f"open the index of {len(index)} images: {1e3 * seconds:.1f} ms")
        rng = np.random.default_rng(0)
        texts = [" ".join(rng.choice(_WORDS, 4)) for _ in range(args.queries)]
        embedder.texts(texts[:1])  # compiles
        times = [_seconds(lambda text=text: embedder.texts([text])) for text in texts]
        print(f"embed a text: {1e3 * statistics.median(times):.2f} ms (median)")
        queries = np.concatenate([embedder.texts(texts), index.embeddings[:: len(index) // 50]])
        scores = queries.astype(np.float64) @ np.asarray(index.embeddings, np.float64).T
        for backend in args.backends:
            built = _seconds(lambda backend=backend: index.search(queries[:1], 1, backend))
            times, right, found = [], 0, 0
            for query, row in zip(queries, scores, strict=True):
                began = time.perf_counter()
                hits = index.search(query[None], args.k, backend)
                times.append(time.perf_counter() - began)
                best = np.sort(row)[::-1][: args.k]
                # Rounding may swap rows whose scores are equal to six digits.
                right += np.abs(row[hits.rows[0]] - best).max() < 1e-6
                found += (row[hits.rows[0]] >= best[-1] - 1e-6).sum()
            print(
                f"{backend}: {1e3 * statistics.median(times):.2f} ms a query (median; first call "
                f"{1e3 * built:.0f} ms), {right} of {len(queries)} answers equal to brute force, "
                f"recall@{args.k} {found / len(queries) / args.k:.1%}"
            )
    return 0


def progress(images, total: int):
    return tqdm(images, total=total, unit=" images", mininterval=1, disable=total < 1000)


def write_images(folder: Path, numbers: Sequence[int], size: int, seed: int = 0) -> None:
    """Smooth random colours as JPEG files, of sizes from half of `size` to one and a half."""
    folder.mkdir(exist_ok=True)
    for i in numbers:
        rng = np.random.default_rng([seed, i])
        coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        width, height = rng.integers(size // 2, size + size // 2, 2).tolist()
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(_file(folder, i))


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.jpg"


def _seconds(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began
