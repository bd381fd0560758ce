"""Told to stop: remembered once steps are taken, obeyed at a step's edge, and forced where that takes too long."""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

EXIT_REQUEUE = 75
"""Exit status after a signal: saved, not finished (BSD's EX_TEMPFAIL). A job script can requeue on it."""

STOPPING = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
_SETTLE_S = 2.0
"""Terminals, launchers and schedulers say one thing in up to four signals to the same process, within this time."""

_listener: Listener | None = None


class Listener:
    """Hears the signals of this process, in a thread of its own: the main thread may hang in a collective.

    Args:
        deadline_s: from the first signal to the end.
        last_words: called with the cause, in that thread, where the end is forced.
    """

    def __init__(self, deadline_s: float, last_words: Callable[[str], object]) -> None:
        self._deadline_s, self._last_words = deadline_s, last_words
        self.first = 0
        self.remembers = False
        self._read, write = os.pipe()
        os.set_blocking(write, False)
        # The interpreter's own handler, in C, writes the signal's number there, whatever the main thread is doing.
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=_only_for_the_parent)
        for number in STOPPING:
            signal.signal(number, self._remember)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.first = self.first or number

    def _listen(self) -> None:
        first, since = "", 0.0
        while True:
            left = max(0.0, since + self._deadline_s - time.monotonic()) if first else None
            if not select.select([self._read], [], [], left)[0]:
                self._force(f"{first}: not saved within run.deadline_s={self._deadline_s:g}, ended without")
            for number in os.read(self._read, 64):
                if number not in STOPPING:
                    continue
                name = f"signal {signal.Signals(number).name}"
                if not self.remembers:
                    self._force(f"{name} before the first step")
                elif not first:
                    first, since = name, time.monotonic()
                elif time.monotonic() - since > _SETTLE_S:
                    self._force(f"{first} and then {name}: ended without saving")

    def _force(self, cause: str) -> None:
        self._last_words(cause)
        for child in multiprocessing.active_children():  # they would wait for their parent's orders for ever
            child.kill()
        os._exit(EXIT_REQUEUE)


def listen(deadline_s: float, last_words: Callable[[str], object]) -> None:
    """From now on SIGUSR1, SIGTERM and SIGINT end this process with EXIT_REQUEUE: at once, for there is nothing to
    save before `remember`. Once in a process, in its main thread."""
    global _listener
    assert _listener is None
    _listener = Listener(deadline_s, last_words)


def remember() -> None:
    """From now on the first signal is remembered; a second one or the deadline forces the end."""
    if _listener is not None:
        _listener.remembers = True


def heard() -> int:
    """The first signal that this process remembers, 0 if there was none."""
    return 0 if _listener is None else _listener.first


def ignore() -> None:
    """This process is ending for another reason: signals neither hurry nor hide it. In the main thread."""
    if _listener is not None:
        signal.set_wakeup_fd(-1)
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


def _only_for_the_parent() -> None:
    """Forked helpers inherit the pipe: what they are told is not what the training process is told."""
    signal.set_wakeup_fd(-1)
