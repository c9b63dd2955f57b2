"""Strings that end a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np


class StopStrings:
    """Finds stop strings in what was generated; false where there are none.

    Args:
      strings: one or several.
      decode: ids -> text.

    Raises:
      ValueError: if strings are given and `decode` is not, or an empty string is.
    """

    def __init__(self, strings: str | Sequence[str], decode: Callable[[list[int]], str] | None):
        self.strings = (strings,) if isinstance(strings, str) else tuple(strings)
        if self.strings and decode is None:
            raise ValueError("stop_strings are looked for in text: give decode=tokenizer.decode.")
        if not all(self.strings):
            raise ValueError("An empty stop string ends every text at once; leave it out.")
        self.decode = decode

    def __bool__(self) -> bool:
        return bool(self.strings)

    def cut(
        self, tokens: np.ndarray, lengths: np.ndarray, done: np.ndarray, told: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Texts end with the token that completes a stop string.

        Args:
          tokens: [B, S] so far; lengths, done: [B].
          told: how many of them were looked at before.

        Returns:
          New lengths and done.
        """
        lengths, done = lengths.copy(), done.copy()
        for row, length in enumerate(lengths):
            ids = tokens[row, :length].tolist()
            if length > told and self._stops(ids):
                ends = range(told + 1, length + 1)
                lengths[row] = next(n for n in ends if self._stops(ids[:n]))
                done[row] = True
        return lengths, done

    def _stops(self, ids: list[int]) -> bool:
        text = self.decode(ids)
        return any(string in text for string in self.strings)
