"""Threads that end before their first line, for which CPython would wait for ever."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any


@contextmanager
def told_of_lost_threads(tell: Callable[[], object]) -> Iterator[None]:
    """Call `tell`, in a thread of its own, where a thread finds no memory to begin with.

    Whoever started that one waits in `Thread.start` for it to say that it runs, which it never will (seen with CPython
    3.11 under a limit of memory, in thread pools and where one was started for each checkpoint).
    """
    unraisable: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_look, args=(unraisable, tell), name="lost threads", daemon=True).start()
    before = sys.unraisablehook
    # A method in C: the lost thread has no memory for a single frame of Python.
    sys.unraisablehook = unraisable.put
    try:
        yield
    finally:
        sys.unraisablehook = before
        unraisable.put(None)


def _look(unraisable: SimpleQueue[Any], tell: Callable[[], object]) -> None:
    while (args := unraisable.get()) is not None:
        if issubclass(args.exc_type, MemoryError) and "in thread started by" in (args.err_msg or ""):
            tell()
        sys.__unraisablehook__(args)
        del args  # with the object that it is about


def _of_the_parent() -> None:
    """A forked child lacks the thread that looks."""
    sys.unraisablehook = sys.__unraisablehook__


os.register_at_fork(after_in_child=_of_the_parent)
