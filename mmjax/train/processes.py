"""Several processes of one run: what happens to one of them must reach the others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils


class ProcessError(RuntimeError):
    """Another process of this run failed; its own message says why."""


def agree(ok: bool) -> bool:
    """Whether `ok` holds on every process. All of them must call it."""
    if jax.process_count() == 1:
        return ok
    return bool(np.all(multihost_utils.process_allgather(np.asarray(ok))))


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """A block that all processes enter, and that fails in all of them if it fails in one.

    Without it the others would wait in their next collective for a process that has gone.

    Args:
      what: names the block in the message of those that did not fail themselves.

    Raises:
      the error of this process, or ProcessError where only others had one.
    """
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    everywhere = agree(error is None)
    if error is not None:
        raise error
    if not everywhere:
        raise ProcessError(f"Another process failed while {what}; its own message says why.")
