"""Conversations as rows of tokens and pictures: one in a row, several packed, or grouped by length.

What a batch holds is a function of the seed and of its number, whatever processes, workers and
threads make it. Records are taken in the order of the mixture; those of one window are packed, or
grouped, together. What a window makes is planned without decoding an image: conversations are
drawn, rendered and encoded, and pictures counted by the sizes that the images' headers say.
"""

from __future__ import annotations

import bisect
import collections
import sys
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from mmjax.data.image import CorruptImageError
from mmjax.data.packing import group, pack
from mmjax.data.pipeline import (
    MAX_NEIGHBOURS,
    Made,
    Skipped,
    TooManyBadRecordsError,
    TrainBatches,
    none_usable,
    position_rng,
)
from mmjax.data.records import BadRecordError
from mmjax.data.samples import Drawn, Sample, SampleMaker

# Windows that are remembered; those that are needed again are made again.
_REMEMBERED = 16


class ConversationMaker(SampleMaker):
    """A `Maker` of conversations: see `SampleMaker`."""

    def make(
        self, made: Made, row: int, k: int, index: int, rng: np.random.Generator | None
    ) -> None:
        """Fills one row from one record, of the k-th source.

        Raises:
          BadRecordError, CorruptImageError: this record cannot be used.
        """
        sample = self.encode(self.draw(k, index, rng), (k, index, None))
        self.write(made.arrays, row, [(sample, self.pictures(sample, rng=rng))])
        made.truncated += sample.cut

    def finish(self, made: Made) -> None:
        pass

    def batches(
        self, order: grain.MapDataset, *, mark: tuple[int, int], **sharding: int
    ) -> TrainBatches | PackedBatches | GroupedBatches:
        if self._said.pack:
            return PackedBatches(self, order, mark=mark, **sharding)
        if self._said.lengths:
            return GroupedBatches(self, order, **sharding)
        return TrainBatches(self, order, **sharding)

    def arrangement(self, batch_size: int) -> list[int] | None:
        """Numbers on which the place of a record among the rows depends; `batch_size` over all
        processes."""
        said = self._said
        if said.pack:
            return [said.window, *self.limits]
        return [said.window, batch_size, *said.lengths] if said.lengths else None


class Window(NamedTuple):
    """What the records of a window make: rows of samples."""

    rows: list[list[Sample]]
    skipped: list[Skipped]


class _Windows:
    """Windows by number, made when they are asked for."""

    def __init__(self, maker: SampleMaker, order: grain.MapDataset, seed: int, size: int):
        self._arguments = (maker, order, seed, size)
        self.maker, self._order, self._seed, self._size = self._arguments
        self._made: collections.OrderedDict[int, Window] = collections.OrderedDict()
        self._lock = threading.RLock()

    def __reduce__(self):
        return (type(self), self._arguments)

    def __getitem__(self, number: int) -> Window:
        # Threads that make one batch each mostly want the same window.
        with self._lock:
            if number not in self._made:
                self._made[number] = self._make(number)
            self._made.move_to_end(number)
            while len(self._made) > _REMEMBERED:
                self._made.popitem(last=False)
            return self._made[number]

    def rng(self, number: int) -> np.random.Generator:
        # Beside the keys of positions, which begin with the seed itself.
        return np.random.Generator(np.random.Philox(key=[self._seed + (1 << 32), number]))

    def _make(self, number: int) -> Window:
        raise NotImplementedError

    def _samples(
        self, places: Sequence[tuple[int, int, int]], skipped: list[Skipped]
    ) -> list[Sample | None]:
        """The samples of (source, index, position); None for those that cannot be used."""
        maker = self.maker
        drawn: list[Drawn | None] = []
        for k, index, position in places:
            try:
                drawn.append(maker.draw(k, index, position_rng(self._seed, position)))
            except (BadRecordError, CorruptImageError) as error:
                skipped.append(Skipped(maker.sources[k].id(index), str(error)))
                drawn.append(None)
        maker.learn(one for one in drawn if one is not None)
        samples: list[Sample | None] = []
        for one, place in zip(drawn, places, strict=True):
            sample = None
            if one is not None:
                try:
                    # The images of a whole window might not fit into memory.
                    sample = maker.encode(one, place)._replace(images=None)
                except (BadRecordError, CorruptImageError) as error:
                    skipped.append(Skipped(one.name, str(error)))
            samples.append(sample)
        return samples

    def _places(self, number: int) -> list[tuple[int, int, int]]:
        positions = range(number * self._size, (number + 1) * self._size)
        return [(*self._order[position], position) for position in positions]


class _PackedWindows(_Windows):
    """Rows of packed samples, those of the windows one after the other.

    Args:
      mark: a window and the number of its first row, to begin with.
    """

    def __init__(
        self,
        maker: SampleMaker,
        order: grain.MapDataset,
        seed: int,
        size: int,
        mark: tuple[int, int],
    ):
        super().__init__(maker, order, seed, size)
        self._arguments = (*self._arguments, mark)
        self._first_window = mark[0]
        # The first row of each window from there on, as far as is known.
        self._first_rows = [mark[1]]

    def find(self, row: int) -> tuple[int, int]:
        """The window of a row, and the number of the window's first row."""
        with self._lock:
            while self._first_rows[-1] <= row:
                number = self._first_window + len(self._first_rows) - 1
                self._first_rows.append(self._first_rows[-1] + len(self[number].rows))
            place = bisect.bisect_right(self._first_rows, row) - 1
            return self._first_window + place, self._first_rows[place]

    def _make(self, number: int) -> Window:
        skipped: list[Skipped] = []
        samples = [one for one in self._samples(self._places(number), skipped) if one is not None]
        if not samples:
            raise TooManyBadRecordsError(none_usable(skipped))
        rows = pack([sample.size for sample in samples], self.maker.limits)
        order = self.rng(number).permutation(len(rows))
        return Window([[samples[i] for i in rows[row]] for row in order], skipped)


class _GroupedWindows(_Windows):
    """Rows of one sample each, as many as the window has records: neighbours stand in for those
    that cannot be used. Batch by batch they are of similar length, the batches in any order.

    Args:
      batch_size: rows of all processes.
    """

    def __init__(
        self,
        maker: SampleMaker,
        order: grain.MapDataset,
        seed: int,
        size: int,
        batch_size: int,
    ):
        super().__init__(maker, order, seed, size)
        self._arguments = (*self._arguments, batch_size)
        self._batch_size = batch_size

    def _make(self, number: int) -> Window:
        skipped: list[Skipped] = []
        places = self._places(number)
        samples = self._samples(places, skipped)
        for i, (k, index, position) in enumerate(places):
            length = len(self.maker.sources[k])
            for step in range(1, min(MAX_NEIGHBOURS, length)):
                if samples[i] is not None:
                    break
                neighbour = (k, (index + step) % length, position)
                samples[i] = self._samples([neighbour], skipped)[0]
            if samples[i] is None:
                raise TooManyBadRecordsError(none_usable(skipped))
        batches = group([len(sample.tokens) for sample in samples], self._batch_size)
        order = self.rng(number).permutation(len(batches))
        return Window([[samples[i]] for batch in order for i in batches[batch]], skipped)


class PackedBatches:
    """Batch n of one process, n = 0, 1, ...: a random access source for grain.

    The global batch n takes the rows start + n * G ... + G - 1, and process p the p-th block of
    them. To find a row is to plan the windows before it, from `mark` on: each batch brings the mark
    of its own first row, for whoever starts at a later one.
    """

    def __init__(
        self,
        maker: SampleMaker,
        order: grain.MapDataset,
        *,
        seed: int,
        start: int,
        mark: tuple[int, int],
        batch_size: int,
        process_index: int,
        process_count: int,
    ):
        self._maker, self._seed = maker, seed
        self._windows = _PackedWindows(maker, order, seed, maker.spec.conversation.window, mark)
        self._batch_size = batch_size
        self._start = start
        self._block = process_index * batch_size
        self._stride = process_count * batch_size

    def __len__(self) -> int:
        return (sys.maxsize - self._start) // self._stride

    def __getitem__(self, n: int) -> dict[str, Any]:
        start = self._start + n * self._stride
        made = Made(self._maker.empty(self._batch_size), mark=self._windows.find(start))
        for row in range(self._batch_size):
            number, first = self._windows.find(start + self._block + row)
            window = self._windows[number]
            place = start + self._block + row - first
            if place == 0:
                made.skipped += window.skipped
            _fill(self._maker, made, row, window.rows[place], self._seed)
        return made.as_element()


class GroupedBatches:
    """Batch n of one process: samples of similar length, one in a row, and rows of the shortest
    length that holds them all (those of the other processes too).

    A window makes a whole number of batches, so that batch n is found at once.
    """

    def __init__(
        self,
        maker: SampleMaker,
        order: grain.MapDataset,
        *,
        seed: int,
        start: int,
        batch_size: int,
        process_index: int,
        process_count: int,
    ):
        self._maker, self._seed = maker, seed
        self._stride = process_count * batch_size
        self._per_window = max(1, maker.spec.conversation.window // self._stride)
        size = self._per_window * self._stride
        self._windows = _GroupedWindows(maker, order, seed, size, self._stride)
        self._batch_size = batch_size
        self._block = process_index * batch_size
        self._start = start // self._stride

    def __len__(self) -> int:
        return sys.maxsize // self._stride - self._start

    def __getitem__(self, n: int) -> dict[str, Any]:
        number, place = divmod(self._start + n, self._per_window)
        window = self._windows[number]
        rows = window.rows[place * self._stride : (place + 1) * self._stride]
        longest = max(len(sample.tokens) for row in rows for sample in row)
        lengths = self._maker.spec.conversation.lengths
        length = next(length for length in lengths if length >= longest)
        made = Made(self._maker.empty(self._batch_size, length))
        if place == 0 and self._block == 0:
            made.skipped += window.skipped
        for row, samples in enumerate(rows[self._block : self._block + self._batch_size]):
            _fill(self._maker, made, row, samples, self._seed)
        return made.as_element()


def _fill(maker: SampleMaker, made: Made, row: int, samples: Sequence[Sample], seed: int) -> None:
    """A row of planned samples, without those whose images turn out to be broken."""
    good = []
    for sample in samples:
        try:
            good.append((sample, maker.pictures(sample, seed)))
        except (BadRecordError, CorruptImageError) as error:
            made.skipped.append(Skipped(sample.name, str(error)))
            continue
        made.ids.append(sample.name)
        made.truncated += sample.cut
    maker.write(made.arrays, row, good)
