"""An index of a folder of images on disk: their embeddings, and the file of each.

A directory with

    index.json          what it is, and its segments; replaced atomically
    000001.npy          embeddings [N, D] float32 of a segment, unit norm
    000001.files.json   [path in the folder, bytes, time of change] of each row
    000001.faiss        made by that backend, where it was used

An update appends segments as it goes, so that an interrupted one loses little; at its end there is
one segment, without rows of files that have changed or gone. Until then the last row of a file is
the one that counts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmjax.data.sources import existing
from mmjax.search.backends import BACKENDS, Hits, Search

FORMAT = 1
INDEX = "index.json"


class SearchIndexError(ValueError):
    """A directory that is no index, is damaged, or cannot be used as asked."""


class Entry(NamedTuple):
    """A file: its path in the folder, its size in bytes, when it was changed in nanoseconds."""

    path: str
    size: int
    modified: int


class Header(NamedTuple):
    """The content of index.json.

    folder: what is indexed. model: where the model was; identity: its fingerprint. dim: of the
    embeddings. segments: their names. skipped: files that could not be used, and why.
    """

    folder: str
    model: str
    identity: str
    dim: int
    segments: Sequence[str]
    skipped: Mapping[str, str]


class Index:
    """An index opened for queries. It stays usable while an update replaces it on disk.

    Attributes:
      header: see `Header`.
      entries: of each row.
      embeddings: [N, D] float32, unit norm; on disk, not in memory.

    Raises:
      DataNotFoundError, SearchIndexError: no index there, or a damaged one.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory).expanduser()
        try:
            self._open()
        except FileNotFoundError:
            self._open()  # an update had just replaced what index.json named before

    def _open(self) -> None:
        self.header = read_header(self.directory)
        segments = [read_segment(self.directory, name) for name in self.header.segments]
        if len(segments) == 1:
            self.entries, self.embeddings = segments[0]
        else:  # the last update was interrupted, or has found nothing
            rows = live_rows([entries for entries, _ in segments])
            self.entries = [segments[part][0][row] for part, row in rows]
            self.embeddings = np.empty((len(rows), self.header.dim), np.float32)
            for i, (part, row) in enumerate(rows):
                self.embeddings[i] = segments[part][1][row]
        self._searches: dict[str, Search] = {}

    def __len__(self) -> int:
        return len(self.entries)

    def path(self, row: int) -> Path:
        """The file of a row."""
        return Path(self.header.folder) / self.entries[row].path

    def search(self, queries: np.ndarray, k: int, backend: str = "exact") -> Hits:
        """The k rows with the largest cosine similarity to each query.

        Args:
          queries: [Q, D], unit norm.
          k: at most `len(self)`.
          backend: a name in `BACKENDS`.

        Raises:
          SearchIndexError: another width, or k out of range.
          UnknownNameError: no such backend.
          ImportError: its package is not installed.
        """
        queries = np.asarray(queries, np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.header.dim:
            raise SearchIndexError(
                f"Queries of shape {queries.shape} do not fit embeddings of {self.header.dim}."
            )
        if not 1 <= k <= len(self):
            raise SearchIndexError(
                f"k is {k}, but the index {self.directory} has {len(self)} image(s)."
            )
        if backend not in self._searches:
            name = "-".join(self.header.segments)
            self._searches[backend] = BACKENDS[backend](self.embeddings, self.directory / name)
        return self._searches[backend](queries, k)

    def files(self, hits: Hits) -> list[list[tuple[float, Path]]]:
        """For each query its (score, file), best first."""
        return [
            [(score, self.path(row)) for score, row in zip(scores, rows, strict=True)]
            for scores, rows in zip(hits.scores.tolist(), hits.rows.tolist(), strict=True)
        ]


def live_rows(segments: Sequence[Sequence[Entry]]) -> list[tuple[int, int]]:
    """(segment, row) of the last row of each file, ordered by path."""
    last = {
        entry.path: (part, row)
        for part, entries in enumerate(segments)
        for row, entry in enumerate(entries)
    }
    return [last[path] for path in sorted(last)]


def read_header(directory: Path) -> Header:
    """Raises SearchIndexError or DataNotFoundError where there is no sound index."""
    file = existing(directory, "The index") / INDEX
    if not file.is_file():
        raise SearchIndexError(
            f"{directory} holds no index (no {INDEX}). Make one: python -m experiments.search "
            f"index --weights MODEL --images FOLDER --index {directory}"
        )
    try:
        content = json.loads(file.read_text("utf-8"))
        version = content.pop("format")
        if version != FORMAT:
            raise SearchIndexError(
                f"{file} has format {version}; this version of mmjax reads {FORMAT}. Make the "
                "index anew."
            )
        return Header(**content)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SearchIndexError(f"{file} is damaged ({error!r}): make the index anew.") from error


def write_header(directory: Path, header: Header) -> None:
    text = json.dumps({"format": FORMAT, **header._asdict()}, indent=1)
    _write(directory / INDEX, lambda file: file.write(text.encode()))


def read_segment(directory: Path, name: str) -> tuple[list[Entry], np.ndarray]:
    """The entries, and the embeddings as a memory map.

    Raises:
      FileNotFoundError: not there (any more).
      SearchIndexError: damaged.
    """
    try:
        rows = json.loads((directory / f"{name}.files.json").read_text("utf-8"))
        entries = [Entry(*row) for row in rows]
        embeddings = np.load(directory / f"{name}.npy", mmap_mode="r")
    except (ValueError, TypeError, EOFError) as error:
        raise SearchIndexError(
            f"Segment {name} of the index {directory} is damaged ({error}): make the index anew."
        ) from error
    if len(entries) != len(embeddings):
        raise SearchIndexError(
            f"Segment {name} of the index {directory} is damaged ({len(entries)} files, "
            f"{len(embeddings)} embeddings): make the index anew."
        )
    return entries, embeddings


def write_segment(
    directory: Path, name: str, entries: Sequence[Entry], embeddings: np.ndarray
) -> None:
    """Both files, whole on the disk before any header names them."""
    text = json.dumps(entries, separators=(",", ":"))
    _write(directory / f"{name}.npy", lambda file: np.save(file, embeddings))
    _write(directory / f"{name}.files.json", lambda file: file.write(text.encode()))


def remove_others(directory: Path, header: Header) -> None:
    """Removes files of segments that the header does not name."""
    for path in directory.iterdir():
        name = path.name.split(".")[0]
        if name.isdigit() and name not in header.segments:
            path.unlink()


def next_segment(header: Header) -> str:
    return f"{max((int(name) for name in header.segments), default=0) + 1:06d}"


def _write(path: Path, write) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
