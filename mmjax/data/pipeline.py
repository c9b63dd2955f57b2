"""From records to batches: what one batch is, as a pure function of its positions."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import grain
import numpy as np

from mmjax.data.buffers import BufferPool
from mmjax.data.conversations import read_image
from mmjax.data.image import (
    PRESETS,
    CorruptImageError,
    check_loaded,
    fit,
    normalize_into,
    open_image,
)
from mmjax.data.records import BadRecordError, get_field
from mmjax.data.sources import Source
from mmjax.data.spec import DataSpec
from mmjax.data.tokenizer import Tokenizer

# How many neighbours are tried in the place of a broken record.
MAX_NEIGHBOURS = 32


class TooManyBadRecordsError(ValueError):
    """More broken records than the config allows."""


class Skipped(NamedTuple):
    """A record that was not used: `record` is its name, `error` what was wrong."""

    record: str
    error: str


@dataclass
class Batch:
    """`arrays`: image [B, H, W, 3] float32; text [B, T] int32 and text_mask [B, T] bool; label [B]
    int32, as far as configured. `ids`: names of the records. `valid` [B] bool: False for padding
    and, in evaluation, for broken records. `texts`: the captions. `truncated`: captions, or
    conversations, cut to fit.

    Of conversations, `arrays` are those of `mmjax.data.spec.conversation_fields`; where they are
    packed, `ids` names those of the first row, then those of the next, and so on. `mark`: a place
    among packed rows, see `mmjax.data.stream`.
    """

    arrays: dict[str, np.ndarray]
    ids: list[str]
    valid: np.ndarray
    texts: list[str] | None = None
    skipped: list[Skipped] = field(default_factory=list)
    truncated: int = 0
    mark: tuple[int, int] | None = None


def _draw_caption(record: dict, spec: DataSpec, name: str, rng: np.random.Generator | None) -> str:
    """The record's caption: drawn by `rng`, or the first where rng is None (evaluation)."""
    chosen = spec.text.field
    if rng is not None and spec.text.also is not None:
        others = get_field(record, spec.text.also, name)
        if rng.random() < spec.text.also_share and len(others):
            chosen = spec.text.also
    value = get_field(record, chosen, name)
    if isinstance(value, (list, tuple, np.ndarray)):
        if len(value) == 0:
            raise BadRecordError(f"the field {chosen!r} holds no caption")
        value = value[0 if rng is None else int(rng.integers(len(value)))]
    if not isinstance(value, str) or not value.strip():
        raise BadRecordError(f"the field {chosen!r} holds no caption but {value!r}")
    return value


def position_rng(seed: int, position: int) -> np.random.Generator:
    """Counter-based and keyed by the position: the same numbers wherever this runs."""
    return np.random.Generator(np.random.Philox(key=[seed, position]))


def view_rng(seed: int, position: int) -> np.random.Generator:
    """Another one for the same position: of its images' augmentation."""
    return np.random.Generator(np.random.Philox(key=[seed + (1 << 33), position]))


def read_record(source: Source, index: int) -> tuple[dict[str, Any], str]:
    """A record and its name.

    Raises:
      BadRecordError: it cannot be read.
    """
    try:
        return source[index], source.id(index)
    except OSError as error:
        raise BadRecordError(f"{type(error).__name__}: {error}") from error


class Maker:
    """Makes samples and batches of records.

    Args:
      spec: what is made of a record.
      sources: where records come from.
      tokenizer: needed where spec.text is set.
    """

    def __init__(self, spec: DataSpec, sources: Sequence[Source], tokenizer: Tokenizer | None):
        if spec.text is not None and tokenizer is None:
            raise ValueError("The data config has `text` but no tokenizer: set data.tokenizer.")
        self.spec = spec
        self.sources = list(sources)
        self.tokenizer = tokenizer
        self._pool = BufferPool()

    def check(self) -> None:
        """Looks at one record of each source, so that a wrong field fails at once, by name."""
        for source in self.sources:
            record, name = source[0], source.id(0)
            for part in (self.spec.image, self.spec.text, self.spec.label):
                if part is not None:
                    get_field(record, part.field, name)
            if self.spec.text is not None and self.spec.text.also is not None:
                get_field(record, self.spec.text.also, name)

    def empty(self, size: int) -> dict[str, np.ndarray]:
        arrays: dict[str, np.ndarray] = {}
        if self.spec.image is not None:
            side = self.spec.image.size
            arrays["image"] = self._pool.empty((size, side, side, 3))
        if self.spec.label is not None:
            arrays["label"] = np.zeros(size, np.int32)
        return arrays

    def make(
        self,
        made: Made,
        row: int,
        k: int,
        index: int,
        rng: np.random.Generator | None,
    ) -> str | None:
        """Fills one row from one record, of the k-th source; returns its caption.

        Raises:
          BadRecordError, CorruptImageError: this record cannot be used.
        """
        record, name = read_record(self.sources[k], index)
        text = None
        if self.spec.text is not None:
            text = _draw_caption(record, self.spec, name, rng)
        if self.spec.image is not None:
            data = get_field(record, self.spec.image.field, name)
            self._make_image(data, made.arrays["image"][row], k, rng)
        if self.spec.label is not None:
            label = get_field(record, self.spec.label.field, name)
            if isinstance(label, str) or label != label // 1:
                raise BadRecordError(f"its label {label!r} is not a whole number")
            made.arrays["label"][row] = label
        return text

    def _make_image(
        self, data: Any, out: np.ndarray, k: int, rng: np.random.Generator | None
    ) -> None:
        spec = self.spec.image
        augmentations = (*spec.augment, *self.spec.augment[k])
        image = open_image(read_image(data))
        if not (augmentations and augmentations[0].draws_unloaded):
            image = check_loaded(image)
        if rng is not None:
            for augmentation in augmentations:
                image = augmentation(image, rng, spec.size)
        preset = PRESETS[spec.preset]
        normalize_into(fit(image, preset, spec.size), preset, out)

    def blank(self, arrays: dict[str, np.ndarray], row: int) -> None:
        """A row that has no record."""
        for array in arrays.values():
            array[row] = 0

    def finish(self, made: Made) -> None:
        """Tokenizes the captions, and counts how many were cut."""
        if self.spec.text is None:
            return
        encoded = self.tokenizer.encode(made.texts, self.spec.text.max_len)
        made.arrays["text"], made.arrays["text_mask"] = encoded.ids, encoded.mask
        made.truncated = encoded.truncated

    def batches(
        self, order: grain.MapDataset, *, mark: tuple[int, int], **sharding: int
    ) -> TrainBatches:
        """Training batches, from the order of records. (Rows are records: no mark is needed.)"""
        del mark
        return TrainBatches(self, order, **sharding)

    def arrangement(self, batch_size: int) -> list[int] | None:
        """Numbers on which the place of a record among the rows depends: none but its position."""
        del batch_size


def record_order(lengths: Sequence[int], weights: Sequence[float], seed: int) -> grain.MapDataset:
    """Global position -> (source, record), endless: every source is shuffled anew in each of its
    epochs, and the sources interleave in proportion to their weights."""
    parts = []
    for k, length in enumerate(lengths):
        shuffle_seed = int(np.random.SeedSequence([seed, k]).generate_state(1)[0])
        part = grain.MapDataset.range(length).shuffle(seed=shuffle_seed)
        parts.append(part.repeat().map(lambda index, k=k: (k, index)))
    return parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, list(weights))


class TrainBatches:
    """Batch n of one process, n = 0, 1, ...: a random access source for grain.

    The global batch n takes the positions start + n * G ... + G - 1, and process p the p-th block
    of them: the global batch does not depend on the number of processes.
    """

    def __init__(
        self,
        maker: Maker,
        order: grain.MapDataset,
        *,
        seed: int,
        start: int,
        batch_size: int,
        process_index: int,
        process_count: int,
    ):
        self._maker = maker
        self._order = order
        self._seed = seed
        self._batch_size = batch_size
        self._first = start + process_index * batch_size
        self._stride = process_count * batch_size

    def __len__(self) -> int:
        return (sys.maxsize - self._first) // self._stride

    def __getitem__(self, n: int) -> Made:
        first = self._first + n * self._stride
        arrays = self._maker.empty(self._batch_size)
        made = Made(arrays)
        for row in range(self._batch_size):
            self._fill(made, row, first + row)
        self._maker.finish(made)
        return made.as_element()

    def _fill(self, made: Made, row: int, position: int) -> None:
        k, index = self._order[position]
        source = self._maker.sources[k]
        for step in range(min(MAX_NEIGHBOURS, len(source))):
            neighbour = (index + step) % len(source)
            try:
                rng = position_rng(self._seed, position)
                text = self._maker.make(made, row, k, neighbour, rng)
            except (BadRecordError, CorruptImageError) as error:
                made.skipped.append(Skipped(source.id(neighbour), str(error)))
                continue
            made.ids.append(source.id(neighbour))
            if text is not None:
                made.texts.append(text)
            return
        raise TooManyBadRecordsError(none_usable(made.skipped[-(step + 1) :]))


def none_usable(skipped: Sequence[Skipped]) -> str:
    """An error message for records that were tried in each other's place, in vain."""
    names = "\n".join(f"  {bad.record}: {bad.error}" for bad in skipped[-10:])
    return (
        f"{len(skipped)} records in a row cannot be used; the last of them:\n{names}\n"
        "Check the files, paths and field names of these sources and, of conversations, the limits "
        "(max_len, images, max_targets)."
    )


class EvalBatches:
    """Batch n of one process over the sources one after the other, in their order, padded at the
    end.

    Broken records keep their row, with valid = False.
    """

    def __init__(self, maker: Maker, *, batch_size: int, process_index: int, process_count: int):
        self._maker = maker
        self._batch_size = batch_size
        self._process_index = process_index
        self._stride = batch_size * process_count
        self._ends = np.cumsum([len(source) for source in maker.sources])

    def __len__(self) -> int:
        return -(-int(self._ends[-1]) // self._stride)

    def __getitem__(self, n: int) -> dict[str, Any]:
        first = n * self._stride + self._process_index * self._batch_size
        arrays = self._maker.empty(self._batch_size)
        made = Made(arrays, valid=np.zeros(self._batch_size, bool))
        for row in range(self._batch_size):
            name, text = self._fill(made, row, first + row)
            made.ids.append(name)
            made.texts.append(text)
        self._maker.finish(made)
        return made.as_element()

    def _fill(self, made: Made, row: int, position: int) -> tuple[str, str]:
        name, text = "padding", ""
        if position < self._ends[-1]:
            k = int(np.searchsorted(self._ends, position, side="right"))
            source = self._maker.sources[k]
            index = position - (int(self._ends[k - 1]) if k else 0)
            name = source.id(index)
            try:
                text = self._maker.make(made, row, k, index, None) or ""
                made.valid[row] = True
            except (BadRecordError, CorruptImageError) as error:
                made.skipped.append(Skipped(name, str(error)))
        if not made.valid[row]:
            self._maker.blank(made.arrays, row)
        return name, text


class _Notes:
    """Everything but the arrays; a class of its own, so that grain moves it between processes as
    one."""

    def __init__(self, made: Made):
        self.ids, self.texts, self.skipped = made.ids, made.texts, made.skipped
        self.truncated, self.mark = made.truncated, made.mark


@dataclass
class Made:
    """A batch in the making."""

    arrays: dict[str, np.ndarray]
    valid: np.ndarray | None = None
    ids: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    truncated: int = 0
    mark: tuple[int, int] | None = None

    def as_element(self) -> dict[str, Any]:
        """What grain carries: arrays (through shared memory) and one opaque object."""
        rows = len(next(iter(self.arrays.values())))
        valid = self.valid if self.valid is not None else np.ones(rows, bool)
        return {"arrays": self.arrays, "valid": valid, "notes": _Notes(self)}


def to_batch(element: dict[str, Any], has_text: bool) -> Batch:
    notes = element["notes"]
    return Batch(
        # Worker processes hand over a subclass of ndarray that lies in shared memory.
        arrays={name: np.asarray(array) for name, array in element["arrays"].items()},
        ids=notes.ids,
        valid=element["valid"],
        texts=notes.texts if has_text else None,
        skipped=notes.skipped,
        truncated=notes.truncated,
        mark=notes.mark,
    )
