"""What is compiled."""

from __future__ import annotations

import collections
import contextlib
import logging
import re
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def compilations() -> Iterator[collections.Counter]:
    """How often each program is compiled within, by name: "jit(step)"."""
    compiled: collections.Counter = collections.Counter()

    class Listener(logging.Handler):
        def emit(self, record):
            found = re.match(r"Finished XLA compilation of (\S+)", record.getMessage())
            if found:
                compiled[found[1]] += 1

    listener, logger = Listener(), logging.getLogger("jax._src.dispatch")
    logger.addHandler(listener)
    try:
        with jax.log_compiles():
            yield compiled
    finally:
        logger.removeHandler(listener)
