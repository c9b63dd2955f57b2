"""Data streams (see `mmjax.data.spec`) of recipes from a path: tars, tables, folders, TFDS."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from mmjax.registry import Registry

_KIND_OF: tuple[tuple[str, str], ...] = (
    (r".*\.tar", "webdataset"),
    (r".*\.(csv|tsv|parquet)", "table"),
    (r"[/.~].*", "folder"),
    (r".*", "tfds"),
)


def infer_kind(path: str) -> str:
    """What a path names, by its looks alone, so that a config is the same on every machine.

    It ends in .tar: webdataset; in .csv, .tsv or .parquet: table; it begins with "/", "." or "~":
    folder; anything else is the name of a TFDS data set.
    """
    return next(kind for pattern, kind in _KIND_OF if re.fullmatch(pattern, path))


# kind -> (path, split, fields wanted) -> (config of the source, the fields' names in its records)
_SOURCES: Registry[Callable[[str, str, Mapping[str, str]], tuple[dict, dict]]] = Registry(
    "kind of data"
)


@_SOURCES.register("webdataset")
def _webdataset(path: str, split: str, fields: Mapping[str, str]) -> tuple[dict, dict]:
    usual = dict(image="jpg;jpeg;png;webp", text="txt", label="cls")
    members = {name: field or usual[name] for name, field in fields.items()}
    return dict(name="webdataset", shards=path, **members), {name: name for name in fields}


@_SOURCES.register("tfds")
def _tfds(path: str, split: str, fields: Mapping[str, str]) -> tuple[dict, dict]:
    dataset, _, given = path.partition("@")
    source = dict(name="tfds", dataset=dataset, split=given or split)
    return source, {name: field or name for name, field in fields.items()}


@_SOURCES.register("folder")
def _folder(path: str, split: str, fields: Mapping[str, str]) -> tuple[dict, dict]:
    return dict(name="folder", root=path), {name: field or name for name, field in fields.items()}


@_SOURCES.register("table")
def _table(path: str, split: str, fields: Mapping[str, str]) -> tuple[dict, dict]:
    names = {name: field or name for name, field in fields.items()}
    return dict(name="table", path=path, image_column=names["image"]), names


def stream(
    path: str,
    *,
    split: str,
    fields: Mapping[str, str],
    preset: str,
    size: int,
    augment: tuple = (),
    max_len: int | None = None,
    kind: str = "",
) -> dict[str, Any]:
    """A data stream (see `mmjax.data.spec`) of a path.

    Args:
      path: tars (a brace pattern or a glob), a table, a folder, or a TFDS data set "name@split".
      split: of a TFDS data set that names none by "@".
      fields: "image" and "text" or "label", each with its name in the records, or "" for the usual.
      preset, size, augment: of the images.
      max_len: of the texts, in tokens.
      kind: as the argument; "" infers it.

    Raises:
      UnknownNameError: on an unknown kind.
    """
    source, names = _SOURCES[kind or infer_kind(path)](path, split, fields)
    result = dict(
        sources=[source],
        image=dict(field=names["image"], preset=preset, size=size, augment=augment),
    )
    if "text" in names:
        result["text"] = dict(field=names["text"], max_len=max_len)
    if "label" in names:
        result["label"] = dict(field=names["label"])
    return result
