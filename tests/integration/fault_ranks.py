"""One process among several stops, runs out of memory or is killed: the others end soon, and one line says why.

The run in `out` can be finished afterwards, or disturbed again.
"""

from __future__ import annotations

import os
import resource
import signal
import time
from pathlib import Path

import psutil

from fault_arena import Arena, Outcome


def stopped(arena: Arena, out: Path, timeout_s: int = 20) -> Outcome:
    """SIGSTOP to one rank: it says nothing any more, and holds its connections open."""
    with arena.launched(out, {"run.timeout_s": timeout_s}) as run:
        os.kill(run.pid(1), signal.SIGSTOP)
        seconds, lines = run.ended(within=timeout_s + 60)  # the launcher kills what is stopped after 30 s
    assert len(lines) == 1 and "run.timeout_s" in lines[0], lines
    said = f"`{lines[0].removeprefix('error: ')[:160]} ...`"
    return Outcome(f"SIGSTOP of a rank (run.timeout_s {timeout_s})", 1, said, "nothing; resumed", seconds)


def out_of_memory(arena: Arena, out: Path) -> Outcome:
    """One rank may not allocate any more."""
    with arena.launched(out) as run:
        pid = run.pid(1)
        limit = psutil.Process(pid).memory_info().vms // 2  # it has its memory already, and gets no more
        resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit))
        seconds, lines = run.ended(within=60)
    assert len(lines) == 1 and "rank 1" in lines[0] and "memory" in lines[0], lines
    return Outcome("a rank out of memory", 1, f"`{lines[0].removeprefix('error: ')}`", "nothing; resumed", seconds)


def killed(arena: Arena, out: Path) -> Outcome:
    """kill -9 of one rank, as the kernel does it when memory is short."""
    with arena.launched(out) as run:
        os.kill(run.pid(1), signal.SIGKILL)
        seconds, lines = run.ended(within=60)
    said = f"`{lines[0].removeprefix('error: ')}`" if lines else "the launcher ended the others"
    return Outcome("kill -9 of one rank", 1, said, "nothing; resumed", seconds)


def killed_worker(arena: Arena, out: Path) -> Outcome:
    """kill -9 of a data loader's worker."""
    with arena.launched(out) as run:
        rank = psutil.Process(run.pid(0))
        workers = [child for child in rank.children() if child.name() != "pt_main_thread" or child.pid != rank.pid]
        start = time.monotonic()
        workers[0].kill()
        _, lines = run.ended(within=60)
        seconds = time.monotonic() - start
    assert any("data loader's worker" in line for line in lines), lines
    return Outcome("kill -9 of a data worker", 1, f"`{lines[0].removeprefix('error: ')}`", "nothing; resumed", seconds)
