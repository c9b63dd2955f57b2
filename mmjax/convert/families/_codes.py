"""The ids of image codes in a vocabulary, by the names of tokens in a `vocabulary_map`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from mmjax.models.unified import CodesConfig

_ADVICE = "it must be that of the checkpoint's own tokenizer."


def id_of(vocabulary: Mapping[str, int] | None, name: str) -> int:
    """Raises ValueError if there is no such token."""
    found = (vocabulary or {}).get(name)
    if found is None:
        raise ValueError(f"vocabulary_map has no {name!r}; {_ADVICE}")
    return found


def code_ids(
    vocabulary: Mapping[str, int] | None, pattern: str, read: Callable[[str], int], size: int
) -> tuple[int, ...]:
    """The id of each code.

    Args:
      vocabulary: the id of each token.
      pattern: of the names of codes; it has one group.
      read: what is in the group -> the code.
      size: number of codes.

    Raises:
      ValueError: if the names are not those of all codes.
    """
    found = {
        read(match[1]): number
        for name, number in (vocabulary or {}).items()
        if (match := re.fullmatch(pattern, name))
    }
    if found.keys() != set(range(size)):
        raise ValueError(
            f"vocabulary_map has names of {len(found)} codes, but the image tokenizer has {size}, "
            f"the codes 0 to {size - 1}; {_ADVICE}"
        )
    return tuple(found[code] for code in range(size))


def check_marks(image: CodesConfig, *marks: str) -> None:
    """Raises ValueError if there is none where the format has a token."""
    missing = [mark for mark in marks if getattr(image, mark) is None]
    if missing:
        raise ValueError(f"image.{missing[0]}=None, but images of the format have such a token")
