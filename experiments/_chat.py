"""A conversation on the terminal: what is typed is said, and lines that begin with / are orders."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmjax.data.image import CorruptImageError, decode
from mmjax.data.sources import existing
from mmjax.evaluate.chat import Dialogue, Speaker
from mmjax.registry import nearest

HELP = """Type a message, or:
  /image FILE   show a picture with the next message; several times for several
  /reset        forget the conversation
  /quit         leave (or press Ctrl-D)"""


def read_image(file: str | Path) -> bytes:
    """The encoded bytes of an image that can be decoded.

    Raises:
      DataNotFoundError: there is no such file.
      CorruptImageError: it is no image, or a broken one.
    """
    path = existing(file, "The image")
    data = path.read_bytes()
    try:
        decode(data)
    except CorruptImageError as error:
        raise CorruptImageError(f"{path} cannot be read: {error}") from error
    return data


class Terminal:
    """The conversation.

    Args:
      speaker: whom one talks with.
      system: what it is told first.
      images: encoded; they go with the first message.
      options: n -> options of the n-th answer; see `Generator.__call__`.
    """

    def __init__(
        self,
        speaker: Speaker,
        system: str,
        images: Sequence[bytes],
        options: Callable[[int], dict[str, Any]],
    ):
        self._speaker, self._system, self._options = speaker, system, options
        self._dialogue = Dialogue(speaker, system)
        self._images = list(images)
        self._answers = 0
        self._orders = {"image": self.image, "reset": self.reset, "help": self.help}

    def run(self, first: str | None = None) -> None:
        """Until the input ends or says /quit.

        Args:
          first: is said as if it had been typed.
        """
        self.help("")
        line = first
        while line is None or line.strip() != "/quit":
            if line is not None and line.strip():
                self._obey(line)
            try:
                line = input("> ")
            except (EOFError, KeyboardInterrupt):
                print(flush=True)
                return

    def image(self, file: str) -> None:
        if not self._speaker.sees:
            raise ValueError("The model takes no images: it reads text alone.")
        self._images.append(read_image(file))
        print(f"{len(self._images)} image(s) go with the next message.", flush=True)

    def reset(self, _: str) -> None:
        self._dialogue, self._images = Dialogue(self._speaker, self._system), []
        print("The conversation is forgotten.", flush=True)

    def help(self, _: str) -> None:
        print(HELP, flush=True)

    def say(self, text: str) -> None:
        options = self._options(self._answers)
        self._dialogue.say(text, self._images, stream=True, **options)
        self._answers += 1
        self._images = []

    def _obey(self, line: str) -> None:
        """What cannot be done is told, and the conversation goes on."""
        try:
            if not line.startswith("/"):
                return self.say(line)
            order, _, rest = line[1:].strip().partition(" ")
            if order not in self._orders:
                known = [f"/{name}" for name in (*self._orders, "quit")]
                raise ValueError(f"There is no order /{order}; {nearest(f'/{order}', known)}")
            self._orders[order](rest.strip())
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            print("\nStopped; that message and its answer are forgotten.", flush=True)
