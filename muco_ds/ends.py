"""`runs/NAME/ends.jsonl`: one line for each end of a run, by the rank that knows why. What ended it is never lost."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from muco_ds.distributed.signals import EXIT_REQUEUE

ENDS_FILE = "ends.jsonl"
MAX_CAUSE = 600


@dataclass(frozen=True)
class End:
    """One end of a run.

    Args:
        time: ISO 8601, UTC.
        step: Optimizer steps that were known to be taken; None: it ended before its first.
        status: Exit status: 0 finished, 75 told to stop, 2 a mistake of the user's, else a crash.
        cause: One line.
        rank: Who wrote it.
        job: SLURM_JOB_ID, or None.
        restart: SLURM_RESTART_COUNT, or 0.
    """

    time: str
    step: int | None
    status: int
    cause: str
    rank: int
    job: str | None
    restart: int


def record_end(folder: Path, status: int, cause: str, step: int | None = None) -> None:
    """Append a line to `folder`'s ends. Where it can't be written it is lost: what ends a run must not hide its cause.

    The line is one write of less than a page: lines of ranks that end together do not mix.
    """
    end = End(
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        step=step,
        status=status,
        cause=" ".join(cause.split())[:MAX_CAUSE],
        rank=launcher_int("RANK"),
        job=os.environ.get("SLURM_JOB_ID"),
        restart=launcher_int("SLURM_RESTART_COUNT"),
    )
    with suppress(OSError):
        append_line(folder / ENDS_FILE, asdict(end))


def append_line(path: Path, values: Mapping[str, Any]) -> None:
    """Append a JSON line by a single write, on a line of its own. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(file).st_size
        cut = size > 0 and os.pread(file, 1, size - 1) != b"\n"  # a full disk took a part of the line before
        line = ("\n" * cut + json.dumps(values) + "\n").encode()
        if os.write(file, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(file)


def read_ends(folder: Path) -> list[End]:
    """All ends of a run, in the order they were written; what a killed or hindered writer left behind is skipped."""
    try:
        lines = (folder / ENDS_FILE).read_bytes().splitlines()
    except OSError:
        return []
    ends = []
    for line in lines:
        with suppress(ValueError, TypeError):  # cut short, or of other fields
            ends.append(End(**json.loads(line)))
    return ends


class RunEnd:
    """This process's part in the end of a run.

    Args:
        folder: of the run.

    Attributes:
        steps: says how many steps are known to be taken; None before the first.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.steps: Callable[[], int | None] = lambda: None
        self._earlier = len(read_ends(folder))

    def record(self, status: int, cause: str) -> None:
        """Write it down."""
        record_end(self.folder, status, cause, self.steps())

    def forced(self, cause: str) -> None:
        """Say and write down, once among the ranks, that a signal ended the run unsaved (`signals.listen`)."""
        if launcher_int("RANK") and self.of_another(0.5):
            return
        self.record(EXIT_REQUEUE, cause)
        os.write(2, f"\n{cause}\n".encode())  # not print: the main thread may hold its lock

    def of_another(self, wait_s: float) -> End | None:
        """The first end that another rank wrote down since this process started, within `wait_s` seconds from now."""
        deadline = time.monotonic() + wait_s
        while True:
            for end in read_ends(self.folder)[self._earlier :]:
                if end.rank != launcher_int("RANK"):
                    return end
            if time.monotonic() >= deadline:
                return None
            time.sleep(0.1)


def launcher_int(name: str) -> int:
    """A launcher's variable; 0 where it is none, which is among the mistakes to be told."""
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else 0
