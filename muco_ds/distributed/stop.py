"""Stopping together: a signal on any rank ends all of them after the same step."""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist

EXIT_REQUEUE = 75
"""Exit status after a signal: saved, not finished (BSD's EX_TEMPFAIL). A job script can requeue on it."""


class StopSignal:
    """Remembers SIGUSR1 and SIGTERM; `agreed()` is True on every rank at the same step once any rank got one.

    Ranks ask each other over the CPU, and read the answer one step later, so neither a GPU nor a step waits for it.
    """

    def __init__(self) -> None:
        self._received = False
        several = dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo") if several else None
        self._asked: tuple[torch.Tensor, dist.Work | None] | None = None
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._remember)

    def _remember(self, _number: int, _frame: FrameType | None) -> None:
        self._received = True

    def agreed(self) -> bool:
        """Call once a step on every rank."""
        stop = False
        if self._asked is not None:
            flag, work = self._asked
            if work is not None:
                work.wait()
            stop = bool(flag.item())
        flag = torch.tensor([float(self._received)])
        work = None
        if self._group is not None:
            work = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._asked = (flag, work)
        return stop
