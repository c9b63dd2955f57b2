"""Checks that the configs of several models make."""

from __future__ import annotations

from mmjax.registry import check_choice

DTYPES = ("float32", "bfloat16", "float16")


def check_dtype(dtype: str) -> None:
    """Raises UnknownNameError (a ValueError) for a dtype that models do not compute in."""
    check_choice("dtype", dtype, DTYPES)
