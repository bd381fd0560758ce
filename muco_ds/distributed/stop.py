"""Stopping together: a signal on any rank ends all of them after the same step."""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist

EXIT_REQUEUE = 75
"""Exit status after a signal: saved, not finished (BSD's EX_TEMPFAIL). The job scripts requeue on it."""


class StopSignal:
    """Remembers SIGUSR1 and SIGTERM; `agreed()` is True on every rank at the same step once any rank got one.

    The answer of a step is exchanged while the next one computes, so a GPU never waits for it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._received = False
        self._pending: tuple[torch.Tensor, dist.Work | None] | None = None
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._remember)

    def _remember(self, _number: int, _frame: FrameType | None) -> None:
        self._received = True

    def agreed(self) -> bool:
        """Call once a step on every rank."""
        stop = False
        if self._pending is not None:
            flag, work = self._pending
            if work is not None:
                work.wait()
            stop = bool(flag.item())
        flag = torch.tensor([float(self._received)], device=self._device)
        group = dist.is_initialized() and dist.get_world_size() > 1
        work = dist.all_reduce(flag, op=dist.ReduceOp.MAX, async_op=True) if group else None
        self._pending = (flag, work)
        return stop
