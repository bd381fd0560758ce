"""What an exception means for a run, in one line with the cure where one is known."""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass

_MEMORY = re.compile(r"out of memory|(can't|cannot) allocate memory|not enough memory|ALLOC_FAILED", re.IGNORECASE)
_GPU = re.compile(r"\b(cuda|hip|nccl)\b|ALLOC_FAILED", re.IGNORECASE)
_WORKER = re.compile(r"DataLoader worker \(pid.*?\) (is killed by signal: [\w ]+|exited unexpectedly)")
_WHERE = re.compile(r"^\[[^\]]*\.(?:cc|cpp|h):\d+\] ?")
_ADVICE = re.compile(r"\.? *This is typically caused by .*")
_SILENCE = re.compile(r"timed? ?out|timeout", re.IGNORECASE)
_COLLECTIVE = re.compile(
    r"connection (closed|reset|refused)|broken pipe|socket closed|no route to host|gloo|nccl|"
    r"(timed out|timeout) (waiting|after)|application timeout|read error",
    re.IGNORECASE,
)
_LOST = ("DistError", "DistBackendError", "DistNetworkError", "DistStoreError", "DistQueueEmptyError")


@dataclass(frozen=True)
class Cause:
    """Why a process ends.

    Args:
        line: one line.
        known: it says all there is to say: the traceback adds nothing.
        consequence: of what happened to another rank, which knows the cause.
    """

    line: str
    known: bool = False
    consequence: bool = False


def cause_of(error: Exception) -> Cause:
    """What `error` means. Of torch's errors it reads names and words: most are plain RuntimeErrors."""
    names = {kind.__name__ for kind in type(error).__mro__}
    text = _telling_line(error)
    if isinstance(error, MemoryError) or "OutOfMemoryError" in names or _MEMORY.search(text):
        cure = "lower batch.pack_tokens, or let tools/preflight.py --tune choose what is recomputed"
        if "OutOfMemoryError" not in names and not _GPU.search(text):
            cure = "give the job more host memory, or lower data.workers or batch.pack_tokens"
        return Cause(f"{text or 'out of memory'}: {cure}", known=True)
    if "can't start new thread" in text:
        cure = (
            "memory, or what a user may start (ulimit -u, a container's limit of processes), ran out: give the job more"
        )
        return Cause(f"{text}: {cure}", known=True)
    if (worker := _WORKER.search(str(error))) is not None:
        cure = "lower data.workers, or give the job more memory (a container: more --shm-size)"
        return Cause(f"a data loader's worker {worker[1]}: {cure}", known=True)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = "" if error.filename is None else f" ({error.filename})"
        return Cause(f"{error.strerror}{where}: free space and start again, the run goes on", known=True)
    if names.intersection(_LOST) or (isinstance(error, RuntimeError) and _COLLECTIVE.search(text)):
        if _SILENCE.search(text):
            return Cause(
                f"heard nothing of another rank within run.timeout_s ({text}): it hangs, as its stack in the run's "
                "folder stacks/ may show, or the network between the machines is cut",
                known=True,
                consequence=True,
            )
        cure = "see what that one said last; if nothing, it was killed, by hand or where memory ran out"
        return Cause(f"lost another rank ({text}): {cure}", known=True, consequence=True)
    kind = f"{type(error).__name__}: "
    return Cause(kind + text.removeprefix(kind))


def _telling_line(error: Exception) -> str:
    """The message's first line without gloo's places and advice; of a worker's error with its traceback, the last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return ""
    line = lines[-1] if lines[0].startswith("Caught ") else lines[0]
    return _ADVICE.sub("", _WHERE.sub("", line))
