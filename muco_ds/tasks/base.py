"""What every task is to the trainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from muco_ds.data.schema import StepBatch
from muco_ds.models.embedder import Embedder


@dataclass(frozen=True)
class TaskLoss:
    """`loss` is this rank's part, scaled so that the mean over ranks is the global mean; `stats` are local sums.

    Among them are `loss`, which sums to the global mean, and `rows`, what the others are divided by.
    """

    loss: torch.Tensor
    stats: dict[str, torch.Tensor]


class Task(Protocol):
    """Model and objective of a stage: a module whose forward the DeepSpeed engine runs, pack by pack.

    Parameters live in `embedder`, under the stock model's names. Where a pack holds dialogues, forward gives their
    embeddings.
    """

    embedder: Embedder

    def backward(self, engine: Any, batch: StepBatch, temperature: float | torch.Tensor) -> TaskLoss:
        """Gradient of the mean loss over the global batch, whatever this rank's packs. Collective."""
        ...

    def metrics(self, total: Mapping[str, float]) -> dict[str, float | None]:
        """For the log, from the sums over ranks of `TaskLoss.stats`; None where the task has no such number."""
        ...
