"""Does a job that ended go back into the queue? By how it ended, how the ends before did, and what was saved between.

Reads `ends.jsonl` of the run's folder, where ranks that know why a run ended left a line, and keeps
`job/restarts.jsonl`, one line per end of the job's script.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from muco_ds import ends
from muco_ds.distributed.signals import EXIT_REQUEUE
from muco_ds.errors import UserError

FINISHED, USER_ERROR, SAVED = 0, 2, EXIT_REQUEUE
"""Exit statuses."""

RESTARTS = "job/restarts.jsonl"


@dataclass(frozen=True)
class End:
    """One end of a job's script.

    Args:
        job: SLURM's number of the job, the same through all restarts.
        progress: step of the newest checkpoint; of an evaluation, the number of data sets that are done.
    """

    job: str
    restart: int
    status: int
    cause: str
    progress: int

    def like(self, other: End) -> bool:
        """Whether both ended the same way. Numbers in a cause (bytes, ports, steps) may differ."""
        return self.status == other.status and _numberless(self.cause) == _numberless(other.cause)


def _numberless(cause: str) -> str:
    return re.sub(r"0x[0-9a-f]+|\d+(\.\d+)?", "#", cause)


def settle(srun_status: int, lines: list[ends.End]) -> tuple[int, str]:
    """Status and cause of an end, from what srun says and from the lines that ranks left.

    srun gives the highest status of any task, and that is 137 or 143 of a rank that was ended because another failed:
    ranks know better. Ranks that were told to end because another died say 75, and srun another number; after a save it
    may say 143, of a rank that was on its way out when the first one's 75 had srun end the others.
    """
    if srun_status == FINISHED:
        return FINISHED, "finished"
    known = [line for line in lines if line.status != FINISHED]
    wanted = [line for line in known if line.status == USER_ERROR]
    wanted = wanted or [line for line in known if line.status != SAVED]
    if srun_status in (SAVED, 128 + signal.SIGTERM):
        wanted = wanted or [line for line in known if line.status == SAVED]
    if wanted:
        return wanted[0].status, wanted[0].cause
    if srun_status == USER_ERROR:
        return USER_ERROR, "an error in the input"
    if srun_status == SAVED:
        return SAVED, "a signal"
    if srun_status > 128:
        number = srun_status - 128
        name = signal.Signals(number).name if number in list(signal.Signals) else f"signal {number}"
        return srun_status, f"a rank was ended by {name}{_KILLERS.get(name, '')}"
    return srun_status, f"status {srun_status}, and no rank said why"


_KILLERS = {"SIGKILL": ": by hand, or by the kernel or SLURM for its memory", "SIGBUS": ": shared memory is full"}


def reason_to_stop(history: list[End], limit: int) -> str | None:
    """Why the job must not be requeued after the last of its ends, oldest first; None: it may.

    `limit` ends in a row that are alike, or twice as many of any kind, without progress between them.
    """
    last = history[-1]
    if last.status == USER_ERROR and len(history) == 1:
        return "it won't mend itself"  # later, a machine or a disk may have changed, not the input
    stuck = alike = 0
    for end in reversed(history):
        if end.progress != last.progress:
            break
        alike += alike == stuck and end.like(last)
        stuck += 1
    if alike >= limit:
        return f"{alike} ends in a row like this, with nothing new saved between them"
    if stuck >= 2 * limit:
        return f"{stuck} ends in a row, with nothing new saved between them"
    return None


def progress(folder: Path) -> int:
    """What is saved below the folder: the newest checkpoint's step, or the number of data sets evaluated."""
    steps = [int(path.parent.name[len("step_") :]) for path in folder.glob("checkpoints/step_*[0-9]/manifest.json")]
    return max(steps, default=0) or sum(1 for _ in folder.glob("*_datasets/*"))


def record(folder: Path, job: str, restart: int, srun_status: int) -> list[End]:
    """Note that the job's script ended; returns all ends of this job, oldest first.

    Raises:
        UserError: the folder can't be written.
    """
    lines = [line for line in ends.read_ends(folder) if (line.job, line.restart) == (job, restart)]
    end = End(job, restart, *settle(srun_status, lines), progress(folder))
    if not any(line.status == end.status for line in lines):  # kill -9, or an end before the ranks could write
        ends.record_end(folder, end.status, end.cause)
    now = {"time": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    names = End.__annotations__
    before = [
        End(**{name: line[name] for name in names}) for line in _lines(folder / RESTARTS) if line.keys() >= {*names}
    ]
    _append(folder / RESTARTS, now | asdict(end))
    return [*(other for other in before if other.job == job), end]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file that killed writers may have left half a line in."""
    if not path.exists():
        return
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict):
            yield line


def _append(path: Path, line: dict[str, Any]) -> None:
    try:
        ends.append_line(path, line)
    except OSError as error:
        raise UserError(f"can't write '{path}' ({error.strerror}): free space, then submit the job again") from error
