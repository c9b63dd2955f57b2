"""Where records come from: sources with random access, by name.

A source has `len(source)`, `source[i] -> dict` and `source.id(i) -> str`, a name a person can find
the record by. It must be picklable (worker processes get a copy) and usable from several threads.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mmjax.config import split_name
from mmjax.data.records import BadRecordError, DataNotFoundError, get_field  # noqa: F401
from mmjax.data.spec import call_strictly
from mmjax.registry import Registry, UnknownNameError, nearest

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}


class Source(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def id(self, index: int) -> str: ...


SOURCES: Registry[type] = Registry("data source")


def open_source(config: Mapping[str, Any]) -> tuple[Source, float]:
    """`dict(name="folder", root=..., weight=2.0)` -> (source, weight).

    Raises:
      UnknownNameError: an unknown source or field; the message names the nearest.
      DataNotFoundError: nothing there.
    """
    name, arguments = split_name(config, "A data source")
    weight = float(arguments.pop("weight", 1.0))
    if not weight > 0:
        raise ValueError(f"The weight {weight} of source {name!r} must be above 0.")
    source = call_strictly(f"data source {name!r}", SOURCES[name], arguments)
    if len(source) == 0:
        raise DataNotFoundError(f"The data source {name!r} with {arguments} is empty.")
    return source, weight


def existing(path: str | os.PathLike, what: str) -> Path:
    """The path, expanded; the error names the nearest entry of the deepest existing directory."""
    found = Path(path).expanduser()
    if found.exists():
        return found
    parent = found.parent
    while not parent.exists():
        parent = parent.parent
    lost = found.relative_to(parent).parts[0]
    entries = sorted(entry.name for entry in parent.iterdir())[:1000]
    hint = nearest(lost, entries).split(" Valid:")[0]
    hint = f" ({hint})" if hint.startswith("did") else ""
    raise DataNotFoundError(
        f"{what} {str(found)!r} does not exist: {parent} has no {lost!r}{hint}."
    )


@SOURCES.register("digits")
class Digits:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels: fields image (uint8), label, text.

    Args:
      split: "train" (4 of 5, the same ones always), "test" (every fifth), or "all".
    """

    _NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

    def __init__(self, split: str = "train"):
        from sklearn.datasets import load_digits

        data = load_digits()
        indices = np.arange(len(data.target))
        splits = {
            "train": indices[indices % 5 != 4],
            "test": indices[indices % 5 == 4],
            "all": indices,
        }
        if split not in splits:
            raise UnknownNameError(f"digits has no split {split!r}; {nearest(split, splits)}")
        self._indices = splits[split]
        # Levels are 0..16 ink on blank.
        self._images = np.round(data.images[self._indices] * (255 / 16)).astype(np.uint8)
        self._labels = data.target[self._indices].astype(np.int32)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        label = int(self._labels[index])
        return {"image": self._images[index], "label": label, "text": self._NAMES[label]}

    def id(self, index: int) -> str:
        return f"digits[{self._indices[index]}]"


@SOURCES.register("folder")
class Folder:
    """Images in one directory per class: fields image (bytes), label, text (the directory's name).

    Labels count the sorted directory names, as in torchvision. Images directly in `root` (no
    directories) all have label 0 and the text of their file name.

    Args:
      root: the directory.
      class_names: the classes in the order of their labels, if it is not the sorted one.
    """

    def __init__(self, root: str, class_names: list[str] | None = None):
        base = existing(root, "The image folder")
        folders = sorted(entry.name for entry in os.scandir(base) if entry.is_dir())
        self.class_names = list(class_names) if class_names is not None else folders
        for name in self.class_names:
            if name not in folders:
                raise DataNotFoundError(f"{base} has no class {name!r}; {nearest(name, folders)}")
        self._root = str(base)
        self._files: list[str] = []
        labels: list[int] = []
        for label, name in enumerate(self.class_names or [""]):
            for directory, _, files in sorted(os.walk(base / name)):
                inside = os.path.relpath(directory, base)
                for file in sorted(files):
                    if os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES:
                        self._files.append(os.path.normpath(os.path.join(inside, file)))
                        labels.append(label)
        self._labels = np.asarray(labels, np.int32)
        if not self._files:
            raise DataNotFoundError(
                f"The image folder {base} holds no image: expected CLASS/FILE with one of "
                f"{', '.join(sorted(IMAGE_SUFFIXES))}."
            )

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        file = self._files[index]
        label = int(self._labels[index])
        text = self.class_names[label] if self.class_names else os.path.splitext(file)[0]
        with open(os.path.join(self._root, file), "rb") as handle:
            image = handle.read()
        return {"image": image, "label": label, "text": text.replace("_", " ")}

    def id(self, index: int) -> str:
        return os.path.join(self._root, self._files[index])


@SOURCES.register("table")
class Table:
    """A CSV or parquet file: one record per row, fields named as the columns.

    Args:
      path: the file; `.csv`, `.tsv` or `.parquet`.
      image_column: holds paths (relative to `root`, by default the file's directory) or, in
      parquet,
        encoded bytes (also as HF datasets store them: a struct with `bytes` or `path`). The record
        has the bytes under the column's name. None: no images.
    """

    def __init__(self, path: str, image_column: str | None = "image", root: str | None = None):
        file = existing(path, "The table")
        readers = {
            ".csv": lambda pandas: pandas.read_csv(file),
            ".tsv": lambda pandas: pandas.read_csv(file, sep="\t"),
            ".parquet": lambda pandas: pandas.read_parquet(file),
        }
        if file.suffix not in readers:
            raise DataNotFoundError(f"{file}: a table must end in {', '.join(readers)}.")
        import pandas

        frame = readers[file.suffix](pandas)
        self._file = str(file)
        self._columns = {str(name): frame[name].to_numpy() for name in frame.columns}
        self._length = len(frame)
        self._image_column = image_column
        self._root = str(existing(root, "The image root")) if root is not None else str(file.parent)
        if image_column is not None and image_column not in self._columns:
            raise UnknownNameError(
                f"{file} has no column {image_column!r} (image_column); "
                f"{nearest(image_column, self._columns)}"
            )

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = {name: column[index] for name, column in self._columns.items()}
        if self._image_column is not None:
            record[self._image_column] = self._read_image(record[self._image_column])
        return record

    def _read_image(self, value: Any) -> bytes:
        if isinstance(value, Mapping):
            value = value["bytes"] if value.get("bytes") is not None else value["path"]
        if isinstance(value, bytes):
            return value
        # A missing file or an empty cell is a broken image: it is counted, not fatal by itself.
        with open(os.path.join(self._root, str(value)), "rb") as handle:
            return handle.read()

    def id(self, index: int) -> str:
        row = f"{self._file}[{index}]"
        if self._image_column is None:
            return row
        value = self._columns[self._image_column][index]
        return f"{row} {value}" if isinstance(value, str) else row
