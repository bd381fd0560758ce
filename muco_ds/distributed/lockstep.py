"""Ranks compare notes before each step: who diverged is named, not waited for, and a signal to one stops all."""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist

from muco_ds.data.schema import StepBatch
from muco_ds.distributed import env
from muco_ds.errors import UserError

EXIT_REQUEUE = 75
"""Exit status after a signal: saved, not finished (BSD's EX_TEMPFAIL). A job script can requeue on it."""

_SAME = ("step", "plan", "packs")
_OWN = ("query rows", "target rows", "negative rows")


class Lockstep:
    """One small exchange a step, over the CPU: a GPU never waits for it.

    Made by every rank at the same point (it opens a process group); SIGUSR1 and SIGTERM are remembered from then on.
    """

    def __init__(self) -> None:
        self._stop = False
        self._group = dist.new_group(backend="gloo") if env.world_size() > 1 else None
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._remember)

    def _remember(self, _number: int, _frame: FrameType | None) -> None:
        self._stop = True

    def stop_before(self, batch: StepBatch, *, now: bool = False) -> bool:
        """Whether any rank was told to stop, the same answer on every rank. Collective, before a batch is trained on.

        Args:
            now: this rank has a reason of its own to stop.
        Raises:
            UserError: on every rank, when ranks are about to do different things: names the first such rank and what
                differs. Without it they would wait for each other in a collective for ever.
        """
        mine = torch.tensor([int(self._stop or now), batch.step, batch.plan_digest, len(batch.packs), *_held(batch)])
        notes = [mine]
        if self._group is not None:
            notes = [torch.empty_like(mine) for _ in range(env.world_size())]
            dist.all_gather(notes, mine, group=self._group)
        rows = [note.tolist() for note in notes]
        for rank, (_, *same_and_own) in enumerate(rows):
            planned = batch.rows_per_rank[rank]
            expected = [*rows[0][1:4], planned.queries, planned.targets, planned.negatives]
            for name, value, due in zip((*_SAME, *_OWN), same_and_own, expected, strict=True):
                if value != due:
                    raise UserError(
                        f"rank {rank} differs at step {batch.step + 1}: {name} {value} instead of {due}: "
                        "are the code, the data, the length index and the recipe the same on all machines?",
                        on_every_rank=True,
                    )
        return any(row[0] for row in rows)


def _held(batch: StepBatch) -> list[int]:
    counts = [pack.counts for pack in batch.packs]
    return [sum(c.queries for c in counts), sum(c.targets for c in counts), sum(c.negatives for c in counts)]
