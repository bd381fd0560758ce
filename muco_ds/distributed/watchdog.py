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
    """Each rank watches itself; in a hang all of them write. From here to the first step it rests.

    Args:
        folder: stacks go to `folder/rank_N.txt`, which is removed at the end if it stayed empty.
        least_s: a step is never called late before this many seconds.
        times: nor before this many times the median of the last steps.
        rest_s: nor a rest before this many, or three times the longest of its kind. A step is late after as many, too:
            with less than the collectives' time-out, which ends a run, the stacks are there before.

    `limit_s`: seconds after which what goes on now is late.
    """

    def __init__(self, folder: Path, *, least_s: float = 120.0, times: float = 20.0, rest_s: float = 1500.0) -> None:
        self._least_s, self._times, self._rest_s = least_s, times, rest_s
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"rank_{env.rank()}.txt"
        self._file = open(self._path, "a")  # noqa: SIM115 - faulthandler writes to it when Python no longer can
        self._seconds: deque[float] = deque(maxlen=20)
        self._rests: dict[str, float] = {}
        self._start: float | None = None
        self._arm(rest_s)

    def _arm(self, limit_s: float) -> None:
        self.limit_s = limit_s
        faulthandler.dump_traceback_later(limit_s, file=self._file)

    @property
    def usual_s(self) -> float | None:
        """Median of the last steps, from one edge to the next."""
        return statistics.median(self._seconds) if self._seconds else None

    @property
    def last_s(self) -> float | None:
        return self._seconds[-1] if self._seconds else None

    def step(self) -> None:
        """Call at the start of each step."""
        now = time.perf_counter()
        if self._start is not None:
            self._seconds.append(now - self._start)
        self._start = now
        usual = self.usual_s
        # Before the first step has a duration, compilation and caches may take long: ten times the least.
        limit_s = 10 * self._least_s if usual is None else max(self._least_s, self._times * usual)
        self._arm(min(limit_s, self._rest_s))

    @contextmanager
    def resting(self, what: str) -> Iterator[None]:
        """Around what is not a step (validation, checkpoints), by its name."""
        start = time.perf_counter()
        self._arm(max(self._rest_s, 3 * self._rests.get(what, 0.0)))
        self._start = None
        yield
        self._rests[what] = max(self._rests.get(what, 0.0), time.perf_counter() - start)

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        if self._path.stat().st_size == 0:
            self._path.unlink()
            with suppress(OSError):  # another rank's file is still there, or another rank was quicker
                self._path.parent.rmdir()
