"""Ranks compare notes before each step: who diverged is named, not waited for, and a signal to one stops all."""

from __future__ import annotations

import torch
import torch.distributed as dist

from muco_ds.data.schema import StepBatch
from muco_ds.distributed import env, signals
from muco_ds.errors import UserError

_SAME = ("step", "plan", "packs")
_OWN = ("query rows", "target rows", "negative rows")


class Lockstep:
    """One small exchange a step, over the CPU: a GPU never waits for it.

    Made by every rank at the same point (it opens a process group).

    Attributes:
        steps: taken before the last exchange; None before the first.
        stopped_by: the signal that ended the run, 0 if none did; the same on every rank.
    """

    def __init__(self) -> None:
        self.steps: int | None = None
        self.stopped_by = 0
        self._group = dist.new_group(backend="gloo") if env.world_size() > 1 else None

    def stop_before(self, batch: StepBatch, *, now: bool = False) -> bool:
        """Whether any rank was told to stop, the same answer on every rank. Collective, before a batch is trained on.

        Args:
            now: this rank has a reason of its own to stop.
        Raises:
            UserError: on every rank, when ranks are about to do different things: names the first such rank and what
                differs. Without it they would wait for each other in a collective for ever.
        """
        signals.remember()
        told = (signals.heard(), int(now))
        mine = torch.tensor([*told, batch.step, batch.plan_digest, len(batch.packs), *_held(batch)])
        self.steps = batch.step
        notes = [mine]
        if self._group is not None:
            notes = [torch.empty_like(mine) for _ in range(env.world_size())]
            dist.all_gather(notes, mine, group=self._group)
        rows = [note.tolist() for note in notes]
        for rank, (_, _, *same_and_own) in enumerate(rows):
            planned = batch.rows_per_rank[rank]
            expected = [*rows[0][2:5], planned.queries, planned.targets, planned.negatives]
            for name, value, due in zip((*_SAME, *_OWN), same_and_own, expected, strict=True):
                if value != due:
                    raise UserError(
                        f"rank {rank} differs at step {batch.step + 1}: {name} {value} instead of {due}: "
                        "are the code, the data, the length index and the recipe the same on all machines?",
                        on_every_rank=True,
                    )
        self.stopped_by = max(row[0] for row in rows)
        return self.stopped_by > 0 or any(row[1] for row in rows)


def _held(batch: StepBatch) -> list[int]:
    counts = [pack.counts for pack in batch.packs]
    return [sum(c.queries for c in counts), sum(c.targets for c in counts), sum(c.negatives for c in counts)]
