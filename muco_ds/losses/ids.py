"""Who each embedding is, and what that makes of every row/key pair: positive, excluded or negative.

Shape legend: R rows, K keys, N either of R and K or both together, C columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

SameTarget = Literal["mask", "positive", "keep"]


@dataclass(frozen=True)
class RowIds:
    """Who each embedding is: three int64 tensors of N entries, on the embeddings' device.

    ``pair_id_N`` joins a query (>= 0) with its targets; hard negatives carry -1, which no query has.
    """

    image_id_N: torch.Tensor
    pair_id_N: torch.Tensor
    target_hash_N: torch.Tensor

    @classmethod
    def from_table(cls, ids_N3: torch.Tensor) -> RowIds:
        """From int64 columns (image_id, pair_id, target_hash), as a PackedBatch and ``gather_table`` hold them."""
        image_id_N, pair_id_N, target_hash_N = ids_N3.unbind(1)
        return cls(image_id_N, pair_id_N, target_hash_N)

    def __len__(self) -> int:
        return len(self.pair_id_N)

    def rows(self, start: int, stop: int) -> RowIds:
        """The ids of rows ``start`` to ``stop``, as views."""
        return RowIds(self.image_id_N[start:stop], self.pair_id_N[start:stop], self.target_hash_N[start:stop])

    def columns(self) -> torch.Tensor:
        """The three columns as rows of one tensor, in the order of the fields."""
        return torch.stack([self.image_id_N, self.pair_id_N, self.target_hash_N])


def label_ids(query: RowIds, key: RowIds) -> tuple[RowIds, RowIds]:
    """The same ids as int32 labels >= 0 that agree where the ids do, each column contiguous; nothing waits.

    Half the width to load and compare for every entry, and -1 is free to stand for no id at all.
    """
    label_3N = _labels(torch.cat([query.columns(), key.columns()], dim=1))
    return RowIds(*label_3N[:, : len(query)]), RowIds(*label_3N[:, len(query) :])


def _labels(ids_CN: torch.Tensor) -> torch.Tensor:
    """int32 [C, N], from 0 on, that agree within a row of ``ids_CN`` where its entries do."""
    sorted_CN, order_CN = ids_CN.sort(dim=1)
    label_CN = torch.zeros_like(sorted_CN, dtype=torch.int32)
    label_CN[:, 1:] = (sorted_CN[:, 1:] != sorted_CN[:, :-1]).cumsum(1)
    return torch.empty_like(label_CN).scatter_(1, order_CN, label_CN)


@dataclass(frozen=True)
class Masks:
    """What equal ids mean, beside an equal pair id, which always makes a key a positive.

    ``same_image``: whether keys of the row's image leave the denominator. ``same_target``: keys with the row's target
    text leave it ("mask"), are positives as well ("positive"), or count as any other key ("keep").
    """

    same_image: bool
    same_target: SameTarget

    def of(self, query: RowIds, key: RowIds) -> tuple[torch.Tensor, torch.Tensor]:
        """Bool (positive_RK, excluded_RK) of all rows and keys given."""
        positive_RK = query.pair_id_N[:, None] == key.pair_id_N[None, :]
        excluded_RK = torch.zeros_like(positive_RK)
        if self.same_target != "keep":
            same_target_RK = query.target_hash_N[:, None] == key.target_hash_N[None, :]
            (positive_RK if self.same_target == "positive" else excluded_RK).logical_or_(same_target_RK)
        if self.same_image:
            excluded_RK |= query.image_id_N[:, None] == key.image_id_N[None, :]
        return positive_RK, excluded_RK.logical_and_(~positive_RK)

    def count(self, query: RowIds, key: RowIds) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """How many entries ``of`` finds, without the matrix, from ``label_ids``; nothing waits.

        Returns int64 tensors: the positives of each row, the entries of all rows that are excluded for their image, and
        those excluded for their target's text alone.
        """
        image_N, pair_N, target_N = torch.cat([query.columns(), key.columns()], dim=1).long()
        # Who agrees in two columns agrees in a number made of both; of three, of such a number's label and the third.
        base = 2**31
        code_3N = torch.stack([image_N * base + pair_N, image_N * base + target_N, pair_N * base + target_N])
        all_N = _labels(code_3N)[0].long() * base + target_N
        code_7N = torch.cat([torch.stack([image_N, pair_N, target_N]), code_3N, all_N[None]])
        row_7R, sorted_7K = code_7N[:, : len(query)].contiguous(), code_7N[:, len(query) :].sort(dim=1).values
        above_7R, below_7R = (torch.searchsorted(sorted_7K, row_7R, right=right) for right in (True, False))
        image_R, pair_R, target_R, image_pair_R, image_target_R, pair_target_R, all_R = above_7R - below_7R
        none = torch.zeros_like(pair_R).sum()
        if self.same_target == "positive":
            positive_R = pair_R + target_R - pair_target_R
            same_image = (image_R - image_pair_R - image_target_R + all_R).sum() if self.same_image else none
            return positive_R, same_image, none
        same_image = (image_R - image_pair_R).sum() if self.same_image else none
        if self.same_target == "keep":
            return pair_R, same_image, none
        same_target_R = target_R - pair_target_R
        return pair_R, same_image, (same_target_R - (image_target_R - all_R if self.same_image else 0)).sum()
