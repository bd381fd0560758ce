"""MuCo pre-training (arXiv 2602.06393): each question of a picture against the targets of every other picture.

Shape suffixes: E pooled rows of this rank, R rows of a loss and N keys of this rank, K keys of all, D embedding size, S
sizes of the embedding that are trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from muco_ds.config import LossOptions
from muco_ds.config_matryoshka import sizes_of
from muco_ds.data.schema import PackedBatch, RowCounts, by_side
from muco_ds.distributed.gather import gather_rows, gather_table
from muco_ds.distributed.ring import ring_info_nce
from muco_ds.losses import InfoNCE, RowIds, info_nce
from muco_ds.losses.matryoshka import over_sizes
from muco_ds.models.embedder import Embedder, KeptVision

GATHERED_BYTES = 2**30
"""Most bytes of keys that every rank gathers: beyond, a ring costs a rank less memory and hides its transfers."""


@dataclass(frozen=True)
class TaskLoss:
    """`loss` is this rank's part, scaled so that the mean over ranks is the global mean; `stats` are local sums."""

    loss: torch.Tensor
    stats: dict[str, torch.Tensor]

    @classmethod
    def of(cls, loss_S: torch.Tensor, terms: Sequence[InfoNCE], world_size: int, sizes: Sequence[int]) -> TaskLoss:
        """The mean over sizes, with the statistics of all terms together: those of `InfoNCE`, `rows`, and the `loss`
        that sums to it; `loss_64` and so on where there are several sizes."""
        loss = loss_S.mean()
        stats = {name: torch.stack([term.stats[name] for term in terms]).sum() for name in terms[0].stats}
        rows = torch.full((), sum(term.count for term in terms), device=loss.device, dtype=torch.float32)
        parts = loss_S.detach() / world_size
        by_size = {f"loss_{size}": part for size, part in zip(sizes, parts, strict=True)} if len(sizes) > 1 else {}
        return cls(loss, {**stats, **by_size, "rows": rows, "loss": loss.detach() / world_size})


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
        query_ED, key_ED, query_ids_E3, key_ids_E3 = (
            emb_ED[:queries],
            emb_ED[queries:],
            ids_E3[:queries],
            ids_E3[queries:],
        )
        forward = self._info_nce(query_ED, query_ids_E3, key_ED, key_ids_E3, [rows.keys for rows in rows_per_rank])
        world_size = len(rows_per_rank)
        loss_S = forward.loss_sum * (world_size / sum(rows.queries for rows in rows_per_rank))
        if self.options.symmetric:
            target_ED, target_ids_E3 = key_ED[:targets], key_ids_E3[:targets]
            query_counts = [rows.queries for rows in rows_per_rank]
            backward = self._info_nce(target_ED, target_ids_E3, query_ED, query_ids_E3, query_counts)
            loss_S = (loss_S + backward.loss_sum * (world_size / sum(rows.targets for rows in rows_per_rank))) / 2
        return TaskLoss.of(loss_S, [forward], world_size, self.sizes(emb_ED))

    def sizes(self, emb_ED: torch.Tensor) -> list[int]:
        """The sizes of the embedding that are trained, ascending, D last."""
        return sizes_of(self.options.matryoshka, emb_ED.shape[1])

    def _info_nce(
        self,
        row_RD: torch.Tensor,
        row_ids_R3: torch.Tensor,
        key_ND: torch.Tensor,
        key_ids_N3: torch.Tensor,
        counts: list[int],
    ) -> InfoNCE:
        """This rank's rows against the keys of all ranks, which hold `counts` of them; `loss_sum` is by size."""
        names = ("temperature", "mask_same_image", "mask_same_target")
        options = {name: getattr(self.options, name) for name in names}
        row_ids, sizes = RowIds.from_table(row_ids_R3), self.sizes(key_ND)
        if self._travels(key_ND, counts):
            key_ids = RowIds.from_table(key_ids_N3)
            return over_sizes(
                lambda row_RP, key_NP: ring_info_nce(row_RP, key_NP, row_ids, key_ids, counts, **options),
                *(row_RD, key_ND, sizes),
            )
        key_ids = RowIds.from_table(gather_table(key_ids_N3, counts))
        return over_sizes(
            lambda row_RP, key_KP: info_nce(row_RP, key_KP, row_ids, key_ids, **options),
            *(row_RD, gather_rows(key_ND, counts), sizes),  # gathered once, at full width
        )

    def _travels(self, key_ND: torch.Tensor, counts: list[int]) -> bool:
        """Whether the keys go round in a ring instead of being gathered; every rank decides alike."""
        if self.options.key_exchange != "auto":
            return self.options.key_exchange == "ring"
        return sum(counts) * key_ND.shape[1] * key_ND.element_size() > GATHERED_BYTES
