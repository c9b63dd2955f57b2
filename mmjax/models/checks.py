"""Checks that the configs of several models make."""

from __future__ import annotations

from collections.abc import Iterable

from mmjax.registry import UnknownNameError, nearest

DTYPES = ("float32", "bfloat16", "float16")


def check_choice(field: str, value: str, options: Iterable[str]) -> None:
    """Raises UnknownNameError (a ValueError) if `value` is none of the options."""
    options = tuple(options)
    if value not in options:
        raise UnknownNameError(f"{field}={value!r} does not exist; {nearest(value, options)}")


def check_dtype(dtype: str) -> None:
    """Raises UnknownNameError (a ValueError) for a dtype that models do not compute in."""
    check_choice("dtype", dtype, DTYPES)
