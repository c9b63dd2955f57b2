"""Batches for training (endless, shuffled, resumable) and for evaluation (in order, padded)."""

from __future__ import annotations

import functools
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import grain
from absl import flags

from mmjax.data.pipeline import (
    Batch,
    EvalBatches,
    Maker,
    Skipped,
    TooManyBadRecordsError,
    record_order,
    to_batch,
)
from mmjax.data.samples import LARGER
from mmjax.data.sources import Source, open_source
from mmjax.data.spec import DataSpec, LoadingSpec, call_strictly, parse, plain
from mmjax.data.stream import ConversationMaker
from mmjax.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)

STATE_VERSION = 1
# Seconds a worker outlives SIGTERM: a cluster signals the whole group, and the trainer still saves.
_GRACE = 60.0


def _prepare_worker(parent: int, index: int, count: int) -> None:
    """Runs first in each worker process (grain spawns them: nothing is inherited by fork)."""
    del index, count
    # Should anything in a worker touch JAX, it must not take the accelerator of the trainer.
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_platforms", "cpu")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def leave_later(*_):
        timer = threading.Timer(_GRACE, os._exit, (0,))
        timer.daemon = True
        timer.start()

    signal.signal(signal.SIGTERM, leave_later)

    def leave_with_parent():
        # A trainer killed by SIGKILL cannot stop its workers.
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _start(batches: Any, loading: LoadingSpec) -> grain.DatasetIterator:
    """An iterator over `batches` that works ahead, in threads or in processes."""
    dataset = grain.MapDataset.source(batches)
    if loading.workers == 0:
        ahead = max(loading.prefetch, loading.threads) if loading.threads else 0
        options = grain.ReadOptions(num_threads=loading.threads, prefetch_buffer_size=ahead)
        return iter(dataset.to_iter_dataset(options))
    if not flags.FLAGS.is_parsed():
        # grain reads absl flags of its own; outside absl's app.run nobody has parsed any.
        flags.FLAGS.mark_as_parsed()
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    processes = grain.MultiprocessingOptions(
        num_workers=loading.workers,
        per_worker_buffer_size=max(1, loading.prefetch // loading.workers),
    )
    worker_init = functools.partial(_prepare_worker, os.getpid())
    return iter(dataset.to_iter_dataset(options).mp_prefetch(processes, worker_init_fn=worker_init))


class Watch:
    """Stops a run with too many broken records.

    The share is taken over at least 1,000 samples, or one epoch where that is less, so that a
    single broken image at the start of a run does not end it.

    Args:
      max_share: of broken records.
      epoch: samples of one.
      spare: whether records that are whole but larger than a row (`too_long` of `ConversationSpec`)
        are counted apart, and do not stop the run: training has others, but a score without them
        would be the score of other data. If they are more than `max_share`, a warning says so.
    """

    def __init__(self, max_share: float, epoch: int, spare: bool = False):
        self._max_share = max_share
        self._least = min(1000, epoch)
        self._spare = spare
        self._seen = 0
        self._bad = 0
        self._errors: dict[str, str] = {}
        self._warned = False
        # How many records were larger than a row, where those are counted apart.
        self.larger = 0

    def see(self, samples: int, skipped: Sequence[Skipped]) -> None:
        """So many good samples, and these bad ones."""
        self._seen += samples
        for bad in skipped:
            if self._spare and bad.error.startswith(LARGER):
                self.larger += 1
                continue
            self._bad += 1
            if len(self._errors) < 50:
                self._errors.setdefault(bad.record, bad.error)
        allowed = self._max_share * max(self._seen, self._least)
        if self._bad > allowed:
            names = "\n".join(f"  {name}: {error}" for name, error in self._errors.items())
            raise TooManyBadRecordsError(
                f"{self._bad} broken records among {self._seen} samples are more than the "
                f"{self._max_share:.2%} that data.max_bad_share allows. Repair or remove them, or "
                f"raise data.max_bad_share:\n{names}"
            )
        if self.larger > allowed and not self._warned:
            self._warned = True
            log.warning(
                "%d records beside %d samples were left out because they are larger than a row. "
                "To use more of them, set data conversation.too_long='cut', or raise its max_len, "
                "images or max_targets.",
                self.larger,
                self._seen,
            )


class Loader(Iterator[Batch]):
    """Endless training batches; made by `open_train`.

    The state is the global position, in rows over all processes, after the last *returned* batch.
    It holds for any number of processes, workers and threads; a broken record is replaced by its
    next good neighbour and so shifts nothing. (Where conversations are packed, it is left out, the
    same everywhere; and the state has a mark besides, so that what came before is not planned
    again.)
    """

    def __init__(
        self,
        maker: Maker | ConversationMaker,
        weights: list[float],
        loading: LoadingSpec,
        *,
        batch_size: int,
        seed: int,
        process_index: int,
        process_count: int,
    ):
        self._maker = maker
        self._loading = loading
        self._seed = seed
        self._batch_size = batch_size
        self._process_index = process_index
        self._process_count = process_count
        self._lengths = [len(source) for source in maker.sources]
        self._weights = weights
        self._order = record_order(self._lengths, weights, seed)
        _ = self._order[0]  # grain sets up its bookkeeping here, before there are threads
        self._rows = batch_size * process_count
        self._position = 0
        self._mark = (0, 0)
        self._iterator: grain.DatasetIterator | None = None
        self._watch = Watch(loading.max_bad_share, self.samples_per_epoch, spare=True)

    @property
    def samples_per_epoch(self) -> int:
        """Records of all sources together."""
        return sum(self._lengths)

    @property
    def larger(self) -> int:
        """How many records were left out because they are larger than a row."""
        return self._watch.larger

    @property
    def steps_per_epoch(self) -> int:
        """Steps that draw as many samples as the sources hold together, rounded down; fewer do
        where conversations are packed."""
        return self.samples_per_epoch // (self._batch_size * self._process_count)

    def __next__(self) -> Batch:
        if self._iterator is None:
            batches = self._maker.batches(
                self._order,
                seed=self._seed,
                start=self._position,
                mark=self._mark,
                batch_size=self._batch_size,
                process_index=self._process_index,
                process_count=self._process_count,
            )
            self._iterator = _start(batches, self._loading)
        batch = to_batch(next(self._iterator), self._maker.spec.text is not None)
        self._watch.see(len(batch.ids), batch.skipped)
        self._position += self._rows
        self._mark = batch.mark or self._mark
        return batch

    def get_state(self) -> dict[str, Any]:
        """JSON-able; the same on every process."""
        return {
            "version": STATE_VERSION,
            "position": self._position,
            "seed": self._seed,
            "lengths": list(self._lengths),
            "weights": list(self._weights),
            "arrangement": self._maker.arrangement(self._rows),
            "mark": list(self._mark),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """The next batch is the one that followed when the state was taken.

        Raises:
          ValueError: the state belongs to another seed or to other data.
        """
        own = self.get_state()
        different = [
            f"{key}: saved {state.get(key)}, now {own[key]}"
            for key in own
            if key not in ("position", "mark") and state.get(key) != own[key]
        ]
        if different:
            raise ValueError(
                "The data position was saved with another data set or seed, so the order would not "
                f"go on where it stopped ({'; '.join(different)}). Restore the data as it was, or "
                "start a new workdir."
            )
        self.close()
        self._position = int(state["position"])
        self._mark = tuple(state.get("mark", (0, 0)))

    def close(self) -> None:
        """Ends threads and worker processes; `next` starts them again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


def _maker(
    spec: DataSpec, sources: list[Source], tokenizer: Tokenizer | None
) -> Maker | ConversationMaker:
    kind = Maker if spec.conversation is None else ConversationMaker
    maker = kind(spec, sources, tokenizer)
    maker.check()
    return maker


def open_train(
    data_config: Any,
    tokenizer: Tokenizer | None,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Loader:
    """Opens `config.data` for training.

    Args:
      data_config: `config.data`: `train` (a data stream, see `mmjax.data.spec`), `workers`,
      `threads`,
        `prefetch`, `max_bad_share`; `tokenizer` is not looked at here.
      tokenizer: from `build_tokenizer`.
      batch_size: rows per process.
      seed: of order and augmentation, 0 <= seed < 2**32.
      process_index, process_count: this process among those that train together.

    Raises:
      ValueError: unknown names or fields, nothing to read, or fewer records than one global batch.
    """
    config = plain(data_config)
    if "train" not in config:
        raise ValueError(f"config.data needs `train`; it has {sorted(config)}.")
    settings = {key: value for key, value in config.items() if key not in ("train", "tokenizer")}
    loading = call_strictly("config.data", LoadingSpec, settings)
    if not 0 <= seed < 2**32:
        raise ValueError(f"The seed {seed} must be in [0, 2**32).")
    spec = parse(config["train"])
    opened = [open_source(source) for source in spec.sources]
    maker = _maker(spec, [source for source, _ in opened], tokenizer)
    total = sum(len(source) for source in maker.sources)
    if total < batch_size * process_count:
        raise ValueError(
            f"The training data holds {total} records, fewer than one batch of "
            f"{batch_size * process_count}: lower train.batch_size or add data."
        )
    return Loader(
        maker,
        [weight for _, weight in opened],
        loading,
        batch_size=batch_size,
        seed=seed,
        process_index=process_index,
        process_count=process_count,
    )


class EvalLoader:
    """One pass over the data, as often as it is iterated; made by `open_eval`."""

    def __init__(self, maker: Maker | ConversationMaker, loading: LoadingSpec, **sharding: int):
        self._batches = EvalBatches(maker, **sharding)
        self._loading = loading
        self._maker = maker
        self.num_examples = sum(len(source) for source in maker.sources)

    def __len__(self) -> int:
        """Batches, the same number on every process."""
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        watch = Watch(self._loading.max_bad_share, self.num_examples)
        iterator = _start(self._batches, self._loading)
        try:
            for element in iterator:
                batch = to_batch(element, self._maker.spec.text is not None)
                watch.see(len(batch.ids), batch.skipped)
                yield batch
        finally:
            iterator.close()


def open_eval(
    data_config: Any,
    tokenizer: Tokenizer | None,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    loading: Any = None,
) -> EvalLoader:
    """Opens one data stream (a mapping such as `config.data.train`) for evaluation: each record
    once, in order, without augmentation; first captions; the last batch padded (`valid` False).

    Args:
      batch_size: rows per process.
      loading: `dict(workers=, threads=, prefetch=, max_bad_share=)`; None: the defaults.

    Raises:
      ValueError: as `open_train`; also where `augment` is not empty.
    """
    spec = parse(data_config)
    if spec.image is not None and (spec.image.augment or any(spec.augment)):
        raise ValueError(
            "Evaluation data take no augmentation: set image.augment = [], and none of a source."
        )
    settings = call_strictly("loading", LoadingSpec, plain(loading) if loading is not None else {})
    maker = _maker(spec, [open_source(source)[0] for source in spec.sources], tokenizer)
    sharding = {"process_index": process_index, "process_count": process_count}
    return EvalLoader(maker, settings, batch_size=batch_size, **sharding)
