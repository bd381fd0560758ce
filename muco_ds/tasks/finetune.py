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
from typing import Literal

import torch

from muco_ds.config import LossOptions
from muco_ds.data.schema import PackedBatch, RowCounts, by_side
from muco_ds.losses import InfoNCE
from muco_ds.models.embedder import Embedder
from muco_ds.tasks.base import TaskLoss
from muco_ds.tasks.muco import MuCoTask, Rows, sides, summed


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
        self,
        emb_parts: Sequence[torch.Tensor],
        packs: Sequence[PackedBatch],
        rows_per_rank: list[RowCounts],
        temperature: float | torch.Tensor | None = None,
    ) -> TaskLoss:
        """The terms of this rank's pairs against the keys of all ranks; scaled, and with arguments, as `MuCoTask.loss`.

        Symmetric: the mean of this and of the same with queries and targets exchanged, without negatives.
        """
        emb_ED, ids_E3, counts = by_side(emb_parts, packs)
        query, target, negative = sides(emb_ED, ids_E3, counts)
        world_size = len(rows_per_rank)
        queries, targets = ([rows.queries for rows in rows_per_rank], [rows.targets for rows in rows_per_rank])
        scale = world_size / (sum(queries) // self.forms)
        negatives = [rows.negatives for rows in rows_per_rank]
        terms = self._terms(query, target, targets, negative, negatives, temperature)
        loss_S = torch.stack([term.loss_sum for term in terms]).sum(0) * scale
        if self.options.symmetric:
            back = self._terms(target, query, queries, negative.part(slice(0)), [0] * world_size, temperature)
            loss_S = (loss_S + torch.stack([term.loss_sum for term in back]).sum(0) * scale) / 2
        return summed(loss_S, terms, world_size, self.sizes(emb_ED))

    def _terms(
        self,
        row: Rows,
        paired: Rows,
        paired_counts: list[int],
        other: Rows,
        other_counts: list[int],
        temperature: float | torch.Tensor | None,
    ) -> list[InfoNCE]:
        """Every form of the rows against every form of the keys paired with them, and other keys.

        The counts say how many of the keys each rank holds. The forms of a sample follow each other, as the turns of
        its dialogue do; with the ids of form f, a row's positive is the key of form f.
        """
        forms = self.forms
        rows_RFD, own_RFD, own_RF3 = (_by_pair(rows, forms) for rows in (row.emb_ND, paired.emb_ND, paired.ids_N3))
        ids_RF3 = _by_pair(row.ids_N3, forms)
        if self.compound == "joint":
            counts = [sum(both) for both in zip(paired_counts, other_counts, strict=True)]
            each = Rows(_repeated(rows_RFD, 2, forms), _repeated(ids_RF3, 1, forms))
            own = Rows(_repeated(own_RFD, 1, forms), _repeated(own_RF3, 1, forms))
            return [self._info_nce(each, own, paired.followed_by(other), counts, temperature)]
        counts = [mine // forms + others for mine, others in zip(paired_counts, other_counts, strict=True)]
        terms = []
        for form in range(forms):
            part = slice(form, form + 1)
            own = Rows(_repeated(own_RFD[:, part], 2, forms), _repeated(own_RF3[:, part], 2, forms))
            as_form = Rows(row.emb_ND, _repeated(ids_RF3[:, part], 2, forms))
            key = paired.part(slice(form, None, forms)).followed_by(other)
            terms.append(self._info_nce(as_form, own, key, counts, temperature))
        return terms


def _by_pair(rows_NX: torch.Tensor, forms: int) -> torch.Tensor:
    return rows_NX.view(len(rows_NX) // forms, forms, rows_NX.shape[1])


def _repeated(rows_RFX: torch.Tensor, dim: int, times: int) -> torch.Tensor:
    """Rows [R, F, X] with a new dimension of so many equal entries before (1) or after (2) F: [R * F * times, X]."""
    shape = list(rows_RFX.shape)
    shape.insert(dim, times)
    return rows_RFX.unsqueeze(dim).expand(shape).flatten(0, 2)
