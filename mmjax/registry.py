"""Named things: models, sources, augmentations, optimizers, evaluators."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

_PACKAGE = __name__.partition(".")[0]
# Modules outside of this package that registered something, in the order they did.
_plugins: dict[str, None] = {}


class UnknownNameError(ValueError):
    """A name that is not registered, or a key that does not exist."""


def nearest(name: str, options: Iterable[str]) -> str:
    """A phrase for error messages: the closest option, then all of them."""
    options = sorted(str(option) for option in options)
    close = difflib.get_close_matches(str(name), options, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Valid: {', '.join(options) or '(none)'}."


def check_choice(field: str, value: str, options: Iterable[str]) -> None:
    """Raises UnknownNameError (a ValueError) if `value` is none of the options."""
    options = tuple(options)
    if value not in options:
        raise UnknownNameError(f"{field}={value!r} does not exist; {nearest(value, options)}")


def plugins() -> list[str]:
    """Names of the modules outside of mmjax that have registered anything: what reads a run imports
    them again."""
    return list(_plugins)


class Registry(Generic[T]):
    """A mapping from a name to an object, filled by a decorator.

    Args:
      kind: what is registered, in the singular; it stands in error messages.
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        module = sys._getframe(1).f_globals["__name__"]  # who registers; not all entries say

        def add(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"The {self.kind} {name!r} is registered twice.")
            self._entries[name] = entry
            if module.partition(".")[0] != _PACKAGE:
                _plugins[module] = None
            return entry

        return add

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            raise UnknownNameError(
                f"There is no {self.kind} {name!r}; {nearest(name, self._entries)}"
            )
        return self._entries[name]

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def names(self) -> list[str]:
        return sorted(self._entries)
