"""Forms of documents: images and texts that answer nobody, all texts supervised.

What a template makes of them is said by `Template.chunk`, and what becomes of those that are longer
than a row by `too_long` of `ConversationSpec`. Gaps (a text that is empty, an image that could not
be had) are left out; a document of which nothing is left is a bad record.
"""

from __future__ import annotations

import base64
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmjax.data.conversations import Conversation, Turn
from mmjax.data.forms import FORMS, as_rows, as_text, as_texts, pick
from mmjax.data.records import BadRecordError, get_field


@FORMS.register("interleaved")
@dataclass(frozen=True)
class Interleaved:
    """Documents as OBELICS has them (Laurençon et al., 2023): two lists of one length, in each
    place a text or an image, and None in the other list. None in both, as of an image that could
    not be downloaded, is a gap.

    Args:
      images: documents with more are cut after the text of the last of so many.
      drawn: whether images after the last text stay: models that draw learn them.
    """

    images: int | None = None
    drawn: bool = False
    texts_field: str = "texts"
    images_field: str = "images"

    def __call__(self, record, name, rng):
        texts = list(get_field(record, self.texts_field, name))
        images = list(get_field(record, self.images_field, name))
        if len(texts) != len(images):
            raise BadRecordError(
                f"{self.texts_field!r} has {len(texts)} places, {self.images_field!r} {len(images)}"
            )
        parts: list[tuple[str, Any]] = []
        for place, (text, image) in enumerate(zip(texts, images, strict=True)):
            if not _is_empty(text):
                if image is not None:
                    raise BadRecordError(f"place {place} must hold either a text or an image")
                parts.append(("text", as_text(text, self.texts_field)))
            elif image is not None:
                parts.append(("image", image))
        return _document(parts, self.images, "\n\n", self.drawn)


@FORMS.register("mmc4")
@dataclass(frozen=True)
class MMC4:
    """Documents of MMC4 (Zhu et al., 2023): `text_list` holds sentences, `image_info` images, each
    with the number of the sentence it was matched to (`matched_text_index`) and how similar CLIP
    finds them (`matched_sim`). An image stands before its sentence, as in OpenFlamingo.

    Args:
      images: documents with more are cut after the text of the last of so many.
      similarity: images less similar are left out; 0.24 in OpenFlamingo.
      image_key: where an entry of `image_info` has its image, a text there being the base64 of the
        encoded image; None: `image`, or else `image_base64`, as in OpenFlamingo's files.
    """

    images: int | None = 5
    similarity: float = 0.24
    image_key: str | None = None
    texts_field: str = "text_list"
    images_field: str = "image_info"

    def __call__(self, record, name, rng):
        texts = list(get_field(record, self.texts_field, name))
        entries = as_rows(get_field(record, self.images_field, name))
        before: dict[int, list[Any]] = {}
        for entry in entries:
            image, similarity = self._image(entry), entry.get("matched_sim")
            if image is None:
                continue
            place = _place(entry.get("matched_text_index"), len(texts))
            if similarity is None or similarity >= self.similarity:
                before.setdefault(place, []).append(image)
        if not before:
            keys = sorted({str(key) for entry in entries for key in entry})
            raise BadRecordError(
                "none of its images is there and similar enough to its text; entries of "
                f"{self.images_field!r} have {', '.join(keys) or 'nothing'}"
            )
        parts: list[tuple[str, Any]] = []
        for number, text in enumerate(texts):
            parts += [("image", _decoded(image)) for image in before.get(number, ())]
            if not _is_empty(text):
                parts.append(("text", as_text(text, self.texts_field)))
        return _document(parts, self.images, " ")

    def _image(self, entry: Mapping[str, Any]) -> Any:
        if self.image_key is not None:
            return entry.get(self.image_key)
        image = entry.get("image")
        return entry.get("image_base64") if image is None else image


@FORMS.register("text")
@dataclass(frozen=True)
class Text:
    """A document without images: a text, or several of which training draws one."""

    text_field: str = "text"

    def __call__(self, record, name, rng):
        text = pick(as_texts(get_field(record, self.text_field, name), self.text_field), rng)
        return Conversation((Turn("assistant", (text,)),)).check()


def _is_empty(text: Any) -> bool:
    return text is None or (isinstance(text, str) and not text.strip())


def _place(value: Any, count: int) -> int:
    """The number of a sentence, of any integer type.

    Raises:
      BadRecordError: no whole number, or no such sentence.
    """
    try:
        place = operator.index(value)
    except TypeError:
        place = -1
    if not 0 <= place < count:
        raise BadRecordError(f"an image is matched to the text {value!r} of {count}")
    return place


def _decoded(image: Any) -> Any:
    """An encoded image that may be written in base64, perhaps in lines.

    Raises:
      BadRecordError: a text that is no base64.
    """
    if not isinstance(image, str):
        return image
    try:
        return base64.b64decode("".join(image.split()), validate=True)
    except ValueError as error:
        raise BadRecordError(f"an image that is a text is not base64: {error}") from error


def _document(
    parts: Sequence[tuple[str, Any]], limit: int | None, space: str, drawn: bool = False
) -> Conversation:
    """("text" or "image", it) in their order -> an answer to nobody."""
    said: list[str | int] = []
    images: list[Any] = []
    for kind, part in parts:
        if kind == "image":
            if len(images) == limit:
                break
            said.append(len(images))
            images.append(part)
        elif said and isinstance(said[-1], str):
            said[-1] += space + part
        else:
            said.append(part)
    # Of an image at the end nothing is said.
    while said and isinstance(said[-1], int) and not drawn:
        images.pop()
        said.pop()
    if not said:
        raise BadRecordError("nothing to supervise: there is no text after its images")
    return Conversation((Turn("assistant", tuple(said)),), tuple(images)).check()
