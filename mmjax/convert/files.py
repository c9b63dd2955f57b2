"""Safetensors files, read and written one tensor at a time.

The format is a length, a JSON header and the raw data. The `safetensors` package maps files into
memory or wants all tensors at once; checkpoints of many gigabytes are to pass through memory tensor
by tensor, so this module reads and writes the bytes itself.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np

from mmjax.convert.table import ConversionError

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class Tensors(Protocol):
    """Named tensors somewhere: shapes are known at once, data is read on demand."""

    where: str
    shapes: Mapping[str, tuple[int, ...]]

    def size(self, name: str) -> int:
        """Bytes of the buffer that `read` can use; 0 where it has no use for one."""
        ...

    def read(self, name: str, buffer: np.ndarray | None = None) -> np.ndarray:
        """The data of one tensor, in `buffer` (bytes) if that is given and of use."""
        ...


class _Place(NamedTuple):
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class SafetensorsReader:
    """The tensors of a checkpoint directory; see `open_directory`."""

    where: str
    places: Mapping[str, _Place]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: place.shape for name, place in self.places.items()}

    def size(self, name: str) -> int:
        return self.places[name].stop - self.places[name].start

    def read(self, name: str, buffer: np.ndarray | None = None) -> np.ndarray:
        """The data of one tensor, in its own type.

        Args:
          buffer: bytes to read into, at least as many as the tensor has; new ones if None.

        Raises:
          ConversionError: if the file ends early, or the type is unknown.
        """
        place = self.places[name]
        if place.dtype not in DTYPES:
            raise ConversionError(
                f"Tensor {name!r} in {place.file} has the type {place.dtype}, which is not "
                f"supported. Supported: {', '.join(DTYPES)}."
            )
        size = place.stop - place.start
        data = np.empty(size, np.uint8) if buffer is None else buffer[:size]
        with open(place.file, "rb", buffering=0) as file:
            file.seek(place.start)
            view = memoryview(data)
            while view:
                count = file.readinto(view)
                if not count:
                    raise ConversionError(f"{place.file} is truncated within tensor {name!r}.")
                view = view[count:]
        return data.view(DTYPES[place.dtype]).reshape(place.shape)


def aligned(size: int) -> np.ndarray:
    """Bytes that begin at a multiple of 64, where XLA can use them as they are."""
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size]


def open_directory(directory: Path) -> SafetensorsReader:
    """The tensors of `model.safetensors`, or of the files that its index names.

    Raises:
      ConversionError: if there are none, a file is missing or damaged, or there are only pickles.
    """
    if (directory / INDEX).is_file():
        files = _indexed(directory)
    elif (directory / WEIGHTS).is_file():
        files = {directory / WEIGHTS: None}
    else:
        raise ConversionError(_why_not(directory))
    places: dict[str, _Place] = {}
    for file, names in files.items():
        header = _header(file)
        if names is not None:
            lacking = sorted(set(names) - set(header))
            if lacking:
                raise ConversionError(
                    f"{file} lacks tensors that {INDEX} places there: {', '.join(lacking[:10])}. "
                    "Copy the checkpoint again."
                )
        twice = sorted(set(header) & set(places))
        if twice:
            raise ConversionError(f"{file} repeats tensors of other files: {', '.join(twice[:10])}")
        places |= header
    return SafetensorsReader(str(directory), places)


def open_file(file: Path) -> SafetensorsReader:
    """The tensors of one file.

    Raises:
      ConversionError: if it is damaged.
    """
    return SafetensorsReader(str(file), _header(file))


def _indexed(directory: Path) -> dict[Path, list[str]]:
    try:
        weight_map = json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, UnicodeDecodeError) as error:
        raise ConversionError(
            f"{directory / INDEX} is damaged ({error}): copy it again."
        ) from error
    files: dict[Path, list[str]] = {}
    for name, file in weight_map.items():
        files.setdefault(directory / file, []).append(name)
    missing = sorted(file.name for file in files if not file.is_file())
    if missing:
        raise ConversionError(
            f"{directory} lacks {len(missing)} of the {len(files)} files that {INDEX} names: "
            f"{', '.join(missing)}. Copy them there."
        )
    return files


def _why_not(directory: Path) -> str:
    """Why a directory has no weights we read, and what to do."""
    pickles = sorted(file.name for pattern in _PICKLES for file in directory.glob(pattern))
    if pickles:
        return (
            f"{directory} has its weights as pickles ({', '.join(pickles[:5])}), which can run any "
            "code when they are opened, so they are not. Where you trust them, convert them with "
            "PyTorch and transformers: AutoModel.from_pretrained(DIR).save_pretrained(NEW_DIR) "
            "writes safetensors (take the class that config.json names in place of AutoModel)."
        )
    others = sorted(file.name for file in directory.glob("*.safetensors"))
    if others:
        return (
            f"{directory} has {', '.join(others[:5])} but neither {WEIGHTS} nor {INDEX}: a single "
            f"file must be named {WEIGHTS}, several need their index."
        )
    return f"{directory} is no checkpoint: it has neither {WEIGHTS} nor {INDEX}."


def _header(file: Path) -> dict[str, _Place]:
    """Where each tensor lies in one file, everything checked against the file's size."""

    def damaged(why: str) -> ConversionError:
        return ConversionError(f"{file} is damaged or truncated ({why}): copy it again.")

    size = file.stat().st_size
    with open(file, "rb") as stream:
        start = stream.read(8)
        if len(start) < 8:
            raise damaged(f"{size} bytes")
        length = int.from_bytes(start, "little")
        if length > size - 8:
            raise damaged(f"a header of {length} bytes in a file of {size}")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise damaged("its header is not JSON") from error
    places, end = {}, 0
    for name, info in header.items():
        if name == "__metadata__":
            continue
        try:
            (first, last), shape = info["data_offsets"], tuple(info["shape"])
            dtype = DTYPES.get(info["dtype"])
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(f"the header's entry of {name!r}") from error
        if dtype is not None and last - first != math.prod(shape) * dtype.itemsize:
            raise damaged(f"tensor {name!r} of shape {shape} has {last - first} bytes")
        places[name] = _Place(file, info["dtype"], shape, 8 + length + first, 8 + length + last)
        end = max(end, last)
    if 8 + length + end != size:
        raise damaged(f"{size} bytes where its header says {8 + length + end}")
    return places


class Item(NamedTuple):
    """A tensor to write; `data` is called when its turn comes."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    data: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_directory(
    directory: Path, items: Sequence[Item], max_shard_size: int, *, write: bool = True
) -> None:
    """Writes `model.safetensors`, or several files and their index.

    Args:
      max_shard_size: of one file, in bytes; a tensor above that has a file of its own.
      write: whether this process writes. All processes must come here, since the data of an array
        that lies on several is gathered by all.
    """
    shards: list[list[Item]] = [[]]
    total = 0
    for item in items:
        if shards[-1] and total + item.size > max_shard_size:
            shards.append([])
            total = 0
        shards[-1].append(item)
        total += item.size
    names = [WEIGHTS]
    if len(shards) > 1:
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        write_file(directory / name, shard, write=write)
    if len(shards) > 1 and write:
        index = {
            "metadata": {"total_size": sum(item.size for item in items)},
            "weight_map": {
                item.name: name for name, shard in zip(names, shards, strict=True) for item in shard
            },
        }
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_file(file: Path, items: Iterable[Item], *, write: bool) -> None:
    """Writes one file; `write` as in `write_directory`."""
    # Wide types first: every tensor is then aligned to its own type, as the format wants.
    items = sorted(items, key=lambda item: -item.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for item in items:
        header[item.name] = {
            "dtype": NAMES[item.dtype],
            "shape": list(item.shape),
            "data_offsets": [offset, offset + item.size],
        }
        offset += item.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if not write:
        for item in items:
            item.data()
        return
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for item in items:
            data = item.data()
            if data.shape != item.shape or data.dtype != item.dtype:
                raise AssertionError(f"{item.name}: {data.dtype} {data.shape}, planned {item}")
            stream.write(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)
        stream.flush()
        os.fsync(stream.fileno())
