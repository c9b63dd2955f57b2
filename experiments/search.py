"""Search a folder of images by text or by image.

    python -m experiments.search index --weights DIR --images FOLDER --index DIR
    python -m experiments.search query --index DIR --text "a dog on a beach" [--k 10]
    python -m experiments.search query --index DIR --image photo.jpg --sheet found.png

`index` makes the index; called again (--index DIR is enough) it embeds what is new or has changed,
and drops what is gone. `query` without --text and --image reads one query from each line of its
standard input. Scores are cosine similarities.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments import common
from experiments.embedder import add_arguments, open_embedder
from mmjax.config import ConfigError

if TYPE_CHECKING:
    import numpy as np

    from mmjax.search import Embedder

# Names of skipped files that are printed; the index has all of them.
_NAMED = 10


def main(argv: Sequence[str] | None) -> int:
    parser = common.plain_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    index = commands.add_parser("index", help="make an index, or bring it up to date")
    index.add_argument("--images", help="the folder; may be left out for an index that is there")
    index.add_argument("--threads", type=int, help="that read images; all processors by default")
    query = commands.add_parser("query", help="find the images nearest to a text or an image")
    query.add_argument("--text", nargs="+", default=[], metavar="TEXT", help="one or several")
    query.add_argument("--image", nargs="+", default=[], metavar="FILE", help="one or several")
    query.add_argument("--k", type=int, help="how many; 10, or all where there are fewer")
    query.add_argument("--backend", default="exact", help="exact, or faiss (approximate)")
    query.add_argument("--json", action="store_true", help="one JSON object for each query")
    query.add_argument("--sheet", help="a PNG to draw the images found into")
    for command in (index, query):
        command.add_argument("--index", required=True, help="the directory of the index")
        add_arguments(command, required=False)
    args = parser.parse_args(argv)
    return {"index": _index, "query": _query}[args.command](args)


def _index(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from mmjax.data.sources import existing
    from mmjax.search import update_index
    from mmjax.search.index import INDEX, read_header

    directory = Path(args.index).expanduser()
    if (directory / INDEX).exists():
        header = read_header(directory)
        args.weights, args.images = args.weights or header.model, args.images or header.folder
    if not args.weights or not args.images:
        raise ConfigError(f"{directory} holds no index yet: give --weights and --images.")
    folder = existing(args.images, "The image folder")  # said before a model is read
    embedder = open_embedder(args.weights, batch_size=args.batch_size, dtype=args.dtype)

    def progress(images: Iterator, total: int) -> Iterator:
        return tqdm(images, total=total, unit=" images", disable=not total, mininterval=0.5)

    done = update_index(directory, folder, embedder, threads=args.threads, progress=progress)
    total = done.added + done.changed + done.unchanged
    print(
        f"{directory}: {total} images ({done.added} new, {done.changed} changed, {done.removed} "
        "removed)"
    )
    if done.skipped:
        print(f"{len(done.skipped)} skipped:")
        for path, reason in list(done.skipped.items())[:_NAMED]:
            print(f"  {path}: {reason}")
        if len(done.skipped) > _NAMED:
            print(f"  ... all of them stand in {directory / INDEX}")
    return 0


def _query(args: argparse.Namespace) -> int:
    from mmjax.search import BACKENDS, Index
    from mmjax.search.sheet import draw
    from mmjax.search.update import check_model

    BACKENDS[args.backend]  # an unknown name is said before a model is read
    index = Index(args.index)
    if not len(index):
        raise ConfigError(f"The index {index.directory} has no images.")
    k = min(10, len(index)) if args.k is None else args.k
    if not 1 <= k <= len(index):
        raise ConfigError(f"--k is {k}, but the index {index.directory} has {len(index)} image(s).")
    args.weights = args.weights or index.header.model
    embedder = open_embedder(args.weights, batch_size=args.batch_size, dtype=args.dtype)
    check_model(index.header, embedder, index.directory)
    found = []
    for name, vectors in _queries(args, embedder):
        (rows,) = index.files(index.search(vectors, k, args.backend))
        _show(name, rows, as_json=args.json)
        found.append((name, rows))
    if not found:
        raise ConfigError("There was no query: give --text, --image, or lines of text.")
    if args.sheet:
        draw(found, args.sheet)
        print(f"The images are in {args.sheet}.", file=sys.stderr)
    return 0


def _queries(args: argparse.Namespace, embedder: Embedder) -> Iterator[tuple[str, np.ndarray]]:
    """(name, [1, D]) of each query."""
    for text in args.text:
        yield text, embedder.texts([text])
    for image in args.image:
        yield image, embedder.images([image])
    if not args.text and not args.image:
        for line in filter(None, map(str.strip, sys.stdin)):
            yield line, embedder.texts([line])


def _show(name: str, rows: list[tuple[float, Path]], *, as_json: bool) -> None:
    if as_json:
        results = [{"score": score, "path": str(path)} for score, path in rows]
        print(json.dumps({"query": name, "results": results}, ensure_ascii=False), flush=True)
        return
    lines = [f"{rank:4}  {score:7.4f}  {path}" for rank, (score, path) in enumerate(rows, 1)]
    print("\n".join([name, *lines]), flush=True)


if __name__ == "__main__":
    common.run(main)
