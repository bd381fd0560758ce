"""A thread that works beside the main one, and that can't fail to start in the middle of a run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

_LOOK_S = 0.5


class Helper:
    """Does one piece of work after the other in a thread that lives as long as the process.

    It is started once, early: `Thread.start` waits for ever for a thread that finds no memory as it begins (seen with
    CPython 3.11 when one was started for each checkpoint), and then a rank that is out of memory would hold all others.

    Args:
        name: the thread's.
    """

    def __init__(self, name: str) -> None:
        self.error: Exception | None = None
        self._orders: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._working = threading.Lock()  # not an Event: to release a lock takes no memory
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def begin(self, work: Callable[[], object]) -> None:
        """Have `work` done; what was begun before must be over. `error` will be what it raised."""
        if not self._working.acquire(blocking=False):
            raise AssertionError(f"{self._thread.name}: begun before what it does was over")
        self.error = None
        self._orders.put(work)

    def wait(self, seconds: float | None = None) -> bool:
        """Whether the work is over, after that many seconds at most; None: however long it takes."""
        left = float("inf") if seconds is None else seconds
        while not self._working.acquire(timeout=max(0.0, min(left, _LOOK_S))):
            left -= _LOOK_S
            if not self._thread.is_alive():
                self.error = MemoryError(f"the thread '{self._thread.name}' ended")
                return True
            if left <= 0:
                return False
        self._working.release()
        return True

    def _serve(self) -> None:
        while True:
            work = self._orders.get()
            try:
                work()
            except Exception as error:
                self.error = error
            finally:
                del work  # with what it holds: an idle thread keeps nothing alive
                self._working.release()
