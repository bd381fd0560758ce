"""launch/train.py whose last rank gets a NaN gradient in the steps that POISONED lists; says whether weights moved."""

from __future__ import annotations

import os
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from muco_ds.data.schema import PackedBatch, RowCounts, StepBatch
from muco_ds.distributed import env
from muco_ds.tasks.muco import MuCoTask, TaskLoss
from muco_ds.trainer import Trainer

POISONED = {int(step) for step in os.environ["POISONED"].split(",")}
loss, train_step = MuCoTask.loss, Trainer.train_step
step = 0


def poisoned_loss(
    self: MuCoTask,
    emb_parts: Sequence[torch.Tensor],
    packs: Sequence[PackedBatch],
    rows: list[RowCounts],
    temperature: float | torch.Tensor,
) -> TaskLoss:
    """The loss and what other ranks see of it stay finite: a backward pass overflows on one rank."""
    if step in POISONED and env.rank() == env.world_size() - 1:
        emb_parts = [_Overflow.apply(emb_ED) for emb_ED in emb_parts]
    return loss(self, emb_parts, packs, rows, temperature)


class _Overflow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, emb_ED: torch.Tensor) -> torch.Tensor:
        return emb_ED.clone()

    @staticmethod
    def backward(ctx: Any, grad_ED: torch.Tensor) -> torch.Tensor:
        return grad_ED * float("nan")


def watched_step(self: Trainer, batch: StepBatch) -> dict[str, torch.Tensor]:
    global step
    step = batch.step + 1
    before = self._probe()
    try:
        return train_step(self, batch)
    finally:
        print(f"step {step}:", "same" if torch.equal(before, self._probe()) else "other", "weights", flush=True)


MuCoTask.loss = poisoned_loss  # type: ignore[method-assign]
Trainer.train_step = watched_step  # type: ignore[method-assign]
runpy.run_path(str(Path(__file__).parents[2] / "launch" / "train.py"), run_name="__main__")
