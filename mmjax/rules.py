"""Ordered tables of (regex over parameter path, value): the first match wins.

One mechanism says how parameters are sharded, which are trained, their learning rates and weight
decay, and where they are loaded from. A table must be exact: a parameter that no row covers and a
row that decides nothing are both errors, so that a renamed layer cannot silently lose its rule. The
idea is big_vision's (`utils.make_mask_trees`), made strict.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

Table = Sequence[tuple[str, Any]]


class RuleError(ValueError):
    """A table of rules does not fit the parameters of the model."""


def match(table: Table, paths: Iterable[str], *, name: str) -> dict[str, Any]:
    """The value of each parameter path.

    Patterns must match the whole path (`re.fullmatch`).

    Args:
      table: rows of (pattern, value).
      paths: parameter paths such as "image/layers/mlp/up/kernel".
      name: what the table is for; it stands in error messages.

    Raises:
      RuleError: listing every parameter that no row covers and every row that no parameter reaches,
        and every pattern that is no regular expression.
    """
    paths = list(paths)
    problems = []
    rows = []
    for row in table:
        try:
            pattern, value = row
            rows.append((re.compile(pattern), value))
        except (TypeError, ValueError, re.error) as error:
            problems.append(f"  row {row!r} is not (regular expression, value): {error}")
    matched = [False] * len(rows)
    reached = [False] * len(rows)
    values = {}
    for path in paths:
        for index, (pattern, value) in enumerate(rows):
            if pattern.fullmatch(path):
                matched[index] = True
                if path not in values:
                    reached[index] = True
                    values[path] = value
    problems += [f"  no row covers parameter {path!r}" for path in paths if path not in values]
    for (pattern, value), any_match, decides in zip(rows, matched, reached, strict=True):
        if not any_match:
            problems.append(f"  row ({pattern.pattern!r}, {value!r}) matches no parameter")
        elif not decides:
            problems.append(
                f"  row ({pattern.pattern!r}, {value!r}) decides nothing: earlier rows take all it "
                "matches"
            )
    if problems:
        raise RuleError(
            f"The table {name!r} does not fit the model:\n"
            + "\n".join(problems)
            + "\nPatterns match whole paths, the first match wins; "
            + "end a table with ('.*', value) to cover the rest.\n"
            + "The model's parameters are:\n"
            + "\n".join(f"  {path}" for path in paths)
        )
    return values
