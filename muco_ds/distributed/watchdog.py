"""A step that takes far longer than usual leaves every rank's stack in the run folder: where does it hang?"""

from __future__ import annotations

import faulthandler
import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from muco_ds.distributed import env


class Watchdog:
    """Each rank watches itself; in a hang all of them write.

    Args:
        folder: stacks go to `folder/rank_N.txt`, which is removed at the end if it stayed empty.
        least_s: a step is never called late before this many seconds.
        times: nor before this many times the median of the last steps.
    """

    def __init__(self, folder: Path, *, least_s: float = 120.0, times: float = 20.0) -> None:
        self._least_s, self._times = least_s, times
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"rank_{env.rank()}.txt"
        self._file = open(self._path, "a")  # noqa: SIM115 - faulthandler writes to it when Python no longer can
        self._seconds: deque[float] = deque(maxlen=20)
        self._start: float | None = None

    def step(self) -> None:
        """Call at the start of each step."""
        now = time.perf_counter()
        if self._start is not None:
            self._seconds.append(now - self._start)
        self._start = now
        usual = statistics.median(self._seconds) if self._seconds else 0.0
        # Before the first step has a duration, compilation and caches may take long: ten times the least.
        limit = max(self._least_s, self._times * usual) if self._seconds else 10 * self._least_s
        faulthandler.dump_traceback_later(limit, file=self._file)

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Around what is not a step: validation, checkpoints."""
        faulthandler.cancel_dump_traceback_later()
        self._start = None
        yield

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        if self._path.stat().st_size == 0:
            self._path.unlink()
            with suppress(OSError):  # another rank's file is still there, or another rank was quicker
                self._path.parent.rmdir()
