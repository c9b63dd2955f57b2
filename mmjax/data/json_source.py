"""JSON files of records, such as those of LLaVA: random access without keeping them in memory."""

from __future__ import annotations

import base64
import binascii
import codecs
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.data.records import BadRecordError, DataNotFoundError
from mmjax.data.sources import SOURCES, existing

_SPACE = " \t\r\n"
# A byte order mark, which some programs put before UTF-8.
_BOM = codecs.BOM_UTF8.decode("latin-1")


@SOURCES.register("json")
class Json:
    """A JSON file with a list of objects, or JSON lines. Only where each one lies is remembered.

    Args:
      path: the file.
      root: the folder of the images; None: the file's.
      image_fields: texts under these names, at any depth, are images: paths relative to `root`,
        read when they are needed, or "data:" URLs.

    Raises:
      DataNotFoundError: no such file, or no list of records in it.
    """

    def __init__(
        self,
        path: str,
        root: str | None = None,
        image_fields: tuple[str, ...] = ("image", "images", "path", "url"),
    ):
        file = existing(path, "The JSON file")
        self._file = str(file)
        self._root = existing(root, "The image folder") if root is not None else file.parent
        self._image_fields = frozenset(image_fields)
        self._spans = _spans(file)
        self._descriptor: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None}

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self._descriptor is None:
            self._descriptor = os.open(self._file, os.O_RDONLY)
        start, end = (int(offset) for offset in self._spans[index])
        try:
            # With an offset of its own: several threads may read.
            record = json.loads(os.pread(self._descriptor, end - start, start))
        except ValueError as error:
            raise BadRecordError(f"it is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise BadRecordError(f"it is no object but {record!r}")
        return {key: self._resolved(value, key) for key, value in record.items()}

    def _resolved(self, value: Any, key: str) -> Any:
        if isinstance(value, Mapping):
            return {inner: self._resolved(part, inner) for inner, part in value.items()}
        if isinstance(value, list):
            return [self._resolved(part, key) for part in value]
        if key not in self._image_fields or not isinstance(value, str):
            return value
        if not value.startswith("data:"):
            return self._root / value
        try:
            return base64.b64decode(value.partition(",")[2], validate=True)
        except binascii.Error as error:
            raise BadRecordError(f"an image's data: URL is not base64: {error}") from error

    def id(self, index: int) -> str:
        return f"{self._file}[{index}]"


def _spans(file: Path) -> np.ndarray:
    """[records, 2] int64: where each begins and ends, in bytes."""
    # Every byte is a character, so that places in the text are places in the file; whatever stands
    # beyond ASCII is inside of strings.
    text = file.read_bytes().decode("latin-1")
    start = len(_BOM) if text.startswith(_BOM) else 0
    listed = text[start:].lstrip(_SPACE).startswith("[")
    spans = (_elements if listed else _lines)(text, start, file)
    if not spans:
        raise DataNotFoundError(
            f"{file} holds no records: a list of objects is expected, or one object a line."
        )
    return np.asarray(spans, np.int64)


def _elements(text: str, start: int, file: Path) -> list[tuple[int, int]]:
    decoder = json.JSONDecoder()
    spans = []
    at = text.index("[", start) + 1
    while True:
        while at < len(text) and text[at] in _SPACE + ",":
            at += 1
        if text[at : at + 1] == "]":
            return spans
        try:
            _, end = decoder.raw_decode(text, at)
        except ValueError as error:
            raise DataNotFoundError(
                f"{file} is not JSON after {len(spans)} records: {error}"
            ) from error
        spans.append((at, end))
        at = end


def _lines(text: str, start: int, file: Path) -> list[tuple[int, int]]:
    del file
    spans = []
    at = start
    for line in text[start:].split("\n"):
        if line.strip(_SPACE):
            spans.append((at, at + len(line)))
        at += len(line) + 1
    return spans
