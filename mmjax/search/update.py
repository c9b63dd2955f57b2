"""Brings an index up to date with its folder: new, changed and deleted images."""

from __future__ import annotations

import collections
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmjax.data.sources import IMAGE_SUFFIXES, DataNotFoundError, existing
from mmjax.data.tfds_source import locked
from mmjax.search.embed import Embedder
from mmjax.search.index import (
    INDEX,
    Entry,
    Header,
    SearchIndexError,
    live_rows,
    next_segment,
    read_header,
    read_segment,
    remove_others,
    write_header,
    write_segment,
)


class Update(NamedTuple):
    """What an update did, in images. skipped: file -> why it could not be used."""

    added: int
    changed: int
    removed: int
    unchanged: int
    skipped: dict[str, str]


def update_index(
    directory: str | Path,
    folder: str | Path,
    embedder: Embedder,
    *,
    threads: int | None = None,
    save_every: int = 4096,
    progress: Callable[[Iterable, int], Iterable] = lambda images, total: images,
) -> Update:
    """Makes the index in `directory`, or brings it up to date.

    One process at a time; another one waits. Interrupted, it goes on where it was when called
    again. Files are recognised by path, size and time of change; a file that cannot be read is
    skipped and told, and tried again the next time.

    Args:
      directory: of the index; made if it is not there.
      folder: of images, at any depth. Names that begin with a dot are left out.
      embedder: the model.
      threads: that read images; None: one for each processor.
      save_every: images between saves.
      progress: wraps the iteration over `total` images, e.g. in a progress bar.

    Raises:
      DataNotFoundError: no folder, no image in it, or none that can be read.
      SearchIndexError: the directory holds something else, or an index of another folder or of
        another model.
    """
    directory, folder = Path(directory).expanduser(), existing(folder, "The image folder").resolve()
    if not folder.is_dir():
        raise DataNotFoundError(f"{folder} is a file; a folder of images is expected.")
    files = find_images(folder)
    if not files and not (directory / INDEX).exists():
        raise DataNotFoundError(
            f"The folder {folder} holds no image: expected one of "
            f"{', '.join(sorted(IMAGE_SUFFIXES))}."
        )
    if directory.exists() and not (directory / INDEX).exists() and any(directory.glob("[!.]*")):
        raise SearchIndexError(f"{directory} is not empty and no index: choose another directory.")
    with locked(directory / ".lock"):
        header = _header(directory, folder, embedder)
        segments = [read_segment(directory, name)[0] for name in header.segments]
        # Where the update before was interrupted, files that are gone are still there.
        known = {segments[part][row].path: segments[part][row] for part, row in live_rows(segments)}
        wanted = [entry for entry in files if known.get(entry.path) != entry]
        gone = known.keys() - {entry.path for entry in files}
        header, skipped = _append(
            directory, header, folder, wanted, embedder, threads, save_every, progress
        )
        if wanted and not known and len(skipped) == len(wanted):
            first = next(iter(skipped.items()))
            raise DataNotFoundError(
                f"None of the {len(wanted)} images in {folder} can be used; the first, {first[0]}: "
                f"{first[1]}"
            )
        _compact(directory, header._replace(skipped=skipped), gone | skipped.keys())
    added = sum(entry.path not in known for entry in wanted if entry.path not in skipped)
    lost = gone | (skipped.keys() & known.keys())
    return Update(
        added=added,
        changed=len(wanted) - added - len(skipped),
        removed=len(lost),
        unchanged=len(files) - len(wanted),
        skipped=skipped,
    )


def find_images(folder: Path) -> list[Entry]:
    """The image files of a folder by their suffix, at any depth, ordered by path."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.startswith(".") or os.path.splitext(name)[1].lower() not in IMAGE_SUFFIXES:
                continue
            path = Path(parent) / name
            if path.is_file():
                facts = path.stat()
                relative = path.relative_to(folder).as_posix()
                found.append(Entry(relative, facts.st_size, facts.st_mtime_ns))
    return sorted(found)


def check_model(header: Header, embedder: Embedder, directory: Path) -> None:
    """Raises SearchIndexError where an index was made with another model."""
    if header.identity != embedder.identity:
        raise SearchIndexError(
            f"The index {directory} was made with the model in {header.model}; the one in "
            f"{embedder.directory} is another (or has changed since), and its embeddings do not "
            "compare. Give that model, or make another index."
        )


def _header(directory: Path, folder: Path, embedder: Embedder) -> Header:
    if not (directory / INDEX).exists():
        return Header(str(folder), embedder.directory, embedder.identity, 0, [], {})
    header = read_header(directory)
    check_model(header, embedder, directory)
    if Path(header.folder) != folder:
        raise SearchIndexError(
            f"The index {directory} is of the folder {header.folder}, not of {folder}: choose "
            "another directory for this one."
        )
    return header


def _append(
    directory: Path,
    header: Header,
    folder: Path,
    wanted: list[Entry],
    embedder: Embedder,
    threads: int | None,
    save_every: int,
    progress: Callable[[Iterable, int], Iterable],
) -> tuple[Header, dict[str, str]]:
    """Embeds files and saves them as segments; gives the header and what was skipped."""
    skipped: dict[str, str] = {}
    rows: list[tuple[Entry, np.ndarray]] = []
    waiting: list[tuple[Entry, Any]] = []

    def embed() -> None:
        vectors = embedder.prepared_images([prepared for _, prepared in waiting])
        for (entry, _), vector in zip(waiting, vectors, strict=True):
            if np.isfinite(vector).all():
                rows.append((entry, vector))
            else:
                skipped[entry.path] = "the model's embedding of it is not finite"
        waiting.clear()

    def save() -> None:
        nonlocal header
        name = next_segment(header)
        embeddings = np.stack([vector for _, vector in rows])
        write_segment(directory, name, [entry for entry, _ in rows], embeddings)
        header = header._replace(segments=[*header.segments, name], dim=embeddings.shape[1])
        write_header(directory, header)
        rows.clear()

    prepared = _prepared(folder, wanted, embedder, threads)
    for entry, result in progress(prepared, len(wanted)):
        if isinstance(result, Exception):
            skipped[entry.path] = str(result)
            continue
        waiting.append((entry, result))
        if len(waiting) == embedder.batch_size:
            embed()
        if len(rows) >= save_every:
            save()
    if waiting:
        embed()
    if rows:
        save()
    return header, skipped


def _prepared(
    folder: Path, wanted: list[Entry], embedder: Embedder, threads: int | None
) -> Iterator[tuple[Entry, Any]]:
    """(file, what the model takes, or why not), in order, read by threads a little ahead."""

    def read(entry: Entry) -> Any:
        try:
            return embedder.prepare(folder / entry.path)
        except (ValueError, OSError) as error:
            return error

    threads = threads or os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:
        ahead: collections.deque = collections.deque()
        try:
            for entry in wanted:
                ahead.append((entry, pool.submit(read, entry)))
                if len(ahead) > 2 * embedder.batch_size + threads:
                    first, future = ahead.popleft()
                    yield first, future.result()
            while ahead:
                first, future = ahead.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _compact(directory: Path, header: Header, gone: set[str]) -> None:
    """One segment, without files that are gone and without rows that later ones replace."""
    segments = [read_segment(directory, name) for name in header.segments]
    live = live_rows([entries for entries, _ in segments])
    kept = [(part, row) for part, row in live if segments[part][0][row].path not in gone]
    if len(segments) > 1 or len(kept) < sum(len(entries) for entries, _ in segments):
        name = next_segment(header)
        embeddings = np.empty((len(kept), header.dim), np.float32)
        for i, (part, row) in enumerate(kept):
            embeddings[i] = segments[part][1][row]
        write_segment(directory, name, [segments[part][0][row] for part, row in kept], embeddings)
        header = header._replace(segments=[name])
    write_header(directory, header)
    remove_others(directory, header)
