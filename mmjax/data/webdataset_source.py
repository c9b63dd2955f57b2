"""Webdataset tars with random access: an index of the headers, then one read per member.

With random access the shards need not be even, nor as many as processes: the order is shuffled over
all samples, and every process takes its part of each batch.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import itertools
import json
import os
import re
import tarfile
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.data.sources import SOURCES, BadRecordError, DataNotFoundError, existing
from mmjax.registry import UnknownNameError, nearest

INDEX_VERSION = 1
_MAX_OPEN = 256
_BRACES = re.compile(r"\{([^{}]*)\}")


def expand_braces(pattern: str) -> list[str]:
    """ "a-{000..002}.tar" -> three names; also "{x,y}", and several braces, as in a shell."""
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    before, after = pattern[: match.start()], pattern[match.end() :]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if span:
        width = max(len(span[1]), len(span[2])) if span[1].startswith("0") else 0
        options = [str(i).zfill(width) for i in range(int(span[1]), int(span[2]) + 1)]
    else:
        options = match[1].split(",")
    return list(itertools.chain(*(expand_braces(before + o + after) for o in options)))


def find_shards(shards: str | list[str]) -> list[Path]:
    """Files of a brace pattern or a glob, or of a list of them.

    Raises:
      DataNotFoundError: a named shard is missing (all missing ones are listed), or a glob is empty.
    """
    found: list[Path] = []
    missing: list[str] = []
    patterns = [shards] if isinstance(shards, str) else list(shards)
    for name in itertools.chain(*(expand_braces(os.path.expanduser(p)) for p in patterns)):
        if any(char in name for char in "*?["):
            matches = sorted(glob.glob(name))
            missing += [] if matches else [name]
            found += [Path(match) for match in matches]
        elif os.path.exists(name):
            found.append(Path(name))
        else:
            missing.append(name)
    if missing and len(missing) == 1 and not found:
        existing(missing[0], "The shard")  # names the nearest
    if missing:
        shown = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
        raise DataNotFoundError(
            f"{len(missing)} of {len(missing) + len(found)} shards of {shards!r} do not exist: "
            f"{shown}"
        )
    return found


@dataclass(frozen=True)
class ShardIndex:
    """Where the members of one shard's samples lie.

    `keys` [n] bytes; `suffixes` [m]; `offsets`, `sizes` [n, m] int64 in bytes, -1 where a sample
    has no such member.
    """

    keys: np.ndarray
    suffixes: tuple[str, ...]
    offsets: np.ndarray
    sizes: np.ndarray


def build_index(shard: Path) -> ShardIndex:
    """Reads the headers of a tar. A key is the name up to the first dot of its last part, as in the
    webdataset package; the rest, lower-cased, is the suffix.

    Raises:
      DataNotFoundError: not an uncompressed tar, or its end is missing.
    """
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    end = os.path.getsize(shard)
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                folder, _, file = member.name.rpartition("/")
                stem, dot, suffix = file.partition(".")
                if not member.isreg() or not dot or not stem:
                    continue
                if member.offset_data + member.size > end:
                    raise tarfile.ReadError(f"its member {member.name!r} is cut off")
                key = f"{folder}/{stem}" if folder else stem
                samples.setdefault(key, {})[suffix.lower()] = (member.offset_data, member.size)
    except (tarfile.TarError, EOFError) as error:
        raise DataNotFoundError(
            f"The shard {shard} cannot be read: {error}. It must be a whole, uncompressed tar: "
            "write it again, unpack its compression, or leave it out."
        ) from error
    suffixes = tuple(sorted({suffix for members in samples.values() for suffix in members}))
    table = np.full((2, len(samples), len(suffixes)), -1, np.int64)
    for row, members in enumerate(samples.values()):
        for suffix, place in members.items():
            table[:, row, suffixes.index(suffix)] = place
    keys = np.array([key.encode() for key in samples], dtype=bytes)
    return ShardIndex(keys, suffixes, table[0], table[1])


def _stamp(shard: Path) -> np.ndarray:
    status = shard.stat()
    return np.array([INDEX_VERSION, status.st_size, status.st_mtime_ns], np.int64)


def _index_places(shard: Path) -> list[Path]:
    """Beside the shard; else, where that cannot be written, in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "mmjax" / "webdataset"
    name = hashlib.sha256(str(shard.resolve()).encode()).hexdigest()[:24]
    return [shard.with_name(shard.name + ".idx.npz"), cache / f"{name}.idx.npz"]


def _load(place: Path, stamp: np.ndarray) -> ShardIndex | None:
    """The kept index if it belongs to the file as it is now."""
    try:
        with np.load(place) as kept:
            if not np.array_equal(kept["stamp"], stamp):
                return None
            suffixes = tuple(str(suffix) for suffix in kept["suffixes"])
            return ShardIndex(kept["keys"], suffixes, kept["offsets"], kept["sizes"])
    except (OSError, ValueError, KeyError, EOFError):
        return None  # not there, or damaged: it is made again


def _save(place: Path, stamp: np.ndarray, index: ShardIndex) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(suffix=".npz", prefix=".idx", dir=place.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(
                file,
                stamp=stamp,
                keys=index.keys,
                suffixes=np.array(index.suffixes, dtype=str),
                offsets=index.offsets,
                sizes=index.sizes,
            )
        os.replace(temporary, place)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def open_index(shard: Path) -> ShardIndex:
    """The index of a shard, kept from an earlier run or made now."""
    stamp = _stamp(shard)
    places = _index_places(shard)
    for place in places:
        index = _load(place, stamp)
        if index is not None:
            return index
    index = build_index(shard)
    for place in places:
        with contextlib.suppress(OSError):  # no place to keep it is not an error: it is made again
            _save(place, stamp, index)
            break
    return index


class _Files:
    """Open file descriptors by name, at most _MAX_OPEN; reads do not move a file position."""

    def __init__(self):
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()

    def read(self, path: str, offset: int, size: int) -> bytes:
        descriptor = self._descriptors.get(path)
        if descriptor is None:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            with self._lock:
                keep = path not in self._descriptors and len(self._descriptors) < _MAX_OPEN
                if keep:
                    self._descriptors[path] = descriptor
            if not keep:
                try:
                    return os.pread(descriptor, size, offset)
                finally:
                    os.close(descriptor)
        return os.pread(descriptor, size, offset)

    def __reduce__(self):
        return (_Files, ())  # a worker process opens its own

    def __del__(self):
        for descriptor in self._descriptors.values():
            with contextlib.suppress(OSError):
                os.close(descriptor)


@SOURCES.register("webdataset")
class Webdataset:
    """Samples of webdataset tars: fields image (bytes), text (str), label (int), as far as named,
    and those of a JSON object, under their own names.

    Args:
      shards: a brace pattern ("train-{0000..0127}.tar"), a glob ("train-*.tar"), or a list of them.
      image, text, label: the members that hold them, by suffix; alternatives by ";" ("jpg;png").
        None: no such field.
      json: the member with an object whose fields the record has (those of other members come
        first where names are the same). Where it is all that samples have, as in the files of
        OpenFlamingo's MMC4: `image=None, json="json"`.
    """

    def __init__(
        self,
        shards: str | list[str],
        image: str | None = "jpg;jpeg;png;webp",
        text: str | None = None,
        label: str | None = None,
        json: str | None = None,
    ):
        paths = find_shards(shards)
        with ThreadPoolExecutor(min(8, len(paths))) as pool:
            jobs = pool.map(open_index, paths)
            if len(paths) > 16:
                from tqdm import tqdm

                jobs = tqdm(jobs, total=len(paths), desc="Reading shard indices", leave=False)
            indices = list(jobs)
        self._paths = [str(path) for path in paths]
        self._keys = [index.keys for index in indices]
        self._ends = np.cumsum([len(index.keys) for index in indices])
        self._files = _Files()
        if self._ends[-1] == 0:
            raise DataNotFoundError(f"The {len(paths)} shards of {shards!r} hold no sample.")
        members = {"json": json, "image": image, "text": text, "label": label}
        self._places = {
            field: self._places_of(field, alternatives.split(";"), indices)
            for field, alternatives in members.items()
            if alternatives is not None
        }

    def _places_of(
        self, field: str, suffixes: list[str], indices: list[ShardIndex]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per shard the offsets and sizes [n] of the first of the alternatives each sample has."""
        known = {suffix for index in indices for suffix in index.suffixes}
        if not known & set(suffixes):
            raise UnknownNameError(
                f"No sample of {self._paths[0]}{' ...' if len(indices) > 1 else ''} has a member "
                f".{' or .'.join(suffixes)} (set {field}=None to read none); "
                f"{nearest(suffixes[0], known)}"
            )
        places = []
        for index in indices:
            offsets = np.full(len(index.keys), -1, np.int64)
            sizes = offsets.copy()
            for suffix in suffixes:
                if suffix in index.suffixes:
                    column = index.suffixes.index(suffix)
                    take = (offsets < 0) & (index.offsets[:, column] >= 0)
                    offsets[take] = index.offsets[take, column]
                    sizes[take] = index.sizes[take, column]
            places.append((offsets, sizes))
        return places

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _locate(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - (int(self._ends[shard - 1]) if shard else 0)

    def __getitem__(self, index: int) -> dict[str, Any]:
        shard, row = self._locate(index)
        record: dict[str, Any] = {}
        for field, places in self._places.items():
            offsets, sizes = places[shard]
            if offsets[row] < 0:
                raise BadRecordError(f"the sample has no member for the field {field!r}")
            data = self._files.read(self._paths[shard], int(offsets[row]), int(sizes[row]))
            if field == "json":
                record |= _object(data)
            else:
                record[field] = _DECODERS[field](data)
        return record

    def id(self, index: int) -> str:
        shard, row = self._locate(index)
        return f"{self._paths[shard]}/{self._keys[shard][row].decode()}"


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecordError(f"its text is not UTF-8: {error}") from error


def _label(data: bytes) -> int:
    try:
        return int(data)
    except ValueError as error:
        raise BadRecordError(f"its label is not a whole number: {data[:20]!r}") from error


def _object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise BadRecordError(f"its JSON member cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise BadRecordError(f"its JSON member is a {type(value).__name__}, not an object")
    return value


_DECODERS = {"image": bytes, "text": _text, "label": _label}
