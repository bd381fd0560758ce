"""MuCo pre-training (arXiv 2602.06393): each question of a picture against the targets of every other picture.

Shape suffixes: E pooled rows of this rank, R rows of a loss and N keys of this rank, K keys of all, D embedding size, S
sizes of the embedding that are trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from muco_ds.config import LossOptions
from muco_ds.config_matryoshka import sizes_of
from muco_ds.data.schema import PackedBatch, RowCounts, StepBatch, by_side
from muco_ds.distributed.gather import gather_rows, gather_table
from muco_ds.distributed.gradient_cache import cached_backward
from muco_ds.distributed.ring import ring_info_nce
from muco_ds.losses import InfoNCE, RowIds, false_negative_limit, info_nce
from muco_ds.losses.matryoshka import over_sizes
from muco_ds.metrics import mask_fractions
from muco_ds.models.embedder import DeviceRoom, Embedder, KeptVision
from muco_ds.tasks.base import TaskLoss
from muco_ds.tasks.crossing import Crossing

GATHERED_BYTES = 2**30
"""Most bytes of keys that every rank gathers: beyond, a ring costs a rank less memory and hides its transfers."""


@dataclass(frozen=True)
class Rows:
    """Embeddings and their ids, int64 columns as in a PackedBatch."""

    emb_ND: torch.Tensor
    ids_N3: torch.Tensor

    def part(self, which: slice) -> Rows:
        return Rows(self.emb_ND[which], self.ids_N3[which])

    def followed_by(self, other: Rows) -> Rows:
        return Rows(torch.cat([self.emb_ND, other.emb_ND]), torch.cat([self.ids_N3, other.ids_N3]))


class MuCoTask(nn.Module):
    """A `Task`. The engine runs `forward`, where ZeRO-3 gathers parameters; `loss` has none."""

    def __init__(self, embedder: Embedder, options: LossOptions) -> None:
        super().__init__()
        self.embedder = embedder
        self.options = options

    def forward(self, pack: PackedBatch, kept: KeptVision | None = None) -> torch.Tensor:
        """Embeddings of a pack, emb_ED; this is what the DeepSpeed engine runs."""
        return self.embedder(pack, kept)

    def backward(self, engine: Any, batch: StepBatch, temperature: float | torch.Tensor) -> TaskLoss:
        """Gradient of the loss of this rank's queries against the keys of all ranks, packed as memory allows."""

        room = DeviceRoom()
        kept = [KeptVision(room) for _ in batch.packs]

        def pack_of(number: int) -> PackedBatch:
            """Pixels are most of a pack; in the second pass a frozen tower needs none."""
            pack = batch.packs[number]
            return replace(pack, pixels_PY=pack.pixels_PY[:0]) if kept[number].filled else pack

        crossing = Crossing(len(batch.packs), pack_of, engine.device, rounds=2)

        def embed(number: int) -> torch.Tensor:
            return engine(crossing[number], kept[number])

        def loss_of(emb_parts: list[torch.Tensor]) -> tuple[torch.Tensor, TaskLoss]:
            result = self.loss(emb_parts, batch.packs, batch.rows_per_rank, temperature)
            return result.loss, result

        if len(batch.packs) == 1:  # all queries and targets of this rank in one forward
            loss, result = loss_of([engine(crossing[0])])
            engine.backward(loss)
            return result
        return cached_backward(engine, [partial(embed, number) for number in range(len(batch.packs))], loss_of)

    def metrics(self, total: Mapping[str, float]) -> dict[str, float | None]:
        """Shares of what is masked, and how queries rank the keys."""
        return {
            **mask_fractions(total),
            "in_batch_top1": total["top1"] / total["rows"],
            "pos_sim": total["pos_sim"] / total["rows"],
            "hardest_neg_sim": total["hardest_neg_sim"] / max(1.0, total["negative_rows"]),
        }

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
        query, target, negative = sides(emb_ED, ids_E3, counts)
        key_counts = [rows.keys for rows in rows_per_rank]
        forward = self._info_nce(query, target, target.followed_by(negative), key_counts, temperature)
        world_size = len(rows_per_rank)
        loss_S = forward.loss_sum * (world_size / sum(rows.queries for rows in rows_per_rank))
        if self.options.symmetric:
            query_counts = [rows.queries for rows in rows_per_rank]
            backward = self._info_nce(target, query, query, query_counts, temperature)
            loss_S = (loss_S + backward.loss_sum * (world_size / sum(rows.targets for rows in rows_per_rank))) / 2
        return summed(loss_S, [forward], world_size, self.sizes(emb_ED))

    def sizes(self, emb_ED: torch.Tensor) -> list[int]:
        """The sizes of the embedding that are trained, ascending, D last."""
        return sizes_of(self.options.matryoshka, emb_ED.shape[1])

    def _info_nce(
        self, row: Rows, own: Rows, key: Rows, counts: list[int], temperature: float | torch.Tensor | None
    ) -> InfoNCE:
        """This rank's rows against the keys of all ranks, which hold `counts` of them; `loss_sum` is by size.

        Row i's own positive is `own` i: the turns of a dialogue have one order on both sides (`Stage.sides`), and packs
        and `by_side` keep it.
        """
        options: dict[str, Any] = {
            "temperature": self.options.temperature if temperature is None else temperature,
            "mask_same_image": self.options.mask_same_image,
            "same_target": self.options.same_target,
        }
        travels, margin = self._travels(key.emb_ND, counts), self.options.false_negative_margin
        emb_KD, ids_K3 = key.emb_ND, key.ids_N3
        if not travels:
            emb_KD, ids_K3 = gather_rows(emb_KD, counts), gather_table(ids_K3, counts)  # once, at full width
        row_ids, key_ids = RowIds.from_table(row.ids_N3), RowIds.from_table(ids_K3)

        def loss_of(row_RP: torch.Tensor, own_RP: torch.Tensor, key_KP: torch.Tensor) -> InfoNCE:
            limit_R = None if margin is None else false_negative_limit(row_RP, own_RP, margin)
            if travels:
                return ring_info_nce(row_RP, key_KP, row_ids, key_ids, counts, limit_R=limit_R, **options)
            return info_nce(row_RP, key_KP, row_ids, key_ids, limit_R=limit_R, **options)

        result = over_sizes(loss_of, [row.emb_ND, own.emb_ND, emb_KD], self.sizes(key.emb_ND))
        # NaN where the pair ids contradict the order: of a broken table of ids, no part may pass for a loss.
        in_order = (row.ids_N3[:, 1] == own.ids_N3[:, 1]).all()
        return replace(result, loss_sum=result.loss_sum * torch.where(in_order, 1.0, torch.nan))

    def _travels(self, key_ND: torch.Tensor, counts: list[int]) -> bool:
        """Whether the keys go round in a ring instead of being gathered; every rank decides alike."""
        if self.options.key_exchange != "auto":
            return self.options.key_exchange == "ring"
        return sum(counts) * key_ND.shape[1] * key_ND.element_size() > GATHERED_BYTES


def summed(loss_S: torch.Tensor, terms: Sequence[InfoNCE], world_size: int, sizes: Sequence[int]) -> TaskLoss:
    """The mean over sizes, with the statistics of all terms together: those of `InfoNCE`, `rows`, and the `loss` that
    sums to it; `loss_64` and so on where there are several sizes."""
    loss = loss_S.mean()
    stats = {name: torch.stack([term.stats[name] for term in terms]).sum() for name in terms[0].stats}
    rows = torch.full((), sum(term.count for term in terms), device=loss.device, dtype=torch.float32)
    parts = loss_S.detach() / world_size
    by_size = {f"loss_{size}": part for size, part in zip(sizes, parts, strict=True)} if len(sizes) > 1 else {}
    return TaskLoss(loss, {**stats, **by_size, "rows": rows, "loss": loss.detach() / world_size})


def sides(emb_ED: torch.Tensor, ids_E3: torch.Tensor, counts: RowCounts) -> list[Rows]:
    """Queries, targets and negatives of pooled rows in that order."""
    sizes = [counts.queries, counts.targets, counts.negatives]
    return [Rows(*part) for part in zip(emb_ED.split(sizes), ids_E3.split(sizes), strict=True)]
