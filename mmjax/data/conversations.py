"""Conversations about images, questions about them, and how their images are read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from mmjax.data.image import CorruptImageError, is_turned, open_image
from mmjax.data.records import BadRecordError

# Where an image stands in the text of LLaVA's files, and of `messages` whose content is a string.
MARKER = "<image>"
ROLES = ("system", "user", "assistant")
# How much of a file is read first to learn the size of its image.
_HEADER = 1 << 16
_ORIENTATION, _LYING = 0x0112, (5, 6, 7, 8)


class Turn(NamedTuple):
    """`parts` are texts and, as numbers, images of the conversation, in their order."""

    role: str
    parts: tuple[str | int, ...]

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))


class Conversation(NamedTuple):
    """`images`: encoded bytes, pixels, or paths of files.

    `apart`: each question with its answer is a conversation of its own about these images, and has
    places for all of them.
    """

    turns: tuple[Turn, ...]
    images: tuple[Any, ...] = ()
    apart: bool = False

    def split(self) -> list[Conversation]:
        """The conversations that this is: itself, or one for each question."""
        if not self.apart:
            return [self]
        pairs = zip(self.turns[::2], self.turns[1::2], strict=True)
        return [Conversation(pair, self.images) for pair in pairs]

    def shortened(self) -> Conversation:
        """Without its last question and answer, and the images that only they are about."""
        turns = self.turns[:-2]
        used = {part for turn in turns for part in turn.parts if isinstance(part, int)}
        return self._replace(turns=turns, images=self.images[: len(used)])

    def check(self) -> Conversation:
        """Itself.

        Raises:
          BadRecordError: turns out of order or empty, nothing to supervise, or images and the
            places for them that disagree.
        """
        if self.apart:
            for conversation in self.split():
                conversation.check()
            return self
        roles = [turn.role for turn in self.turns]
        spoken = roles[1:] if roles[:1] == ["system"] else roles
        if "assistant" not in spoken:
            raise BadRecordError("nothing to supervise: there is no turn of the assistant")
        # A document is an answer to nobody.
        expected = ["assistant"] if len(spoken) == 1 else ["user", "assistant"] * (len(spoken) // 2)
        if spoken != expected:
            raise BadRecordError(
                f"turns out of order: {', '.join(roles)}; user and assistant must alternate, from "
                "the user's first turn to the assistant's last"
            )
        for number, turn in enumerate(self.turns):
            if not turn.text.strip() and all(isinstance(part, str) for part in turn.parts):
                raise BadRecordError(f"turn {number} ({turn.role}) is empty")
        places = [part for turn in self.turns for part in turn.parts if isinstance(part, int)]
        if places != list(range(len(self.images))):
            raise BadRecordError(
                f"its text has places for {len(places)} images, but there are {len(self.images)}"
            )
        return self


class Asked(NamedTuple):
    """A question of a record, for evaluation; see `mmjax.data.questions.Question`. `image` None:
    it is about a text. `drawn`: the image is the answer."""

    key: str
    group: str
    text: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] | None
    image: Any
    question: Turn
    drawn: bool = False

    def conversation(self, answer: str) -> Conversation:
        images = () if self.image is None else (self.image,)
        said = Turn("assistant", (0 if self.drawn else answer,))
        return Conversation((self.question, said), images).check()


def upright_size(image: Any) -> tuple[int, int]:
    """(width, height), without decoding the pixels; of a file only its beginning is read.

    Raises:
      BadRecordError, CorruptImageError: no such file, or no image in it.
    """
    if not isinstance(image, Path):
        return _size_of(open_image(image))
    with _reading(image), open(image, "rb") as file:
        beginning = file.read(_HEADER)
        try:
            return _size_of(open_image(beginning))
        except CorruptImageError:  # long metadata, or a format that needs all of it
            return _size_of(open_image(beginning + file.read()))


def read_image(image: Any) -> Any:
    """What `mmjax.data.image.decode` takes.

    Raises:
      BadRecordError: no such file.
    """
    if not isinstance(image, Path):
        return image
    with _reading(image):
        return image.read_bytes()


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """A file that cannot be read is a bad record."""
    try:
        yield
    except OSError as error:
        raise BadRecordError(f"the image {path} cannot be read: {error.strerror}") from error


def _size_of(image: Image.Image) -> tuple[int, int]:
    # `getexif` alone would decode a PNG in search of metadata behind its pixels.
    lying = is_turned(image) and image.getexif()[_ORIENTATION] in _LYING
    return (image.height, image.width) if lying else image.size
