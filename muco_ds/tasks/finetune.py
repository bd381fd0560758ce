"""MuCo fine-tuning (arXiv 2602.06393): each side has a direct embedding and one after a reconstruction turn.

With q, q' the two of a query and p, p' the two of its target, the loss is the sum of four one-way terms, q to p, q to
p', q' to p and q' to p', each a mean over the batch. `joint` (the paper): all terms have the same keys, p and p' of
every pair, where the own counterpart of the positive is masked. `separate` (the released code): a term's keys are the
p, or the p', alone. Hard negatives are keys of every term. At test time there are q and p.

Shape suffixes: N rows and R pairs of this rank, F forms of an embedding (direct, reconstructed), D embedding size, S
sizes of the embedding that are trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from muco_ds.config import LossOptions
from muco_ds.data.schema import PackedBatch, RowCounts, by_side
from muco_ds.losses import InfoNCE
from muco_ds.models.embedder import Embedder
from muco_ds.tasks.muco import MuCoTask, TaskLoss


class FineTuneTask(MuCoTask):
    """Model and objective of the stage.

    Args:
        forms: embeddings of each query and each target; with one, this is plain InfoNCE over pairs.
    """

    def __init__(
        self, embedder: Embedder, options: LossOptions, *, forms: int, compound: Literal["joint", "separate"]
    ) -> None:
        super().__init__(embedder, options)
        self.forms, self.compound = forms, compound

    def loss(
        self, emb_parts: Sequence[torch.Tensor], packs: Sequence[PackedBatch], rows_per_rank: list[RowCounts]
    ) -> TaskLoss:
        """The terms of this rank's pairs against the keys of all ranks; scaled as in `MuCoTask.loss`.

        Symmetric: the mean of this and of the same with queries and targets exchanged, without negatives.
        """
        emb_ED, ids_E3, counts = by_side(emb_parts, packs)
        sizes = [counts.queries, counts.targets, counts.negatives]
        query, target, negative = map(_Rows, emb_ED.split(sizes), ids_E3.split(sizes))
        world_size = len(rows_per_rank)
        queries, targets = ([rows.queries for rows in rows_per_rank], [rows.targets for rows in rows_per_rank])
        scale = world_size / (sum(queries) // self.forms)
        terms = self._terms(query, target, targets, negative, [rows.negatives for rows in rows_per_rank])
        loss_S = torch.stack([term.loss_sum for term in terms]).sum(0) * scale
        if self.options.symmetric:
            back = self._terms(target, query, queries, negative.part(slice(0)), [0] * world_size)
            loss_S = (loss_S + torch.stack([term.loss_sum for term in back]).sum(0) * scale) / 2
        return TaskLoss.of(loss_S, terms, world_size, self.sizes(emb_ED))

    def _terms(
        self, row: _Rows, paired: _Rows, paired_counts: list[int], other: _Rows, other_counts: list[int]
    ) -> list[InfoNCE]:
        """Every form of the rows against every form of the keys paired with them, and other keys.

        The counts say how many of the keys each rank holds. The forms of a sample follow each other, as the turns of
        its dialogue do; with the ids of form f, a row's positive is the key of form f.
        """
        forms = self.forms
        emb_RFD, ids_RF3 = (rows.view(len(rows) // forms, forms, rows.shape[1]) for rows in (row.emb_ND, row.ids_N3))
        if self.compound == "joint":
            key = paired.followed_by(other)
            counts = [sum(both) for both in zip(paired_counts, other_counts, strict=True)]
            emb_RFFD = emb_RFD[:, :, None].expand(-1, -1, forms, -1)
            ids_RFF3 = ids_RF3[:, None].expand(-1, forms, -1, -1)
            return [self._info_nce(emb_RFFD.flatten(0, 2), ids_RFF3.flatten(0, 2), key.emb_ND, key.ids_N3, counts)]
        counts = [mine // forms + others for mine, others in zip(paired_counts, other_counts, strict=True)]
        terms = []
        for form in range(forms):
            key = paired.part(slice(form, None, forms)).followed_by(other)
            as_form_RF3 = ids_RF3[:, form : form + 1].expand(-1, forms, -1)
            terms.append(self._info_nce(row.emb_ND, as_form_RF3.flatten(0, 1), key.emb_ND, key.ids_N3, counts))
        return terms


@dataclass(frozen=True)
class _Rows:
    """Embeddings and their ids."""

    emb_ND: torch.Tensor
    ids_N3: torch.Tensor

    def part(self, which: slice) -> _Rows:
        return _Rows(self.emb_ND[which], self.ids_N3[which])

    def followed_by(self, other: _Rows) -> _Rows:
        return _Rows(torch.cat([self.emb_ND, other.emb_ND]), torch.cat([self.ids_N3, other.ids_N3]))
