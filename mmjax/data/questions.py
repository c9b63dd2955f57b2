"""Questions about images for evaluation: prompts that end where the answer begins."""

from __future__ import annotations

import bisect
import itertools
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from mmjax.data.conversations import Asked, read_image
from mmjax.data.forms import Questioning
from mmjax.data.image import CorruptImageError
from mmjax.data.loader import Watch
from mmjax.data.pipeline import Skipped, read_record
from mmjax.data.records import BadRecordError
from mmjax.data.samples import Drawn, SampleMaker
from mmjax.data.sources import open_source
from mmjax.data.spec import LoadingSpec, parse
from mmjax.data.tokenizer import Tokenizer
from mmjax.data.visual import visual_tokens

log = logging.getLogger(__name__)

# Of the choice of questions, where not all are asked.
_SEED = 0


class Question(NamedTuple):
    """One question, ready for the model.

    `id` names the record (and the question in it), `group` its kind of task ("" where the record
    does not say). `text` is the question, `answers` what counts as right (the first is the one the
    record gives), `choices` the options of multiple choice. `ids` [T] int32 is the prompt up to
    where the answer begins, unpadded; `place` [T] int32 the visual token that stands at each
    position, counted over the images one after the other, -1 for text. `images` [I, H, W, 3]
    float32, normalised; I may be 0. `picture`: the encoded bytes of the first image as the source
    has it, for sheets; None where there is none. `answer_ids` [U] int32 are the tokens of the first
    answer that training would supervise, its end included, and `choice_ids` those of each choice:
    `ids` and they, one after the other, are what training has. The first `begin` of the tokens are
    what every stream begins with; `visual` is how many visual tokens the images have.

    `drawn`: the image is the answer. It is none of the prompt's then, `answers` are texts that it
    may be drawn of, and `answer_ids` what follows it.
    """

    id: str
    group: str
    text: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] | None
    ids: np.ndarray
    place: np.ndarray
    images: np.ndarray
    picture: bytes | None
    answer_ids: np.ndarray | None = None
    choice_ids: tuple[np.ndarray, ...] | None = None
    begin: int = 0
    visual: int = 0
    drawn: bool = False


class Questions:
    """The questions of a data stream, as often as it is iterated; made by `open_questions`.

    Questions about one image share its array. `skipped` are the records that could not be used,
    when all have been seen.
    """

    def __init__(self, maker: SampleMaker, limit: int | None):
        self._maker = maker
        self._limit = limit
        self._ends = np.cumsum([len(source) for source in maker.sources]).tolist()
        self.skipped: list[Skipped] = []

    def __iter__(self) -> Iterator[Question]:
        self.skipped = []
        watch = Watch(LoadingSpec().max_bad_share, self._ends[-1])
        chosen: Iterator[tuple[int, list[int] | None]]
        if self._limit is None:
            chosen = zip(range(self._ends[-1]), itertools.repeat(None), strict=False)
        else:
            chosen = iter(sorted(self._choose(self._limit).items()))
        for number, wanted in chosen:
            bad: list[Skipped] = []
            questions = self._make(number, wanted, bad)
            for record, error in bad:
                log.warning("Left out %s: %s", record, error)
            self.skipped += bad
            watch.see(max(1, len(questions)), bad)
            yield from questions

    def _choose(self, limit: int) -> dict[int, list[int]]:
        """Record -> some of its questions: as many images as there are, and then more of each, in
        an order that is always the same."""
        order = np.random.default_rng(_SEED).permutation(self._ends[-1]).tolist()
        left: dict[int, list[int]] = {}
        chosen: dict[int, list[int]] = {}
        for turn in itertools.count():
            for number in order if turn == 0 else [number for number in order if left[number]]:
                if limit == 0:
                    return chosen
                if turn == 0:
                    try:
                        count = len(self._asked(number)[1])
                    except BadRecordError:
                        count = 1  # found out, and named, when its turn comes
                    shuffled = np.random.default_rng([_SEED, number]).permutation(count)
                    left[number] = shuffled.tolist()
                if left[number]:
                    chosen.setdefault(number, []).append(left[number].pop())
                    limit -= 1
            if not any(left.values()):
                return chosen

    def _place(self, number: int) -> tuple[int, int]:
        k = bisect.bisect_right(self._ends, number)
        return k, number - (self._ends[k - 1] if k else 0)

    def _asked(self, number: int) -> tuple[str, list[Asked]]:
        k, index = self._place(number)
        record, name = read_record(self._maker.sources[k], index)
        return name, list(self._maker.spec.forms[k].questions(record, name))

    def _make(
        self, number: int, wanted: list[int] | None, skipped: list[Skipped]
    ) -> list[Question]:
        k, index = self._place(number)
        name = self._maker.sources[k].id(index)
        made: list[Question] = []
        images: dict[int, tuple[np.ndarray, bytes | None]] = {}
        try:
            _, asked = self._asked(number)
            for place in sorted(wanted) if wanted is not None else range(len(asked)):
                made.append(self._question(name, asked[place], (k, index), images))
        except (BadRecordError, CorruptImageError) as error:
            skipped.append(Skipped(name, str(error)))
        return made

    def _question(
        self,
        name: str,
        asked: Asked,
        where: tuple[int, int],
        images: dict[int, tuple[np.ndarray, bytes | None]],
    ) -> Question:
        maker = self._maker
        conversation = asked.conversation(asked.answers[0])
        pieces = maker.render(conversation)
        sample = maker.encode(Drawn(name, conversation, pieces), (*where, None))
        if asked.image is None:
            images[id(None)] = (np.zeros((0, 1, 1, 3), np.float32), None)
        elif id(asked.image) not in images:
            seen = read_image(asked.image)
            images[id(asked.image)] = (
                np.concatenate(maker.pictures(sample)),
                seen if isinstance(seen, bytes) else None,
            )
        layout = maker.spec.conversation.layout
        if asked.drawn and layout.drawn is None:
            raise ValueError(
                "Images that are answers need a layout whose images are learnt as text is: 'codes'."
            )
        pixels, picture = images[id(asked.image)]
        begin = sample.prompt
        choice_ids = None
        if asked.choices is not None:
            choice_ids = tuple(
                maker.learnt(maker.render(asked.conversation(choice))) for choice in asked.choices
            )
        return Question(
            id=f"{name}/{asked.key}" if asked.key else name,
            group=asked.group,
            text=asked.text,
            answers=asked.answers,
            choices=asked.choices,
            ids=sample.tokens[:begin],
            place=sample.place[:begin],
            images=pixels,
            picture=picture,
            answer_ids=maker.learnt(pieces),
            choice_ids=choice_ids,
            begin=maker.begin,
            visual=visual_tokens(layout, sample.pictures),
            drawn=asked.drawn,
        )


def open_questions(
    data_config: Any, tokenizer: Tokenizer | None, limit: int | None = None
) -> Questions:
    """The questions of a data stream, a mapping such as `config.data.train`, each with the prompt
    that training would have (one question each, unpacked).

    Args:
      data_config: with `conversation`; its sources have the forms "questions", "described",
        "vqa", "caption" or "drawing".
      tokenizer: from `build_tokenizer`.
      limit: not all questions but so many, of as many images as possible; the same ones always.

    Raises:
      ValueError: unknown names or fields, nothing to read, or a form that has no questions.
      TooManyBadRecordsError: while they are read, if more than 1% of the records are broken or do
        not fit.
    """
    spec = parse(data_config)
    if spec.conversation is None:
        raise ValueError("Questions need a data stream with `conversation`.")
    for form in spec.forms:
        if not isinstance(form, Questioning):
            raise ValueError(
                f"The form {type(form).__name__.lower()!r} has no questions to ask: those of "
                "'questions', 'described', 'vqa', 'caption' and 'drawing' have."
            )
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} asks nothing: give 1 or more, or None for all questions.")
    maker = SampleMaker(spec, [open_source(s)[0] for s in spec.sources], tokenizer)
    maker.check()
    return Questions(maker, limit)
