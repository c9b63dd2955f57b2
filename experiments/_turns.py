"""Rivals in processes of their own, which work in turns.

Neither memory nor threads are shared, and a machine whose speed drifts drifts for all.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


@contextmanager
def rivals(sides: Mapping[str, Callable[[Any], Any]], job: Any) -> Iterator[Callable[..., Any]]:
    """Yields `ask(name, method, *arguments)`, which calls a method of that side and waits.

    Args:
      sides: name -> a class, made with the job in its own process.
      job: what all of them do; it is pickled.
    """
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for name, side in sides.items():
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=_serve, args=(side, job, theirs), daemon=True))
        processes[-1].start()
        theirs.close()  # so that a side that dies is noticed
        pipes[name].recv()

    def ask(name: str, *request: Any) -> Any:
        pipes[name].send(request)
        return pipes[name].recv()

    yield ask
    for pipe, process in zip(pipes.values(), processes, strict=True):
        pipe.send(None)
        process.join()


def _serve(side: Callable[[Any], Any], job: Any, pipe: Any) -> None:
    """A side's process: answers requests until told to stop."""
    instance = side(job)
    pipe.send("ready")
    while (request := pipe.recv()) is not None:
        method, *arguments = request
        pipe.send(getattr(instance, method)(*arguments))
