"""MuCo pre-training (arXiv 2602.06393): each question of a picture against the targets of every other picture.

Shape suffixes: E pooled rows of this rank, R rows of a loss and N keys of this rank, K keys of all, D embedding size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from muco_ds.config import LossOptions
from muco_ds.data.schema import PackedBatch, RowCounts, by_side
from muco_ds.distributed.gather import gather_rows, gather_table
from muco_ds.distributed.ring import ring_info_nce
from muco_ds.losses import InfoNCE, RowIds, false_negative_limit, info_nce
from muco_ds.models.embedder import Embedder, KeptVision

GATHERED_BYTES = 2**30
"""Most bytes of keys that every rank gathers: beyond, a ring costs a rank less memory and hides its transfers."""


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
        self,
        emb_parts: Sequence[torch.Tensor],
        packs: Sequence[PackedBatch],
        rows_per_rank: list[RowCounts],
        temperature: float | torch.Tensor | None = None,
    ) -> TaskLoss:
        """InfoNCE of this rank's rows, the embeddings of all its packs, against the keys of all ranks.

        Data-parallel averaging divides by the world size W, so `local sum * W / global rows` gives exactly the
        gradient of the mean over the global batch, whatever each rank holds (docs/design.md). `temperature`: a float or
        a 0-d tensor, which may require a gradient; default: the option.
        """
        emb_ED, ids_E3, counts = by_side(emb_parts, packs)
        queries, targets = counts.queries, counts.targets
        query_ED, key_ED, query_ids_E3, key_ids_E3 = (
            emb_ED[:queries],
            emb_ED[queries:],
            ids_E3[:queries],
            ids_E3[queries:],
        )
        target_ED, target_ids_E3 = key_ED[:targets], key_ids_E3[:targets]
        options = self._loss_options(query_ED, target_ED, temperature)
        key_counts = [rows.keys for rows in rows_per_rank]
        forward = self._info_nce(query_ED, query_ids_E3, key_ED, key_ids_E3, key_counts, options)
        world_size = len(rows_per_rank)
        loss = forward.loss_sum * (world_size / sum(rows.queries for rows in rows_per_rank))
        if self.options.symmetric:
            query_counts = [rows.queries for rows in rows_per_rank]
            backward = self._info_nce(target_ED, target_ids_E3, query_ED, query_ids_E3, query_counts, options)
            loss = (loss + backward.loss_sum * (world_size / sum(rows.targets for rows in rows_per_rank))) / 2
        # NaN where the pair ids contradict the order: of a broken table of ids, no part may pass for a loss.
        loss = loss * torch.where((query_ids_E3[:, 1] == target_ids_E3[:, 1]).all(), 1.0, torch.nan)
        stats = {**forward.stats, "loss": loss.detach() / world_size}
        return TaskLoss(loss, stats)

    def _loss_options(
        self, query_RD: torch.Tensor, target_RD: torch.Tensor, temperature: float | torch.Tensor | None
    ) -> dict[str, Any]:
        """Keywords of the loss, the same in both directions.

        Row i's own target is target i of the same rank: a dialogue's turns have one order on both sides
        (`Collator`), packs and `by_side` keep it.
        """
        names, margin = ("mask_same_image", "same_target"), self.options.false_negative_margin
        limit_R = None if margin is None else false_negative_limit(query_RD, target_RD, margin)
        chosen = self.options.temperature if temperature is None else temperature
        return {"temperature": chosen, "limit_R": limit_R, **{name: getattr(self.options, name) for name in names}}

    def _info_nce(
        self,
        row_RD: torch.Tensor,
        row_ids_R3: torch.Tensor,
        key_ND: torch.Tensor,
        key_ids_N3: torch.Tensor,
        counts: list[int],
        options: dict[str, Any],
    ) -> InfoNCE:
        """This rank's rows against the keys of all ranks, which hold `counts` of them."""
        row_ids = RowIds.from_table(row_ids_R3)
        if self._travels(key_ND, counts):
            return ring_info_nce(row_RD, key_ND, row_ids, RowIds.from_table(key_ids_N3), counts, **options)
        key_ids_K3 = gather_table(key_ids_N3, counts)
        return info_nce(row_RD, gather_rows(key_ND, counts), row_ids, RowIds.from_table(key_ids_K3), **options)

    def _travels(self, key_ND: torch.Tensor, counts: list[int]) -> bool:
        """Whether the keys go round in a ring instead of being gathered; every rank decides alike."""
        if self.options.key_exchange != "auto":
            return self.options.key_exchange == "ring"
        return sum(counts) * key_ND.shape[1] * key_ND.element_size() > GATHERED_BYTES
