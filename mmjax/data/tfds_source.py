"""TFDS data sets with random access (array_record files), no TensorFlow at run time."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.data.sources import SOURCES, DataNotFoundError
from mmjax.registry import UnknownNameError, nearest

# Builders this package brings: name -> module that defines (and so registers) it.
_OWN_BUILDERS = {
    "openmoji": "mmjax.data.openmoji",
    "tinted": "mmjax.data.tinted",
    "scenes": "mmjax.data.scenes",
    "scene_tiles": "mmjax.data.scenes",
}


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on a file: one process of this machine at a time."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield  # closing the file, or the process's death, releases it


def _builder(dataset: str, data_dir: str | None):
    import tensorflow_datasets as tfds

    module = _OWN_BUILDERS.get(dataset.split("/")[0].split(":")[0])
    if module is not None:
        importlib.import_module(module)  # registers the builder
    try:
        # A data set that is already there is read from its own description, which needs no
        # generating code and so no TensorFlow.
        with contextlib.suppress(tfds.core.DatasetNotFoundError):
            return tfds.builder(dataset, data_dir=data_dir, try_gcs=False)
        names = sorted({*tfds.list_builders(with_community_datasets=False), *_OWN_BUILDERS})
    except (ImportError, AttributeError) as error:
        raise DataNotFoundError(
            f"The TFDS data set {dataset!r} cannot be built here ({error}). Prepare it where it "
            "can, with file_format='array_record', and set data_dir to its directory."
        ) from error
    hint = nearest(dataset, names).split(" Valid:")[0]
    hint = hint if hint.startswith("did") else ""
    raise DataNotFoundError(
        f"There is no TFDS data set {dataset!r} in {data_dir or 'the default data_dir'}. {hint}"
    )


def _is_prepared(builder: Any) -> bool:
    # TFDS warns of every directory that is not there.
    return os.path.exists(builder.data_path) and builder.is_prepared()


def prepare(dataset: str, data_dir: str | None = None, download: bool = True):
    """The TFDS builder, prepared; safe to call from several processes at once.

    Raises:
      DataNotFoundError: unknown, or not prepared and not preparable here; says what to do.
    """
    builder = _builder(dataset, data_dir)
    if _is_prepared(builder):
        return builder
    help_text = (
        f"Prepare it once with file_format='array_record' "
        f"(tfds build {dataset} --file_format=array_record) and set data_dir accordingly."
    )
    if not download:
        raise DataNotFoundError(f"{dataset!r} is not prepared in {builder.data_path}. {help_text}")
    target = Path(os.fspath(builder.data_path))
    # Not inside the data set's directory: TFDS looks there for versions.
    with locked(target.parent.parent / f".{target.parent.name}-{target.name}.lock"):
        # Another process may have prepared it while this one waited: look again.
        builder = _builder(dataset, data_dir)
        if not _is_prepared(builder):
            try:
                builder.download_and_prepare(file_format="array_record")
            except (DataNotFoundError, MemoryError, KeyboardInterrupt):
                raise
            except Exception as error:
                # A host that does not share our lock (network disks) may have won the race.
                if _is_prepared(_builder(dataset, data_dir)):
                    return _builder(dataset, data_dir)
                if isinstance(error, OSError) and error.errno is not None:
                    # A full or read-only disk; TFDS has removed what it had written.
                    raise OSError(
                        error.errno,
                        f"{error.strerror}, preparing {dataset!r} in {target}: make room there, or "
                        "set data_dir (or $TFDS_DATA_DIR) to another place",
                    ) from error
                raise DataNotFoundError(
                    f"{dataset!r} could not be prepared: {type(error).__name__}: {error}\n"
                    f"{help_text}"
                ) from error
            builder = _builder(dataset, data_dir)
    return builder


def _holds_text(feature: Any) -> bool:
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.Sequence):
        return _holds_text(feature.feature)
    if isinstance(feature, tfds.features.FeaturesDict):
        return any(_holds_text(part) for part in feature.values())
    return isinstance(feature, tfds.features.Text)


def _strings(value: Any) -> Any:
    """The bytes of text features as str, at any depth."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, dict):
        return {key: _strings(part) for key, part in value.items()}
    if isinstance(value, np.ndarray) and value.dtype == object:
        value = value.tolist()
    return [_strings(part) for part in value] if isinstance(value, list) else value


@SOURCES.register("tfds")
class Tfds:
    """Any TFDS data set whose files are array_record; images stay encoded until the pipeline.

    Args:
      dataset: "name", "name/config" or "name:version". "openmoji" comes with this package.
      split: as TFDS writes it: "train", "train[:90%]", "seen_views+heldout".
      data_dir: where TFDS keeps data; None: $TFDS_DATA_DIR, else TFDS's default below the home.
      download: prepare the data set if it is not there yet.
    """

    def __init__(
        self, dataset: str, split: str, data_dir: str | None = None, download: bool = True
    ):
        import tensorflow_datasets as tfds

        data_dir = os.path.expanduser(data_dir) if data_dir is not None else None
        builder = prepare(dataset, data_dir, download)
        self._name = f"{dataset}/{split}"
        features = builder.info.features
        self._images = [k for k, f in features.items() if isinstance(f, tfds.features.Image)]
        self._texts = [k for k, f in features.items() if _holds_text(f)]
        known = [str(name) for name in builder.info.splits]
        for part in split.split("+"):
            name = part.split("[")[0].strip()
            if name not in known and name != "all":
                raise UnknownNameError(f"{dataset} has no split {name!r}; {nearest(name, known)}")
        try:
            self._data = builder.as_data_source(
                split=split,
                decoders={key: tfds.decode.SkipDecoding() for key in self._images},
            )
        except NotImplementedError as error:
            raise DataNotFoundError(
                f"{dataset!r} in {builder.data_path} has no random access: {error}"
            ) from error
        self.class_names = next(
            (f.names for f in features.values() if isinstance(f, tfds.features.ClassLabel)), None
        )

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = dict(self._data[index])
        for key in self._texts:
            record[key] = _strings(record[key])
        return record

    def id(self, index: int) -> str:
        return f"{self._name}#{index}"
