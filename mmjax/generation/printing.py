"""Text as its tokens come."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class Printer:
    """Writes a text as its tokens come, whole characters at a time: for `stream` of a `Generator`.

    Args:
      decode: ids -> text.
      write: what is done with each piece of text; by default it is printed.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        write: Callable[[str], None] | None = None,
    ):
        self.decode = decode
        self.write = _print if write is None else write
        self.ids: list[int] = []
        self.written = 0

    def __call__(self, rows: list[list[int]]) -> None:
        self.ids += rows[0]
        text = self.decode(self.ids)
        # A character of several tokens is this one until it is whole.
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._write(text)

    def finish(self) -> None:
        """Writes what is left, and ends the line."""
        self._write(self.decode(self.ids) + "\n")

    def _write(self, text: str) -> None:
        self.write(text[self.written :])
        self.written = len(text)


def _print(text: str) -> None:
    print(text, end="", flush=True)
