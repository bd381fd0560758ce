"""The one exception that means: the user's input is wrong, and here is the cure."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from muco_ds.causes import cause_of
from muco_ds.distributed import signals
from muco_ds.ends import RunEnd, launcher_int
from muco_ds.lost_threads import told_of_lost_threads

_GRACE_S = 5.0


class UserError(ValueError):
    """A mistake in the user's input: one line that names the file, row or key and says what to change.

    Programs under launch/ and tools/ print it without a traceback and exit with status 2.

    Args:
        message: the line.
        on_every_rank: every rank is known to raise it, by `distributed.env.agree` or because it follows from what is
            equal on all of them; then rank 0 alone says it.
    """

    def __init__(self, message: str, *, on_every_rank: bool = False) -> None:
        super().__init__(message)
        self.on_every_rank = on_every_rank


@contextmanager
def exit_on_user_error(end: RunEnd | None = None) -> Iterator[None]:
    """Turn a UserError into `error: ...` on stderr and exit status 2, in one voice. A context manager and a decorator.

    Rank 0 speaks at once. Another rank speaks only where rank 0 may not know: it gives the launcher time to end it,
    which happens where rank 0 met the same mistake, and if it is still there then it says the line with its rank.

    Any other exception ends one of several ranks too, with status 1, so that the launcher ends the others: after its
    traceback and one line; the line alone where that says all (memory, a killed worker), or where the exception only
    follows from what happened to another rank, which is given time to say it first. A single process raises it.

    Args:
        end: the run whose end is written down.
    """
    try:
        with told_of_lost_threads(lambda: _end_without_memory(end)):
            yield
    except UserError as error:
        _leave(2, str(error), end, first=_rank() == 0, silent=_rank() != 0 and error.on_every_rank)
    except Exception as error:
        cause = cause_of(error)
        if not _ranks() and (cause.consequence or not cause.known):
            if end is not None:
                end.record(1, cause.line)
            raise
        if not cause.known:
            traceback.print_exc()
        _leave(1, cause.line, end, first=not cause.consequence)


def _end_without_memory(end: RunEnd | None) -> NoReturn:
    _say(1, cause_of(MemoryError("out of memory for a thread")).line, end, first=True)
    os._exit(1)


def _leave(status: int, line: str, end: RunEnd | None, *, first: bool, silent: bool = False) -> NoReturn:
    """Say and record why, and go. What is not known to be the `first` thing that went wrong lets that be said first."""
    # Launchers end the ranks that are left, by signals that must not pass this end for another.
    if threading.current_thread() is threading.main_thread() and _ranks():
        signals.ignore()
        if status == 2:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # whoever ended first met the same mistake
    if not silent:
        _say(status, line, end, first)
    if not _ranks():
        sys.exit(status)
    # The interpreter's own end destroys the collectives' threads while other ranks may still be using them, which now
    # and then aborts the process instead (seen with gloo: status -6), and may wait for what never comes.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _say(status: int, line: str, end: RunEnd | None, first: bool) -> None:
    rank = _rank()
    if not first:
        # One after the other, so that of many ranks that lost the same one few say so.
        wait_s = _GRACE_S + 0.1 * min(rank, 100)
        other = None
        if end is None:
            time.sleep(wait_s)
        else:
            other = end.of_another(wait_s)
        if other is not None:
            if (
                launcher_int("LOCAL_RANK") == 0
                and not _beside(other.rank)
                and not (status == 2 and other.cause == line)
            ):
                said = "" if other.cause == line else f"; rank {other.rank} said: {other.cause}"
                print(f"error: rank {rank}: {line}{said}", file=sys.stderr, flush=True)
            return
    if end is not None:
        end.record(status, line)
        sys.stderr.write("\n")  # a progress bar may stand there
    everyone = rank == 0 and (status == 2 or not _ranks())
    print(f"error: {line}" if everyone else f"error: rank {rank}: {line}", file=sys.stderr, flush=True)


def _beside(rank: int) -> bool:
    """Whether that rank is on this machine, where what it says is read together with what this one says."""
    first = launcher_int("RANK") - launcher_int("LOCAL_RANK")
    here = launcher_int("LOCAL_WORLD_SIZE") or launcher_int("LOCAL_SIZE") or launcher_int("SLURM_NTASKS_PER_NODE")
    return first <= rank < first + here


def _rank() -> int:
    # LOCAL_RANK too, for programs that the launcher starts but that never form a group.
    return launcher_int("RANK") or launcher_int("LOCAL_RANK")


def _ranks() -> bool:
    return launcher_int("WORLD_SIZE") > 1
