"""For which hardware a model is being traced: what kernels and layouts are chosen by."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_target: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Within the block, models are traced for `platform` ("cpu", "gpu" or "tpu").

    Needed only when compiling for hardware that this process does not own.
    """
    token = _target.set(platform)
    try:
        yield
    finally:
        _target.reset(token)


def platform() -> str:
    """The platform being compiled for: "cpu", "gpu" or "tpu"."""
    return _target.get() or jax.default_backend()
