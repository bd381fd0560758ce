"""What each rank says of itself while a run goes on: its log, a small heartbeat file, and its stack when it is late."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch

from muco_ds.distributed import env
from muco_ds.distributed.watchdog import Watchdog
from muco_ds.ends import read_ends
from muco_ds.errors import UserError
from muco_ds.heartbeat import ENDED, FAILED, LOADING, LOGGING, MEETING, STARTING, TRAINING, heartbeat_path
from muco_ds.rank_log import RankLog, restarts

EVERY_S = 10.0
MOST_WRITES_PER_S = 50
"""Of all ranks together: heartbeats of a large run come less often, for the sake of a network disk."""

_HOUR_S, _MARK_S = 3600.0, 60.0


class Health:
    """Of this rank; a context from the start of the run to its end. Before it is entered, nothing is written.

    A thread replaces the heartbeat, so that a slow disk never holds a step up, and so that a rank that hangs still says
    where it is and for how long. A rank that is stopped or gone says nothing.

    Args:
        folder: the run's.
        timeout_s: of the collectives; stacks are written before it ends the run.
        every_s: seconds between two heartbeats of a rank.
    """

    def __init__(self, folder: Path, *, timeout_s: float = 1800.0, every_s: float | None = None) -> None:
        self.folder, self._timeout_s = folder, timeout_s
        self.every_s = every_s or max(EVERY_S, env.world_size() / MOST_WRITES_PER_S)
        self._path = heartbeat_path(folder, env.rank())
        self._steps: int | None = None
        self._waited: float | None = None
        self._finished: bool | None = None
        self._error: str | None = None
        self._watchdog: Watchdog | None = None
        self._marks: deque[tuple[float, int]] = deque(maxlen=int(_HOUR_S / _MARK_S) + 1)
        self._now: tuple[str, int | None, float] = (STARTING, None, time.monotonic())  # phase, steps done, since
        self._woken, self._closed = threading.Event(), threading.Event()

    def __enter__(self) -> Health:
        """Collective. Raises UserError, on every rank: the run's folder can't be written."""
        with env.agreement():
            try:
                self._log = RankLog(self.folder, env.rank())
                self._path.parent.mkdir(parents=True, exist_ok=True)
                watchdog = Watchdog(self.folder / "stacks", rest_s=self._timeout_s * 5 / 6)
            except OSError as error:
                problem = f"run.dir: can't write to '{self.folder}' ({error.strerror}): set another folder"
                raise UserError(problem) from error
        started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        # Of one start on all ranks, and clocks are not asked which ends came after it: those beyond this count.
        start = {"started": started, "ends_before": len(read_ends(self.folder)) if env.is_main() else 0}
        self._watchdog = watchdog
        self._who = {
            **env.from_main(start),
            **{"rank": env.rank(), "world_size": env.world_size(), "host": socket.gethostname(), "pid": os.getpid()},
            **{"job": os.environ.get("SLURM_JOB_ID"), "restart": restarts(), "every_s": self.every_s},
        }
        self._process = psutil.Process()
        # This thread's, for the other one, which has its own.
        self._gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._watchdog is not None
        self._watchdog.close()
        if error is not None:
            self._error = (str(error).strip() or type(error).__name__).splitlines()[0][:500]
            self._log.failed(error, traceback=not isinstance(error, UserError))
        self._at(ENDED if error is None else FAILED, self._now[1])
        self._closed.set()
        self._woken.set()
        self._thread.join(5.0)  # a disk that hangs must not keep the process
        self._log.close()

    def begin(self, step: int, steps: int) -> None:
        """`step` steps are done, of `steps`."""
        self._steps = steps
        self._at(STARTING, step)
        self._woken.set()

    def loading(self) -> None:
        self._at(LOADING, self._now[1])

    def edge(self, waited: float) -> None:
        """Between two steps, after `waited` seconds for data."""
        if self._watchdog is not None:
            self._watchdog.step()
        self._waited = waited
        self._at(MEETING, self._now[1])
        _, step, since = self._now
        if step is not None and (not self._marks or since - self._marks[-1][0] >= _MARK_S):
            self._marks.append((since, step))

    def training(self) -> float:
        """The ranks have met; the seconds since `edge`."""
        _, step, since = self._now
        self._at(TRAINING, step)
        return self._now[2] - since

    def stepped(self, step: int) -> None:
        """`step` steps are done."""
        self._at(LOGGING, step)

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Around validation and saving; said at once."""
        if self._watchdog is None:
            yield
            return
        before = self._now[0]
        with self._watchdog.resting(phase):
            self._at(phase, self._now[1])
            self._woken.set()
            yield
            self._at(before, self._now[1])

    def end(self, finished: bool) -> None:
        """All steps are done, or a signal ended the run and its state is saved."""
        self._finished = finished

    def _at(self, phase: str, step: int | None) -> None:
        self._now = (phase, step, time.monotonic())

    def _beat(self) -> None:
        """Ranks write in turns; a change of phase is written at once."""
        due = time.monotonic() + self.every_s * env.rank() / env.world_size()
        while True:
            self._write()
            if self._closed.is_set():
                return
            while due <= time.monotonic():
                due += self.every_s
            self._woken.wait(due - time.monotonic())
            self._woken.clear()

    def _write(self) -> None:
        work = self._path.with_suffix(".tmp")
        with suppress(OSError):  # a full disk is for what must be saved to complain about
            work.write_text(json.dumps(self.facts()))
            os.replace(work, self._path)

    def facts(self) -> dict[str, Any]:
        """What the heartbeat says."""
        assert self._watchdog is not None
        phase, step, since = self._now
        now = time.monotonic()
        marks = [(at, done) for at, done in [*self._marks] if now - at <= _HOUR_S + _MARK_S]
        hour = None
        if step is not None and marks and step > marks[0][1]:
            hour = {"steps": step - marks[0][1], "seconds": since - marks[0][0]}
        gpu = None if self._gpu is None else torch.cuda.max_memory_allocated(self._gpu) / 2**30
        return {
            **self._who,
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "phase": phase,
            "phase_s": now - since,
            "late_s": self._watchdog.limit_s,
            "step": step,
            "steps": self._steps,
            "step_s": self._watchdog.last_s,
            "usual_step_s": self._watchdog.usual_s,
            "data_wait_s": self._waited,
            "last_hour": hour,
            "resident_gib": self._process.memory_info().rss / 2**30,
            "peak_gpu_gib": gpu,
            "open_files": self._process.num_fds(),
            "finished": self._finished,
            "error": self._error,
        }
