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


def names_of(image: CodesConfig, marks: Mapping[str, str], code: str) -> dict[str, int]:
    """The part of a `vocabulary_map` that says the ids of images.

    Args:
      marks: the name of each mark, by its field of `CodesConfig`.
      code: the name of a code, with a place for its number: "code {}".

    Raises:
      ValueError: if there is no such mark.
    """
    missing = [field for field in marks if getattr(image, field) is None]
    if missing:
        raise ValueError(f"image.{missing[0]}=None, but the format has a token for it")
    ids = enumerate(image.all_ids.tolist())
    return {marks[field]: getattr(image, field) for field in marks} | {
        code.format(number): token for number, token in ids
    }
