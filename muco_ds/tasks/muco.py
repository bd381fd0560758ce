"""MuCo pre-training (arXiv 2602.06393): each question of a picture against the targets of every other picture.

Shape suffixes: E pooled rows of this rank, R its query rows, K keys of all ranks, D embedding size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from muco_ds.config import LossOptions
from muco_ds.data.schema import PackedBatch, RowCounts, by_side
from muco_ds.distributed.gather import gather_rows, gather_table
from muco_ds.losses import RowIds, info_nce
from muco_ds.models.embedder import Embedder, KeptVision


@dataclass(frozen=True)
class TaskLoss:
    """`loss` is this rank's part, scaled so that the mean over ranks is the global mean; `stats` are local sums."""

    loss: torch.Tensor
    stats: dict[str, torch.Tensor]


class MuCoTask(nn.Module):
    """Model and objective of the stage. Parameters live in `embedder`, under the stock model's names.

    The engine runs `forward`, where ZeRO-3 gathers parameters; `loss` has none and is called on what forward returned.
    """

    def __init__(self, embedder: Embedder, options: LossOptions) -> None:
        super().__init__()
        self.embedder = embedder
        self.options = options

    def forward(self, pack: PackedBatch, kept: KeptVision | None = None) -> torch.Tensor:
        """Embeddings of a pack, emb_ED; this is what the DeepSpeed engine runs."""
        return self.embedder(pack, kept)

    def loss(
        self, emb_parts: Sequence[torch.Tensor], packs: Sequence[PackedBatch], rows_per_rank: list[RowCounts]
    ) -> TaskLoss:
        """InfoNCE of this rank's rows, the embeddings of all its packs, against the keys of all ranks.

        Data-parallel averaging divides by the world size W, so `local sum * W / global rows` gives exactly the
        gradient of the mean over the global batch, whatever each rank holds (docs/design.md).
        """
        emb_ED, ids_E3, counts = by_side(emb_parts, packs)
        queries, targets = counts.queries, counts.targets
        key_ED, key_ids_E3 = emb_ED[queries:], ids_E3[queries:]
        key_KD = gather_rows(key_ED, [rows.keys for rows in rows_per_rank])
        key_ids_K3 = gather_table(key_ids_E3, [rows.keys for rows in rows_per_rank])
        forward = self._info_nce(emb_ED[:queries], ids_E3[:queries], key_KD, key_ids_K3)
        world_size = len(rows_per_rank)
        loss = forward.loss_sum * (world_size / sum(rows.queries for rows in rows_per_rank))
        if self.options.symmetric:
            query_counts = [rows.queries for rows in rows_per_rank]
            query_KD = gather_rows(emb_ED[:queries], query_counts)
            query_ids_K3 = gather_table(ids_E3[:queries], query_counts)
            backward = self._info_nce(key_ED[:targets], key_ids_E3[:targets], query_KD, query_ids_K3)
            loss = (loss + backward.loss_sum * (world_size / sum(rows.targets for rows in rows_per_rank))) / 2
        stats = {**forward.stats, "loss": loss.detach() / world_size}
        return TaskLoss(loss, stats)

    def _info_nce(self, row_RD, row_ids_R3, key_KD, key_ids_K3):  # type: ignore[no-untyped-def]
        return info_nce(
            row_RD,
            key_KD,
            RowIds.from_table(row_ids_R3),
            RowIds.from_table(key_ids_K3),
            temperature=self.options.temperature,
            mask_same_image=self.options.mask_same_image,
            mask_same_target=self.options.mask_same_target,
        )
