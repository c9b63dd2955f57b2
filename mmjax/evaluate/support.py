"""The support set of few-shot prompts: questions with their answers, and prompts made of them.

Records are read when they are needed, and images are decoded when their prompt is asked, so that a
support set may be as large as a training set: what is held of it are numbers, names and digests.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mmjax.data.chat import AFTER, TEMPLATES, ChatTokenizer, Piece
from mmjax.data.conversations import Asked, Conversation, Turn, read_image, upright_size
from mmjax.data.forms import Questioning
from mmjax.data.image import CorruptImageError, decode
from mmjax.data.loader import Watch
from mmjax.data.pipeline import Skipped, read_record
from mmjax.data.questions import Question
from mmjax.data.records import BadRecordError
from mmjax.data.samples import Drawn, Sample, SampleMaker
from mmjax.data.sources import open_source
from mmjax.data.spec import ConversationSpec, DataSpec, LoadingSpec, parse
from mmjax.data.tokenizer import Tokenizer
from mmjax.data.visual import visual_tokens
from mmjax.evaluate.lazy_images import Images, LazyImages, join

log = logging.getLogger(__name__)

# Beside the seed of the examples, so that they are not those that `limit` asks.
_POOL = 1
# Decoded images of examples that are kept while prompts are asked, in bytes.
_KEPT = 2**30
# Prompts are as long as they are: the model has the only limit.
_ANY = 2**30


class Entry(NamedTuple):
    """What a question is known by: the name of its record, and a digest of its image as the source
    has it ("" without an image)."""

    record: str
    image: str


class Seen(NamedTuple):
    """The image of a question: as the model takes it, and as the source has it (encoded, or
    pixels). `name` is the same for equal images."""

    name: str
    images: Images
    source: Callable[[], Any]


class Support:
    """Examples by number, from 0; made by `open_support`.

    Args:
      records: where they are from.
      rows: of each example, its record and the number of its question there.
      writer: of prompts.
    """

    def __init__(self, records: Records, rows: Sequence[tuple[int, int]], writer: PromptWriter):
        self._records = records
        self._rows = rows
        self._writer = writer
        self._entries: dict[int, Entry | None] = {}
        self._watch = Watch(LoadingSpec().max_bad_share, len(rows))
        self._decoded = _Kept(_KEPT)

    def __len__(self) -> int:
        return len(self._rows)

    def entry(self, row: int) -> Entry | None:
        """None: its image is broken; this is logged once.

        Raises:
          TooManyBadRecordsError: if more than 1% of the examples are.
          ValueError: if it can be no example here.
        """
        if row not in self._entries:
            name, bad = self._records.name(self._rows[row][0]), []
            try:
                asked = self._asked(row)
                self._writer.check(asked)
                self._entries[row] = Entry(name, _digest(asked.image))
                if asked.image is not None:
                    self._pictures(row)  # a broken one is found here, not between two batches
            except (BadRecordError, CorruptImageError) as error:
                log.warning("Left out of the examples %s: %s", name, error)
                self._entries[row] = None
                bad.append(Skipped(name, str(error)))
            self._watch.see(1, bad)
        return self._entries[row]

    def entry_of(self, question: Question) -> Entry:
        """The same of a question that is asked."""
        record, asked = self._writer.find(question)
        return Entry(record, _digest(asked.image))

    def seen(self, row: int) -> Seen:
        """The image of an example.

        Raises:
          ValueError: if it has none.
        """
        name, asked = self.entry(row).image, self._asked(row)
        _check_image(name, self._records.name(self._rows[row][0]))
        return Seen(name, self._images(row, asked), lambda: read_image(self._asked(row).image))

    def seen_of(self, question: Question) -> Seen:
        """The image of a question that is asked.

        Raises:
          ValueError: if it has none.
        """
        name = self.entry_of(question).image
        _check_image(name, question.id)
        find = self._writer.find
        return Seen(name, question.images, lambda: read_image(find(question)[1].image))

    def prompt(
        self, question: Question, rows: Sequence[int], *, text_only: bool = False, between: str = ""
    ) -> Question:
        """The question after examples with their answers; their images are read when asked for.

        Args:
          rows: of the examples, in order.
          text_only: leave out the images of the examples.
          between: a text after each example, for templates of documents (with a `chunk`).
        """
        examples = [self._asked(row) for row in rows]
        if text_only:
            return self._writer.write(question, list(map(_without_image, examples)), [], between)
        images = [self._images(row, asked) for row, asked in zip(rows, examples, strict=True)]
        return self._writer.write(question, examples, images, between)

    def _asked(self, row: int) -> Asked:
        number, place = self._rows[row]
        return self._records.asked(number)[place]

    def _images(self, row: int, asked: Asked) -> Images:
        if asked.image is None:
            return np.zeros((0, 1, 1, 3), np.float32)
        layout = self._writer.layout
        count = layout.plan(*upright_size(asked.image)).pictures
        shape = (count, layout.size, layout.size, 3)
        return LazyImages(shape, self.entry(row).image, lambda: self._pictures(row))

    def _pictures(self, row: int) -> np.ndarray:
        """[I, H, W, 3] float32, normalised."""
        name = self._entries[row].image
        if name not in self._decoded:
            image = decode(read_image(self._asked(row).image))
            self._decoded.keep(name, self._writer.layout.pictures(image))
        return self._decoded[name]


class Records:
    """The questions of a data stream by number of record, as its forms give them: nothing of an
    image is decoded.

    Raises:
      ValueError: if a form has no questions.
    """

    def __init__(self, spec: DataSpec):
        for form in spec.forms:
            if not isinstance(form, Questioning):
                raise ValueError(
                    f"The form {type(form).__name__.lower()!r} has no questions that could be "
                    "examples; 'questions', 'described', 'vqa' and 'caption' have."
                )
        self.sources = [open_source(source)[0] for source in spec.sources]
        self._forms = spec.forms
        self._ends = np.cumsum([len(source) for source in self.sources]).tolist()

    def __len__(self) -> int:
        return self._ends[-1]

    def _place(self, number: int) -> tuple[int, int]:
        k = bisect.bisect_right(self._ends, number)
        return k, number - (self._ends[k - 1] if k else 0)

    def name(self, number: int) -> str:
        k, index = self._place(number)
        return self.sources[k].id(index)

    def asked(self, number: int) -> list[Asked]:
        """The questions of a record.

        Raises:
          BadRecordError: it cannot be used.
        """
        k, index = self._place(number)
        record, name = read_record(self.sources[k], index)
        return list(self._forms[k].questions(record, name))

    def choose(self, pool: int | None, seed: int) -> list[tuple[int, int]]:
        """(record, question) of all questions, or of so many, of as many records as possible.

        Raises:
          ValueError: if that is less than one.
        """
        if pool is not None and pool < 1:
            raise ValueError(f"shots_pool={pool} leaves no examples: give 1 or more, or None.")
        rng = np.random.default_rng([seed, _POOL])
        order = range(len(self)) if pool is None else rng.permutation(len(self))[:pool].tolist()
        counts = [self._count(number) for number in order]
        turns = [rng.permutation(count).tolist() for count in counts]
        rows = [
            (number, places[turn])
            for turn in range(max(counts, default=0))
            for number, places in zip(order, turns, strict=True)
            if turn < len(places)
        ]
        return sorted(rows[:pool])

    def _count(self, number: int) -> int:
        try:
            return len(self.asked(number))
        except BadRecordError as error:
            log.warning("Left out of the examples %s: %s", self.name(number), error)
            return 0


class PromptWriter:
    """Writes prompts as the data of the questions that are asked says: its template, its layout.

    Args:
      spec: of that data.
      tokenizer: of the run.
    """

    def __init__(self, spec: DataSpec, tokenizer: Tokenizer | None):
        said = spec.conversation
        self.layout = said.layout
        self._records = Records(spec)
        self._maker = SampleMaker(
            dataclasses.replace(spec, conversation=_unlimited(said)),
            self._records.sources,
            tokenizer,
        )
        self._chat = ChatTokenizer(tokenizer)
        self._template = said.template
        # Documents are a row of images and texts; conversations have turns.
        self._documents = bool(TEMPLATES[said.template].chunk)
        self._numbers = {self._records.name(i): i for i in range(len(self._records))}

    def check(self, example: Asked) -> None:
        """Raises ValueError if it cannot stand in a prompt."""
        if example.drawn or (self.layout is None and example.image is not None):
            raise ValueError(
                "Examples must be answered in words, and have images only where the data that is "
                "asked has a layout for them: give other data in `shots_from`."
            )

    def find(self, question: Question) -> tuple[str, Asked]:
        """The name of a question's record, and the question as it stands there."""
        record = question.id if question.id in self._numbers else question.id.rpartition("/")[0]
        key = question.id[len(record) + 1 :]
        asked = self._records.asked(self._numbers[record])
        return record, next(one for one in asked if one.key == key)

    def write(
        self,
        question: Question,
        examples: Sequence[Asked],
        images: Sequence[Images],
        between: str,
    ) -> Question:
        """See `Support.prompt`; images are those of the examples.

        Raises:
          ValueError: if there is a `between` that the template has itself.
        """
        if between and not self._documents:
            raise ValueError(
                f"The template {self._template!r} says itself what stands between turns: leave "
                "`shots_between` out."
            )
        if self._documents:
            space = self._chat.encode(Piece(between, False, AFTER)) if between else None
            made = with_shots(question, [self._example(one) for one in examples], space)
        else:
            made = self._conversation(question, examples)
        return made._replace(images=join([*images, question.images]))

    def _example(self, asked: Asked) -> Question:
        """Of an example by itself, all but its images."""
        sample = self._encode([asked])
        begin = _last_answer(sample)
        return Question(
            id=asked.key,
            group=asked.group,
            text=asked.text,
            answers=asked.answers,
            choices=asked.choices,
            ids=sample.tokens[:begin],
            place=sample.place[:begin],
            images=np.zeros((0, 1, 1, 3), np.float32),
            picture=None,
            answer_ids=sample.tokens[begin:],
            begin=self._maker.begin,
            visual=visual_tokens(self.layout, sample.pictures),
        )

    def _conversation(self, question: Question, examples: Sequence[Asked]) -> Question:
        """Examples and question as turns of one conversation."""
        asked = self.find(question)[1]
        sample, alone = self._encode([*examples, asked]), self._encode([asked])
        begin = _last_answer(sample)
        # An encoder's prompt ends with a token that no conversation has.
        end = question.ids[_last_answer(alone) :]
        return question._replace(
            ids=np.concatenate([sample.tokens[:begin], end]),
            place=np.concatenate([sample.place[:begin], np.full(len(end), -1, np.int32)]),
            visual=visual_tokens(self.layout, sample.pictures),
        )

    def _encode(self, several: Sequence[Asked]) -> Sample:
        turns: list[Turn] = []
        images: list[Any] = []
        for asked in several:
            moved = (
                part + len(images) if isinstance(part, int) else part
                for part in asked.question.parts
            )
            turns += [Turn("user", tuple(moved)), Turn("assistant", (asked.answers[0],))]
            images += [] if asked.image is None else [asked.image]
        conversation = Conversation(tuple(turns), tuple(images)).check()
        pieces = self._maker.render(conversation)
        return self._maker.encode(Drawn("a few-shot prompt", conversation, pieces), (0, 0, None))


def open_support(
    shots_from: Mapping[str, Any],
    data: Mapping[str, Any],
    tokenizer: Tokenizer | None,
    *,
    pool: int | None = None,
    seed: int = 0,
) -> Support:
    """The support set of an evaluation.

    Args:
      shots_from: a data config of questions; its sources and forms count, how they are written is
        said by `data`.
      data: the data config of the questions that are asked.
      tokenizer: of the run.
      pool: not all questions but so many, of as many records as possible.
      seed: which ones.

    Raises:
      ValueError: unknown names or fields, nothing to read, or a form that has no questions.
    """
    records = Records(parse(shots_from))
    return Support(records, records.choose(pool, seed), PromptWriter(parse(data), tokenizer))


def with_shots(
    question: Question, shots: Sequence[Question], between: np.ndarray | None = None
) -> Question:
    """The question after examples with their answers, one after the other as documents have them.

    Args:
      between: ids that stand after each example.

    Raises:
      ValueError: if an example has no answer in tokens.
    """
    ids, places = [], []
    visual = 0
    for number, one in enumerate((*shots, question)):
        begin = one.begin if number else 0  # a stream begins once
        place = one.place[begin:]
        ids.append(one.ids[begin:])
        places.append(np.where(place >= 0, place + visual, place))
        visual += one.visual
        if one is not question:
            if one.answer_ids is None:
                raise ValueError(f"The example {one.id} has no answer.")
            said = [one.answer_ids] if between is None else [one.answer_ids, between]
            ids += said
            places += [np.full(len(some), -1, np.int32) for some in said]
    return question._replace(
        ids=np.concatenate(ids),
        place=np.concatenate(places),
        images=join([one.images for one in (*shots, question)]),
        visual=visual,
    )


class _Kept(collections.OrderedDict):
    """Arrays by name, the last ones, of so many bytes in all (but one array in any case)."""

    def __init__(self, size: int):
        super().__init__()
        self._left = size

    def keep(self, name: str, array: np.ndarray) -> None:
        self[name] = array
        self._left -= array.nbytes
        while self._left < 0 and len(self) > 1:
            self._left += self.popitem(last=False)[1].nbytes


def _unlimited(said: ConversationSpec) -> ConversationSpec:
    """For prompts alone, of any length, never cut."""
    return dataclasses.replace(
        said,
        max_len=_ANY,
        images=0 if said.layout is None else _ANY,
        pack=False,
        document=1,
        max_targets=None,
        lengths=(),
        too_long="skip",
        prefix=False,
        parents=False,
        seq2seq=None,
    )


def _last_answer(sample: Sample) -> int:
    """Where the last of the answers begins."""
    before = np.concatenate([[False], sample.learnt[:-1]])
    return int(np.flatnonzero(sample.learnt & ~before)[-1])


def _without_image(asked: Asked) -> Asked:
    words = tuple(part for part in asked.question.parts if isinstance(part, str))
    return asked._replace(image=None, question=Turn("user", words))


def _digest(image: Any) -> str:
    """The same for equal images of a source, "" for none."""
    if image is None:
        return ""
    content = read_image(image)
    if not isinstance(content, bytes):
        content = np.asarray(content)
        content = f"{content.shape}".encode() + content.tobytes()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _check_image(name: str, what: str) -> None:
    if not name:
        raise ValueError(
            f"shots_by='rices' compares images, but {what} has none: use shots_by='random', or "
            "leave such data out."
        )
