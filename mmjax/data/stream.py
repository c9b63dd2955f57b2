"""Conversations as rows of tokens and pictures: one in a row, several packed, or grouped by length.

What a batch holds is a function of the seed and of its number, whatever processes, workers and
threads make it. Records are taken in the order of the mixture; those of one window are packed, or
grouped, together. What a window makes is planned without decoding an image: conversations are
drawn, rendered and encoded, and pictures counted by the sizes that the images' headers say.
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import sys
import threading
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from PIL import Image

from mmjax.data.buffers import BufferPool
from mmjax.data.chat import TEMPLATES, ChatTokenizer, Picture, Piece
from mmjax.data.conversations import Conversation, read_image, upright_size
from mmjax.data.image import CorruptImageError, decode
from mmjax.data.packing import group, pack
from mmjax.data.pipeline import (
    MAX_NEIGHBOURS,
    Made,
    Skipped,
    TooManyBadRecordsError,
    TrainBatches,
    position_rng,
    read_record,
    view_rng,
)
from mmjax.data.records import BadRecordError
from mmjax.data.sources import Source
from mmjax.data.spec import DataSpec, conversation_fields
from mmjax.data.tokenizer import Tokenizer
from mmjax.data.visual import TEXT, Plan, visual_tokens

# Windows that are remembered; those that are needed again are made again.
_REMEMBERED = 16


class Drawn(NamedTuple):
    """A record's conversation, rendered."""

    name: str
    conversation: Conversation
    pieces: list[Piece]


class Sample(NamedTuple):
    """A conversation, encoded: `learnt`, and `place` of the visual tokens of its own pictures.
    `record` says where it is from: source, index and position. `images` None: to be read again.
    `branch`, of questions that are asked apart: 0 where they share tokens, else their number.
    `answer`: what the decoder learns, if there is one; then nothing else is learnt.
    """

    name: str
    record: tuple[int, int, int | None]
    tokens: np.ndarray
    learnt: np.ndarray
    place: np.ndarray
    pictures: int
    images: tuple[Any, ...] | None
    cut: bool
    branch: np.ndarray
    answer: np.ndarray | None = None

    @property
    def size(self) -> tuple[int, int, int]:
        """(tokens, pictures, supervised tokens)"""
        targets = int(self.learnt.sum()) if self.answer is None else len(self.answer)
        return len(self.tokens), self.pictures, targets

    @property
    def prompt(self) -> int:
        """How many tokens come before the first that is learnt."""
        return int(self.learnt.argmax()) if self.answer is None else len(self.tokens)

    def after(self, count: int) -> Sample:
        """Without its first tokens."""
        return self._replace(
            tokens=self.tokens[count:],
            learnt=self.learnt[count:],
            place=self.place[count:],
            branch=self.branch[count:],
        )


class ConversationMaker:
    """Makes samples, rows and batches of conversations.

    Args:
      spec: what is made of a record; `spec.conversation` is set.
      sources: where records come from, each with its form of `spec.forms`.
      tokenizer: of the run.

    Raises:
      ValueError: no tokenizer, or one that lacks a special token of the template.
    """

    def __init__(self, spec: DataSpec, sources: Sequence[Source], tokenizer: Tokenizer | None):
        if tokenizer is None:
            raise ValueError("The data config has `conversation`: set data.tokenizer.")
        self.spec = spec
        self.sources = list(sources)
        self._said = spec.conversation
        self._template = TEMPLATES[self._said.template]
        self._chat = ChatTokenizer(tokenizer)
        self._chat.check(self._template, self._said.template)
        self._pad = tokenizer.pad_id or 0
        self._pool = BufferPool()
        # How many tokens a stream begins with.
        self.begin = sum(len(self._chat.encode(piece)) for piece in self._template.beginning())
        # Of a row, as `Sample.size` has it.
        self.limits = (self._said.max_len, self._said.images, self._said.most_targets)

    def check(self) -> None:
        """Looks at one record of each source, so that a wrong field fails at once, by name."""
        for k in range(len(self.sources)):
            # A bad record is counted like any other when its turn comes.
            with contextlib.suppress(BadRecordError):
                self.draw(k, 0, None)

    # --- samples

    def draw(self, k: int, index: int, rng: np.random.Generator | None) -> Drawn:
        """The conversation of a record.

        Raises:
          BadRecordError: this record cannot be used.
        """
        record, name = read_record(self.sources[k], index)
        conversation = self.spec.forms[k](record, name, rng)
        if conversation.apart and not self._said.parents:
            raise ValueError(
                "Questions that are asked apart share the tokens of their image, which batches say "
                "with parents: set data conversation.parents=True."
            )
        if conversation.apart and self._template.silent:
            raise ValueError(
                "Questions that are asked apart need a template that says them, and "
                f"{self._said.template!r} leaves them out: set another data conversation.template."
            )
        if conversation.apart and self._said.document > 1:
            raise ValueError(
                "Questions that are asked apart stand in no order, and those of a document do: set "
                "apart=False in the form, or data conversation.document=1."
            )
        return Drawn(name, conversation, self.render(conversation))

    def render(self, conversation: Conversation) -> list[Piece]:
        return [
            piece
            for one in conversation.split()
            for piece in self._template.render(one, self._said.system)
        ]

    def learn(self, drawn: Iterable[Drawn]) -> None:
        """Encodes the texts of many conversations at once, to be remembered."""
        self._chat.learn(piece for one in drawn for piece in one.pieces)

    def encode(self, drawn: Drawn, record: tuple[int, int, int | None]) -> Sample:
        """The sample of a conversation, cut if that is allowed and needed.

        Raises:
          BadRecordError, CorruptImageError: an image that is missing or broken, or a conversation
            that does not fit.
        """
        conversation, pieces = drawn.conversation, drawn.pieces
        while True:
            sample = self._sample(drawn.name, record, conversation, pieces)
            if self._said.seq2seq is not None:
                sample = self._for_decoder(sample)
            problem = self._problem(sample)
            if problem is None:
                return sample._replace(cut=len(conversation.turns) < len(drawn.conversation.turns))
            if self._said.too_long == "skip" or len(conversation.turns) < 4:
                raise BadRecordError(problem)
            conversation = conversation.shortened()
            pieces = self.render(conversation)

    def _problem(self, sample: Sample) -> str | None:
        size, limits = sample.size, self.limits
        if not size[2]:
            return "nothing to supervise: the answer is its first token"
        if size[0] > limits[0]:
            return f"too long: {size[0]} tokens, and conversation.max_len is {limits[0]}"
        if size[1] > limits[1]:
            return f"too many pictures: {size[1]}, and conversation.images is {limits[1]}"
        if size[2] > limits[2]:
            return f"too long: {size[2]} supervised tokens, and a row may have {limits[2]}"
        return None

    def _sample(
        self,
        name: str,
        record: tuple[int, int, int | None],
        conversation: Conversation,
        pieces: Sequence[Piece],
    ) -> Sample:
        if not conversation.apart:
            return self._assemble(name, record, conversation, pieces)
        first, *others = (
            self._assemble(name, record, one, self.render(one)) for one in conversation.split()
        )
        # What comes up to the last visual token is the same for all of them.
        shared = int(np.flatnonzero(first.place != TEXT)[-1]) + 1 if first.pictures else 0
        branches = [first, *(other.after(shared) for other in others)]
        numbers = np.repeat(np.arange(1, len(branches) + 1), [len(one.tokens) for one in branches])
        numbers[:shared] = 0
        return first._replace(
            tokens=np.concatenate([one.tokens for one in branches]),
            learnt=np.concatenate([one.learnt for one in branches]),
            place=np.concatenate([one.place for one in branches]),
            branch=numbers.astype(np.int32),
        )

    def _for_decoder(self, sample: Sample) -> Sample:
        """The prompt is the encoder's, the answer the decoder's.

        Raises:
          BadRecordError: there are several answers.
        """
        begin, count = int(sample.learnt.argmax()), int(sample.learnt.sum())
        if not sample.learnt[begin : begin + count].all():
            raise BadRecordError("several answers: an encoder-decoder (seq2seq) learns one")
        end = self._chat.end
        place = np.concatenate([sample.place[:begin], np.full(len(end), TEXT, np.int32)])
        return sample._replace(
            tokens=np.concatenate([sample.tokens[:begin], end]),
            learnt=np.zeros(len(place), bool),
            place=place,
            branch=np.zeros(len(place), np.int32),
            answer=sample.tokens[begin : begin + count],
        )

    def _assemble(
        self,
        name: str,
        record: tuple[int, int, int | None],
        conversation: Conversation,
        pieces: Sequence[Piece],
    ) -> Sample:
        parts: list[tuple[np.ndarray, bool]] = []
        visual: list[tuple[int, np.ndarray]] = []
        length = pictures = 0
        for piece in pieces:
            if not isinstance(piece.part, Picture):
                parts.append((self._chat.encode(piece), piece.learnt))
                length += len(parts[-1][0])
                continue
            plan = self._plan(conversation.images[piece.part])
            learnt = piece.learnt and self._said.layout.drawn is not None
            plan = self._said.layout.drawn if learnt else plan
            for some in plan.pieces:
                if isinstance(some, str):
                    ids = self._chat.markers(some)
                else:
                    ids = np.full(len(some), self._said.image_token, np.int32)
                    before = visual_tokens(self._said.layout, pictures)
                    visual.append((length, _moved(some, before)))
                parts.append((ids, learnt))
                length += len(ids)
            pictures += plan.pictures
        ids, flags = zip(*parts, strict=True)
        learnt = np.repeat(flags, [len(some) for some in ids])
        learnt[0] = False  # nothing comes before it that it could be predicted from
        place = np.full(length, TEXT, np.int32)
        for at, places in visual:
            place[at : at + len(places)] = places
        # Nothing is learnt from what a template puts after the last answer.
        useful = np.flatnonzero(learnt | (place != TEXT))
        end = int(useful[-1]) + 1 if useful.size else length
        return Sample(
            name=name,
            record=record,
            tokens=np.concatenate(ids)[:end],
            learnt=learnt[:end],
            place=place[:end],
            pictures=pictures,
            images=conversation.images,
            cut=False,
            branch=np.zeros(end, np.int32),
        )

    def _plan(self, image: Any) -> Plan:
        if self._said.layout is None:
            raise BadRecordError("it has an image, but data conversation has no layout")
        return self._said.layout.plan(*upright_size(image))

    def pictures(
        self, sample: Sample, seed: int | None = None, rng: np.random.Generator | None = None
    ) -> list[np.ndarray]:
        """The pictures of a sample's images, each [pictures, H, W, 3] float32.

        Args:
          seed: of the run, where the sample has a position.
          rng: of its augmentation, where it has none; None: as in evaluation, the images as they
            are.

        Raises:
          BadRecordError, CorruptImageError: an image is missing or broken.
        """
        if not sample.pictures:
            return []
        images = sample.images
        k, index, position = sample.record
        if position is not None:
            rng = view_rng(seed, position)
        if images is None:
            record, name = read_record(self.sources[k], index)
            images = self.spec.forms[k](record, name, position_rng(seed, position)).images
        made = [self._said.layout.pictures(self._seen(image, k, rng)) for image in images]
        if sum(map(len, made)) != sample.pictures:
            raise BadRecordError("an image has another size than its header says")
        return made

    def _seen(self, image: Any, k: int, rng: np.random.Generator | None) -> Image.Image:
        """An image of the k-th source, decoded and, in training, augmented."""
        seen = decode(read_image(image))
        if rng is not None:
            for augmentation in self.spec.augment[k]:
                seen = augmentation(seen, rng, self._said.layout.size)
        return seen

    def learnt(self, pieces: Iterable[Piece]) -> np.ndarray:
        """The ids of what is learnt of a rendered conversation, pictures apart."""
        words = (piece for piece in pieces if piece.learnt and not isinstance(piece.part, Picture))
        return np.concatenate([self._chat.encode(piece) for piece in words])

    # --- rows

    def empty(self, size: int, length: int | None = None) -> dict[str, np.ndarray]:
        fields = conversation_fields(self._said, size, length or self._said.max_len)
        arrays = {
            name: self._pool.empty(shape) if name == "images" else np.zeros(shape, dtype)
            for name, (shape, dtype) in fields.items()
        }
        arrays["tokens"][:] = self._pad
        arrays["place"][:] = TEXT
        if self._said.seq2seq is not None:
            arrays["decoder_tokens"][:] = self._pad
            arrays["decoder_tokens"][:, 0] = self._said.seq2seq.start
        return arrays

    def write(
        self,
        arrays: dict[str, np.ndarray],
        row: int,
        samples: Sequence[tuple[Sample, Sequence[np.ndarray]]],
    ) -> None:
        """Fills one row, fresh from `empty`, with samples and their pictures."""
        at = seen = branches = 0
        segment = 1
        for number, (sample, pictures) in enumerate(samples):
            if number % self._said.document:
                sample = sample.after(self.begin)  # a stream begins once
            elif number:
                segment += 1 + branches
            branches = int(sample.branch.max())
            here = slice(at, at + len(sample.tokens))
            weight = self.spec.loss_weights[sample.record[0]]
            arrays["tokens"][row, here] = sample.tokens
            if sample.answer is None:
                arrays["weights"][row, here] = weight * sample.learnt
            else:
                arrays["decoder_tokens"][row, 1 : 1 + len(sample.answer)] = sample.answer
                arrays["weights"][row, 1 : 1 + len(sample.answer)] = weight
            arrays["place"][row, here] = _moved(
                sample.place, visual_tokens(self._said.layout, seen)
            )
            arrays["segments"][row, here] = segment + sample.branch
            if self._said.parents:
                arrays["parents"][row, here] = np.where(sample.branch > 0, segment, 0)
            if self._said.prefix:
                arrays["prefix"][row, at : at + sample.prompt] = True
            for several in pictures:
                arrays["images"][row, seen : seen + len(several)] = several
                seen += len(several)
            at = here.stop
        if "images" in arrays:
            arrays["images"][row, seen:] = 0

    def blank(self, arrays: dict[str, np.ndarray], row: int) -> None:
        self.write(arrays, row, [])

    # --- as `Maker`

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


def _moved(place: np.ndarray, by: int) -> np.ndarray:
    """Places of visual tokens after others; what is no visual token's stays."""
    return np.where(place >= 0, place + by, place) if by else place


class Window(NamedTuple):
    """What the records of a window make: rows of samples."""

    rows: list[list[Sample]]
    skipped: list[Skipped]


class _Windows:
    """Windows by number, made when they are asked for."""

    def __init__(self, maker: ConversationMaker, order: grain.MapDataset, seed: int, size: int):
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
        maker: ConversationMaker,
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
            raise TooManyBadRecordsError(_none_usable(skipped))
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
        maker: ConversationMaker,
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
                raise TooManyBadRecordsError(_none_usable(skipped))
        batches = group([len(sample.tokens) for sample in samples], self._batch_size)
        order = self.rng(number).permutation(len(batches))
        return Window([[samples[i]] for batch in order for i in batches[batch]], skipped)


def _none_usable(skipped: Sequence[Skipped]) -> str:
    names = "\n".join(f"  {bad.record}: {bad.error}" for bad in skipped[-10:])
    return (
        f"{len(skipped)} records in a row cannot be used; the last of them:\n{names}\n"
        "Check the paths and the field names of these sources, and the limits of "
        "data conversation (max_len, images, max_targets)."
    )


class PackedBatches:
    """Batch n of one process, n = 0, 1, ...: a random access source for grain.

    The global batch n takes the rows start + n * G ... + G - 1, and process p the p-th block of
    them. To find a row is to plan the windows before it, from `mark` on: each batch brings the mark
    of its own first row, for whoever starts at a later one.
    """

    def __init__(
        self,
        maker: ConversationMaker,
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
        maker: ConversationMaker,
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


def _fill(
    maker: ConversationMaker, made: Made, row: int, samples: Sequence[Sample], seed: int
) -> None:
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
