"""Conversations as samples: tokens, what of them is learnt, and places of pictures."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mmjax.data.buffers import BufferPool
from mmjax.data.chat import TEMPLATES, ChatTokenizer, Picture, Piece
from mmjax.data.conversations import Conversation, read_image, upright_size
from mmjax.data.image import decode
from mmjax.data.pipeline import position_rng, read_record, view_rng
from mmjax.data.records import BadRecordError
from mmjax.data.sources import Source
from mmjax.data.spec import DataSpec, conversation_fields
from mmjax.data.tokenizer import Tokenizer
from mmjax.data.visual import TEXT, Plan, visual_tokens

# How errors begin that say that a record is whole but larger than a row: `mmjax.data.loader.Watch`
# counts them apart, and all that a batch tells of an error is its text.
LARGER = ("too long: ", "too many pictures: ")


class Drawn(NamedTuple):
    """A record's conversation, rendered."""

    name: str
    conversation: Conversation
    pieces: list[Piece]


class Sample(NamedTuple):
    """A conversation, encoded: `learnt`, and `place` of the visual tokens of its own pictures.
    `record` says where it is from: source, index and position. `images` None: to be read again;
    the sample has the first `shown` of the record's.
    `branch`, of questions that are asked apart: 0 where they share tokens, else their number.
    `answer`: what the decoder learns, if there is one; then nothing else is learnt.
    """

    name: str
    record: tuple[int, int, int | None]
    tokens: np.ndarray
    learnt: np.ndarray
    place: np.ndarray
    pictures: int
    shown: int
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


class _Span(NamedTuple):
    """The tokens of an image, markers included; `pictures` up to its own."""

    begin: int
    end: int
    pictures: int


class SampleMaker:
    """Makes samples of conversations, and rows of samples.

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
        """The sample of a conversation, cut if that is allowed and needed: of questions and answers
        the last ones are left out, a document ends where the row does (but never within an image,
        nor with one of which nothing is said).

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
                fewer = len(conversation.turns) < len(drawn.conversation.turns)
                return sample._replace(cut=sample.cut or fewer)
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
        spans: list[_Span] = []
        length = pictures = targets = 0
        may_cut = self._may_cut(conversation)
        full = False
        for piece in pieces:
            if not isinstance(piece.part, Picture):
                ids = self._chat.encode(piece)
                parts.append((ids, piece.learnt))
                length += len(ids)
                targets += len(ids) * piece.learnt
                continue
            # The first token of all is not learnt, and so no target. (No pictures is the limit of a
            # config without a layout, of which `_plan` tells.)
            size = (length, pictures, targets - 1)
            full = may_cut and any(
                one >= max(limit, 1) for one, limit in zip(size, self.limits, strict=True)
            )
            if full:  # images that are cut off need not even be there
                break
            begin = length
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
                targets += len(ids) * learnt
            pictures += plan.pictures
            spans.append(_Span(begin, length, pictures))
        ids, flags = zip(*parts, strict=True)
        learnt = np.repeat(flags, [len(some) for some in ids])
        learnt[0] = False  # nothing comes before it that it could be predicted from
        place = np.full(length, TEXT, np.int32)
        for at, places in visual:
            place[at : at + len(places)] = places
        # Nothing is learnt from what a template puts after the last answer.
        useful = np.flatnonzero(learnt | (place != TEXT))
        end = int(useful[-1]) + 1 if useful.size else length
        sample = Sample(
            name=name,
            record=record,
            tokens=np.concatenate(ids)[:end],
            learnt=learnt[:end],
            place=place[:end],
            pictures=pictures,
            shown=len(conversation.images),
            images=conversation.images,
            cut=False,
            branch=np.zeros(end, np.int32),
        )
        larger = any(one > limit for one, limit in zip(sample.size, self.limits, strict=True))
        return self._cut(sample, spans) if full or (may_cut and larger) else sample

    def _may_cut(self, conversation: Conversation) -> bool:
        """Whether it is a document, an answer to nobody, that may end where its row does."""
        spoken = sum(turn.role != "system" for turn in conversation.turns)
        return self._said.too_long == "cut" and spoken == 1 and self._said.seq2seq is None

    def _cut(self, sample: Sample, spans: Sequence[_Span]) -> Sample:
        """The beginning of a document that fits into a row, up to the last token that is learnt.

        Args:
          spans: of its images, in their order.

        Raises:
          BadRecordError: nothing of that is learnt.
        """
        length, pictures, targets = self.limits
        end = min(length, int(np.searchsorted(np.cumsum(sample.learnt), targets, side="right")))
        for span in spans:
            if span.end > end or span.pictures > pictures:
                end = min(end, span.begin)
                break
        learnt = np.flatnonzero(sample.learnt[:end])
        if not learnt.size:
            raise BadRecordError(
                "too long: of its beginning that fits into a row, nothing is learnt; "
                f"conversation.max_len is {length}, images {pictures}"
            )
        end = int(learnt[-1]) + 1
        kept = [span for span in spans if span.end <= end]
        return sample._replace(
            tokens=sample.tokens[:end],
            learnt=sample.learnt[:end],
            place=sample.place[:end],
            pictures=kept[-1].pictures if kept else 0,
            shown=len(kept),
            images=sample.images[: len(kept)],
            cut=True,
            branch=sample.branch[:end],
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
            images = images[: sample.shown]
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


def _moved(place: np.ndarray, by: int) -> np.ndarray:
    """Places of visual tokens after others; what is no visual token's stays."""
    return np.where(place >= 0, place + by, place) if by else place
