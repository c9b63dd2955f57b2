"""The forms in which data sets have conversations.

A form makes a `Conversation` of a record. Each source of a data stream names its own, beside its
weight: `dict(name="json", path=..., form="llava", weight=2.0)`, or with options
`form=dict(name="questions", turns=4)`.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from mmjax.data.conversations import MARKER, ROLES, Asked, Conversation, Turn
from mmjax.data.records import BadRecordError, get_field
from mmjax.registry import Registry


class Form(Protocol):
    """See the module's docstring."""

    def __call__(
        self, record: Mapping[str, Any], name: str, rng: np.random.Generator | None
    ) -> Conversation:
        """The conversation of the record called `name`; `rng` None: always the same one.

        Raises:
          BadRecordError: the record cannot be used.
          UnknownNameError: it lacks a field; names the nearest.
        """


@runtime_checkable
class Questioning(Form, Protocol):
    """A form that evaluation can use."""

    def questions(self, record: Mapping[str, Any], name: str) -> Iterator[Asked]: ...


FORMS: Registry[type[Form]] = Registry("form of conversations")


# --- parts of forms


def _images(value: Any) -> tuple[Any, ...]:
    """One image, several, or none."""
    if value is None:
        return ()
    several = isinstance(value, (list, tuple)) or (
        isinstance(value, np.ndarray) and (value.dtype == object or value.ndim > 3)
    )
    return tuple(value) if several else (value,)


def as_rows(value: Any) -> list[dict[str, Any]]:
    """TFDS gives a sequence of groups as a group of sequences."""
    if isinstance(value, Mapping):
        return [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
    return list(value)


def pick(values: Sequence[Any], rng: np.random.Generator | None) -> Any:
    return values[0 if rng is None else int(rng.integers(len(values)))]


def as_text(value: Any, field: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise BadRecordError(f"the field {field!r} holds no text but {value!r}")
    return value


def as_texts(value: Any, field: str) -> list[str]:
    """One text or several, at least one."""
    values = [value] if isinstance(value, str) else list(value) if value is not None else []
    if not values:
        raise BadRecordError(f"the field {field!r} holds no text")
    return [as_text(item, field) for item in values]


def _marked(text: str, first: int) -> tuple[str | int, ...]:
    """A text with markers -> its parts; images are numbered from `first`."""
    parts: list[str | int] = []
    for number, piece in enumerate(text.split(MARKER)):
        if number:
            parts.append(first + number - 1)
        if piece:
            parts.append(piece)
    return tuple(parts)


def _about_image(text: str) -> Turn:
    """The image, then the question, as LLaVA has them."""
    return Turn("user", (0, f"\n{text}"))


def _group(record: Mapping[str, Any], field: str | None, name: str) -> str:
    return "" if field is None else str(get_field(record, field, name))


def _single(images: tuple[Any, ...]) -> Any:
    if len(images) != 1:
        raise BadRecordError(f"it has {len(images)} images; this form takes one")
    return images[0]


# --- forms


@FORMS.register("questions")
@dataclass(frozen=True)
class Questions:
    """Images with several questions each: `questions` is a list of groups with `question`,
    `answer` and, for evaluation, `group` and `choices`.

    Args:
      turns: training draws up to so many questions of an image, as turns of one conversation.
      apart: whether they are conversations of their own instead, which share the tokens of the
        image: each is learnt as if it were asked alone. Otherwise a question tells something of
        the answers to those before it.
      caption: the share of images whose caption is asked for too, as the last turn.
      prompts: requests for the caption, of which training draws one.
      suffix: added to each question, such as "\\nAnswer with a single word or phrase."
    """

    turns: int = 1
    apart: bool = False
    caption: float = 0.0
    prompts: tuple[str, ...] = ("Describe the image.",)
    suffix: str = ""
    image_field: str = "image"
    questions_field: str = "questions"
    caption_field: str = "caption"

    def __post_init__(self):
        if self.turns < 1:
            raise ValueError(f"turns={self.turns} asks nothing: give 1 or more.")
        if not 0 <= self.caption <= 1:
            raise ValueError(f"caption={self.caption} is a share: it must be in [0, 1].")

    def __call__(self, record, name, rng):
        image = _single(_images(get_field(record, self.image_field, name)))
        rows = as_rows(get_field(record, self.questions_field, name))
        if not rows:
            raise BadRecordError(f"nothing to supervise: {self.questions_field!r} is empty")
        chosen = range(len(rows)) if rng is None else rng.permutation(len(rows))
        said = [
            (as_text(rows[index]["question"], "question"), as_text(rows[index]["answer"], "answer"))
            for index in chosen[: self.turns]
        ]
        if rng is not None and self.caption and rng.random() < self.caption:
            texts = as_texts(get_field(record, self.caption_field, name), self.caption_field)
            said.append((pick(self.prompts, rng), pick(texts, rng)))
        turns = []
        for question, answer in said:
            text = question + self.suffix
            shown = self.apart or not turns
            turns.append(_about_image(text) if shown else Turn("user", (text,)))
            turns.append(Turn("assistant", (answer,)))
        return Conversation(tuple(turns), (image,), self.apart).check()

    def questions(self, record, name):
        image = _single(_images(get_field(record, self.image_field, name)))
        for number, row in enumerate(as_rows(get_field(record, self.questions_field, name))):
            text = as_text(row["question"], "question")
            # Empty strings fill lists that a data set stores at one length.
            choices = tuple(choice for choice in row.get("choices", ()) if choice)
            yield Asked(
                key=str(number),
                group=row.get("group", ""),
                text=text,
                answers=(as_text(row["answer"], "answer"),),
                choices=choices or None,
                image=image,
                question=_about_image(text + self.suffix),
            )


@FORMS.register("described")
@dataclass(frozen=True)
class Described:
    """The same questions about a description that stands in place of the image: text alone, for a
    language model that is to answer them.

    Args:
      turns: training draws up to so many questions, as turns of one conversation.
      retell: the share of descriptions that are to be told in other words as the last turn: in
        those of a further text of the record.
      prompts: requests for that, of which training draws one.
      description_field: a text, or several, of which the first is the description.
    """

    turns: int = 1
    retell: float = 0.0
    prompts: tuple[str, ...] = ("Describe the image.",)
    description_field: str = "captions"
    questions_field: str = "questions"

    def __post_init__(self):
        if self.turns < 1:
            raise ValueError(f"turns={self.turns} asks nothing: give 1 or more.")
        if not 0 <= self.retell <= 1:
            raise ValueError(f"retell={self.retell} is a share: it must be in [0, 1].")

    def __call__(self, record, name, rng):
        rows = as_rows(get_field(record, self.questions_field, name))
        if not rows:
            raise BadRecordError(f"nothing to supervise: {self.questions_field!r} is empty")
        texts = self._texts(record, name)
        chosen = range(len(rows)) if rng is None else rng.permutation(len(rows))
        said = [
            (as_text(rows[index]["question"], "question"), as_text(rows[index]["answer"], "answer"))
            for index in chosen[: self.turns]
        ]
        if rng is not None and len(texts) > 1 and rng.random() < self.retell:
            said.append((pick(self.prompts, rng), pick(texts[1:], rng)))
        turns = []
        for question, answer in said:
            asked = question if turns else f"{texts[0]}\n{question}"
            turns += [Turn("user", (asked,)), Turn("assistant", (answer,))]
        return Conversation(tuple(turns)).check()

    def questions(self, record, name):
        for number, row in enumerate(as_rows(get_field(record, self.questions_field, name))):
            text = as_text(row["question"], "question")
            yield Asked(
                key=str(number),
                group=row.get("group", ""),
                text=text,
                answers=(as_text(row["answer"], "answer"),),
                choices=tuple(choice for choice in row.get("choices", ()) if choice) or None,
                image=None,
                question=Turn("user", (f"{self._texts(record, name)[0]}\n{text}",)),
            )

    def _texts(self, record, name) -> list[str]:
        field = self.description_field
        return as_texts(get_field(record, field, name), field)


@FORMS.register("caption")
@dataclass(frozen=True)
class Caption:
    """An image and its caption: a text, or several of which training draws one.

    Args:
      prompts: what the user says, of which training draws one.
      document: whether training has them as a document of one image and its text instead, which
        answers nobody: "<image>a dog<|endofchunk|>" under the template "openflamingo", as
        OpenFlamingo has its pairs. Evaluation asks with the first prompt all the same.
      also_field: a text, or several or none, that are right in evaluation too.
      group_field: what evaluation groups images by.
    """

    prompts: tuple[str, ...] = ("Describe the image.",)
    document: bool = False
    image_field: str = "image"
    text_field: str = "text"
    also_field: str | None = None
    group_field: str | None = None

    def __call__(self, record, name, rng):
        image = _single(_images(get_field(record, self.image_field, name)))
        texts = as_texts(get_field(record, self.text_field, name), self.text_field)
        if self.document:
            return Conversation((Turn("assistant", (0, pick(texts, rng))),), (image,)).check()
        turns = (
            _about_image(pick(self.prompts, rng)),
            Turn("assistant", (pick(texts, rng),)),
        )
        return Conversation(turns, (image,)).check()

    def questions(self, record, name):
        texts = as_texts(get_field(record, self.text_field, name), self.text_field)
        if self.also_field is not None:
            also = get_field(record, self.also_field, name)
            texts += as_texts(also, self.also_field) if len(also) else []
        yield Asked(
            key="caption",
            group=_group(record, self.group_field, name) or "caption",
            text=self.prompts[0],
            answers=tuple(texts),
            choices=None,
            image=_single(_images(get_field(record, self.image_field, name))),
            question=_about_image(self.prompts[0]),
        )


@FORMS.register("drawing")
@dataclass(frozen=True)
class Drawing:
    """A text, then the image that it describes, for models that draw.

    Args:
      alone: the share of images without their text, so that classifier-free guidance has what to
        compare with (Ho and Salimans, 2022).
      text_field: a text, or several of which training draws one.
      group_field: what evaluation groups images by.
    """

    alone: float = 0.0
    image_field: str = "image"
    text_field: str = "text"
    group_field: str | None = None

    def __post_init__(self):
        if not 0 <= self.alone <= 1:
            raise ValueError(f"alone={self.alone} is a share: it must be in [0, 1].")

    def __call__(self, record, name, rng):
        image = _single(_images(get_field(record, self.image_field, name)))
        texts = as_texts(get_field(record, self.text_field, name), self.text_field)
        drawn = Turn("assistant", (0,))
        if rng is not None and rng.random() < self.alone:
            return Conversation((drawn,), (image,)).check()
        return Conversation((Turn("user", (pick(texts, rng),)), drawn), (image,)).check()

    def questions(self, record, name):
        texts = as_texts(get_field(record, self.text_field, name), self.text_field)
        yield Asked(
            key="drawing",
            group=_group(record, self.group_field, name),
            text=texts[0],
            answers=tuple(texts),
            choices=None,
            image=_single(_images(get_field(record, self.image_field, name))),
            question=Turn("user", (texts[0],)),
            drawn=True,
        )


@FORMS.register("vqa")
@dataclass(frozen=True)
class VQA:
    """A question about an image and its answer, or the answers of several people (VQAv2): the most
    frequent one is learnt, all of them count in evaluation.

    Args:
      suffix: added to the question, such as "\\nAnswer with a single word or phrase."
    """

    suffix: str = ""
    image_field: str = "image"
    question_field: str = "question"
    answer_field: str = "answer"
    choices_field: str | None = None
    group_field: str | None = None

    def _answers(self, record: Mapping[str, Any], name: str) -> list[str]:
        value = get_field(record, self.answer_field, name)
        if isinstance(value, Mapping) or (
            isinstance(value, (list, tuple)) and value and isinstance(value[0], Mapping)
        ):
            value = [row["answer"] for row in as_rows(value)]
        answers = as_texts(value, self.answer_field)
        # Of those equally frequent the first.
        best = collections.Counter(answers).most_common(1)[0][0]
        return [best, *(answers[: answers.index(best)] + answers[answers.index(best) + 1 :])]

    def __call__(self, record, name, rng):
        asked = next(self.questions(record, name))
        return asked.conversation(asked.answers[0])

    def questions(self, record, name):
        images = _images(get_field(record, self.image_field, name))
        text = as_text(get_field(record, self.question_field, name), self.question_field)
        choices = None
        if self.choices_field is not None:
            choices = tuple(get_field(record, self.choices_field, name)) or None
        yield Asked(
            key="",
            group=_group(record, self.group_field, name),
            text=text,
            answers=tuple(self._answers(record, name)),
            choices=choices,
            image=_single(images),
            question=_about_image(text + self.suffix),
        )


_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


@FORMS.register("llava")
@dataclass(frozen=True)
class Llava:
    """LLaVA's files: `conversations` is a list of {"from": "human" | "gpt" | "system", "value"},
    with a marker "<image>" for each image; `image` is one, a list, or missing."""

    image_field: str = "image"
    conversations_field: str = "conversations"

    def __call__(self, record, name, rng):
        turns: list[Turn] = []
        found = 0
        for row in as_rows(get_field(record, self.conversations_field, name)):
            speaker, value = row.get("from"), row.get("value")
            if speaker not in _SPEAKERS:
                raise BadRecordError(f"a turn is from {speaker!r}, not human or gpt")
            if not isinstance(value, str):
                raise BadRecordError(f"a turn of {speaker!r} holds no text but {value!r}")
            turns.append(Turn(_SPEAKERS[speaker], _marked(value, found)))
            found += value.count(MARKER)
        return Conversation(tuple(turns), _images(record.get(self.image_field))).check()


@FORMS.register("messages")
@dataclass(frozen=True)
class Messages:
    """Messages as of OpenAI and Hugging Face: {"role", "content"}, where content is a text (with a
    marker "<image>" for each image) or a list of {"type": "text", "text"} and {"type": "image"}.

    Images are those of `images`, in order, or stand in the content itself: {"type": "image",
    "image"} or {"type": "image_url", "image_url": {"url"}}.
    """

    messages_field: str = "messages"
    images_field: str = "images"

    def __call__(self, record, name, rng):
        images: list[Any] = []
        beside = list(_images(record.get(self.images_field)))
        turns: list[Turn] = []
        found = 0
        for message in as_rows(get_field(record, self.messages_field, name)):
            role, content = message.get("role"), message.get("content")
            if role not in ROLES:
                raise BadRecordError(f"a message has the role {role!r}, not {', '.join(ROLES)}")
            if isinstance(content, str):
                parts = _marked(content, found)
            else:
                parts = tuple(self._parts(content or (), found, images))
            found += sum(isinstance(part, int) for part in parts)
            turns.append(Turn(role, parts))
        if images and beside:
            raise BadRecordError(f"it has images both in its messages and in {self.images_field!r}")
        return Conversation(tuple(turns), tuple(images or beside)).check()

    @staticmethod
    def _parts(content: Any, found: int, images: list[Any]) -> Iterator[str | int]:
        """The parts of one message; what images it holds are added to `images`."""
        for item in as_rows(content):
            kind = item.get("type")
            if kind in ("image", "image_url"):
                given = item.get("image", item.get("image_url"))
                if given is not None:
                    images.append(given["url"] if isinstance(given, Mapping) else given)
                yield found
                found += 1
            elif kind == "text" and isinstance(item.get("text"), str):
                yield item["text"]
            else:
                raise BadRecordError(f"a message holds content of the type {kind!r}: {item!r}")
