"""Steps whose gradient is not finite: all ranks skip them together, count them, and stop when they don't end."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import torch

from muco_ds.data.index import Index
from muco_ds.data.schema import StepBatch
from muco_ds.distributed import env
from muco_ds.errors import UserError

log = logging.getLogger(__name__)

_SHOWN = 3


class NonFiniteGuard:
    """Takes the optimizer's steps, but for those with an infinite or NaN gradient, on any rank.

    Args:
        limit: the run ends at this many such steps in a row.
        folder: the run's, where the rows of the last batch are then listed.
        index: names those rows.

    `grad_norm` is that of the last step, before clipping (a 0-d tensor where reading it would wait for the device);
    None where the step was skipped.
    """

    def __init__(self, limit: int, folder: Path, index: Index) -> None:
        self.limit, self.folder, self.index = limit, folder, index
        self.skipped = self.in_a_row = 0
        self.grad_norm: float | torch.Tensor | None = None

    def counts(self) -> dict[str, int]:
        """What a checkpoint keeps, for `restore`."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def restore(self, state: dict[str, int]) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]

    def step(self, engine: Any, batch: StepBatch, loss: torch.Tensor) -> None:
        """The engine's step after the backward of `batch`, whose local loss is `loss`. Collective.

        Raises:
            UserError: on every rank, at the last of too many skipped steps. Weights and checkpoints are untouched.
        """
        self.grad_norm = _step(engine)
        if self.grad_norm is not None:
            self.in_a_row = 0
            return
        self.skipped += 1
        self.in_a_row += 1
        if env.is_main():
            log.warning("step %d: the gradient is not finite: skipped (%d in a row)", batch.step + 1, self.in_a_row)
        if self.in_a_row >= self.limit:
            self._stop(batch, loss)

    def _stop(self, batch: StepBatch, loss: torch.Tensor) -> None:
        mine = {"loss": float(loss), "rows": [self.index.name(sample) for sample in batch.samples.tolist()]}
        ranks = env.from_all(mine)
        path = self.folder / f"nonfinite_step_{batch.step + 1:07d}.json"
        listed = f"all in {path}"
        if env.is_main():
            # Python writes NaN and Infinity, which JSON does not have: as text they are read by any tool.
            named = [{"rank": rank, **entry, "loss": str(entry["loss"])} for rank, entry in enumerate(ranks)]
            try:
                path.write_text(json.dumps(named, indent=1))
            except OSError as error:
                listed = f"{path} can't be written: {error.strerror}"
        rows = ", ".join([row for entry in ranks for row in entry["rows"]][:_SHOWN])
        raise UserError(
            f"step {batch.step + 1}: the gradient was not finite {self.in_a_row} times in a row (rows of the last "
            f"batch: {rows}, ... {listed}): start again with a lower optim.lr, which goes on from the "
            "newest checkpoint, or with a higher optim.max_skipped to get past these batches",
            on_every_rank=True,
        )


def _step(engine: Any) -> float | torch.Tensor | None:
    """Take the step; the norm of the ranks' averaged gradient before clipping, or None where it is not finite.

    Every rank gets the same answer, because it depends on that norm alone. From stage 1 on DeepSpeed skips by itself.
    """
    if engine.zero_optimization_stage() > 0:
        engine.step()
        if engine.was_step_applied():
            return engine.get_global_grad_norm()
        _forget_gradients(engine.optimizer)
        return None
    gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients))
    if not math.isfinite(norm):
        engine.zero_grad()
        return None
    engine.step()
    return norm


def _forget_gradients(optimizer: Any) -> None:
    """With the optimizer on the CPU, DeepSpeed 0.19.8's ZeRO 1 and 2 would add the next step's gradients to these."""
    if isinstance(getattr(optimizer, "averaged_gradients", None), dict):
        optimizer.averaged_gradients = dict.fromkeys(optimizer.averaged_gradients)
