"""CoMa's first stage (arXiv 2511.08480): answers are predicted from compression tokens alone.

Shape suffixes: E predicted tokens of a pack, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from muco_ds.data.schema import PackedBatch, StepBatch
from muco_ds.distributed.gradient_cache import one_reduction
from muco_ds.metrics import CONTRASTIVE_KEYS
from muco_ds.models.embedder import Embedder
from muco_ds.models.head import VocabularyHead
from muco_ds.tasks.base import TaskLoss
from muco_ds.tasks.crossing import Crossing


class CompressTask(nn.Module):
    """A `Task`. Losses of tokens simply add up, so packs are accumulated one after the other, each with its graph."""

    def __init__(self, embedder: Embedder, head: VocabularyHead) -> None:
        super().__init__()
        self.embedder, self.head = embedder, head

    def forward(self, pack: PackedBatch, *, predict: bool = False) -> torch.Tensor:
        """Sum of the cross-entropies of a pack's labels, 0-d float32; of dialogues, their embeddings.

        Args:
            predict: the likeliest next tokens in place of the loss, int64 [E].
        """
        state_ED = self.embedder(pack)
        if pack.labels_E is None:
            return state_ED
        return self.head(state_ED, None if predict else pack.labels_E)

    def backward(self, engine: Any, batch: StepBatch, temperature: float | torch.Tensor) -> TaskLoss:
        """Gradient of the mean over all tokens that the global batch predicts, however they are packed."""
        world_size = len(batch.rows_per_rank)
        scale = world_size / sum(rows.queries for rows in batch.rows_per_rank)
        total = torch.zeros((), device=engine.device)
        # A single pack is reduced while its backward runs.
        crossing = Crossing(len(batch.packs), batch.packs.__getitem__, engine.device)
        with one_reduction(engine) if len(batch.packs) > 1 else nullcontext(lambda _last: None) as before:
            for i in range(len(batch.packs)):
                before(i == len(batch.packs) - 1)
                loss = engine(crossing[i]) * scale
                engine.backward(loss)
                total += loss.detach()
        rows = torch.tensor(float(sum(pack.counts.queries for pack in batch.packs)), device=engine.device)
        return TaskLoss(total, {"loss": total / world_size, "rows": rows})

    def metrics(self, total: Mapping[str, float]) -> dict[str, float | None]:
        """Perplexity and how many tokens were predicted."""
        return {
            **dict.fromkeys(CONTRASTIVE_KEYS),
            "perplexity": math.exp(min(total["loss"], 700.0)),
            "predicted_tokens": total["rows"],
        }
