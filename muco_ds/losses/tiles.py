"""The two block functions of the contrastive loss in plain torch, tile by tile, and the types that every form shares.

Shape legend: R rows, k keys of one block (K over all blocks), D embedding width, N either of R and k, r and c the rows
and keys of one tile.

A loss is a scan over blocks of keys that fills a ``RowState``, and its gradient is a second pass over the same blocks
with the log-sum-exp of the first. Neither pass keeps anything of R x k. A block function holds whatever its caller
gives it in memory: one process gives it all keys at once, a ring (``muco_ds.distributed.ring``) one rank's at a time.
``muco_ds.losses.info_nce_triton`` has the same two functions as kernels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class RowIds:
    """Who each embedding is: three int64 tensors of N entries, on the embeddings' device.

    ``pair_id_N`` joins a query (>= 0) with its one target; hard negatives carry -1, which no query has.
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


def label_ids(query: RowIds, key: RowIds) -> tuple[RowIds, RowIds]:
    """The same ids as int32 labels >= 0 that agree where the ids do, each column contiguous; nothing waits.

    Half the width to load and compare for every entry, and -1 is free to stand for no id at all.
    """
    columns = zip(vars(query).values(), vars(key).values(), strict=True)
    sorted_3N, order_3N = torch.stack([torch.cat(pair) for pair in columns]).sort(dim=1)
    label_3N = torch.zeros_like(sorted_3N, dtype=torch.int32)
    label_3N[:, 1:] = (sorted_3N[:, 1:] != sorted_3N[:, :-1]).cumsum(1)
    label_3N = torch.empty_like(label_3N).scatter_(1, order_3N, label_3N)
    return RowIds(*label_3N[:, : len(query)]), RowIds(*label_3N[:, len(query) :])


@dataclass(frozen=True)
class Masks:
    """Which keys leave the denominator: those of the row's image, those with the row's target text, both or none."""

    same_image: bool
    same_target: bool

    def of(self, query: RowIds, key: RowIds) -> tuple[torch.Tensor, torch.Tensor]:
        """Bool (positive_RK, excluded_RK) of all rows and keys given."""
        positive_RK = query.pair_id_N[:, None] == key.pair_id_N[None, :]
        excluded_RK = torch.zeros_like(positive_RK)
        if self.same_image:
            excluded_RK |= query.image_id_N[:, None] == key.image_id_N[None, :]
        if self.same_target:
            excluded_RK |= query.target_hash_N[:, None] == key.target_hash_N[None, :]
        return positive_RK, excluded_RK.logical_and_(~positive_RK)


@dataclass(frozen=True)
class Block:
    """Rows against one block of keys, with ids as ``label_ids`` gives them.

    ``scale`` is 1 / temperature, a 0-d tensor: a float would wait for the device. ``tile`` is the (rows, keys) of a
    tile of the plain-torch functions.
    """

    query_RD: torch.Tensor
    key_kD: torch.Tensor
    query_ids: RowIds
    key_ids: RowIds
    masks: Masks
    scale: torch.Tensor
    tile: tuple[int, int]

    def rows(self, row: slice) -> Block:
        ids = self.query_ids.rows(row.start, row.stop)
        return replace(self, query_RD=self.query_RD[row], query_ids=ids)

    def keys(self, col: slice) -> Block:
        ids = self.key_ids.rows(col.start, col.stop)
        return replace(self, key_kD=self.key_kD[col], key_ids=ids)


@dataclass
class RowState:
    """What a scan knows of each row so far: logits are float32, or float64 for float64 embeddings.

    ``positive_R`` sums the positives' logits and ``n_positive_R`` (int32) counts them; ``hardest_R`` and
    ``negative_lse_R`` are the largest and the log-sum-exp of the logits that count as negatives, -inf where there is
    none; ``masked`` (int64, 0-d) is the number of entries that the masks took out.
    """

    positive_R: torch.Tensor
    n_positive_R: torch.Tensor
    hardest_R: torch.Tensor
    negative_lse_R: torch.Tensor
    masked: torch.Tensor

    @classmethod
    def empty(cls, query_RD: torch.Tensor) -> RowState:
        dtype = torch.promote_types(query_RD.dtype, torch.float32)
        positive_R = query_RD.new_zeros(len(query_RD), dtype=dtype)
        lowest_R = torch.full_like(positive_R, -torch.inf)
        masked = torch.zeros((), dtype=torch.int64, device=query_RD.device)
        return cls(positive_R, torch.zeros_like(positive_R, dtype=torch.int32), lowest_R, lowest_R.clone(), masked)

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        """loss_R, and what the gradients need, once all keys are seen: in softmax_2R the log-sum-exp over the positive
        and its negatives, and the gradient dL/ds of the positive.

        That one is minus the negatives' share of the softmax. As exp(s - lse) - 1 it would be rounding noise in rows
        that are nearly solved: lse is near 50 at a temperature of 0.02, and float32 knows it to 4e-6.
        """
        one_positive_R = self.n_positive_R == 1
        loss_R = -torch.nn.functional.logsigmoid(self.positive_R - self.negative_lse_R)
        lse_R = torch.logaddexp(self.positive_R, self.negative_lse_R)
        softmax_2R = torch.stack([lse_R, -torch.sigmoid(self.negative_lse_R - self.positive_R)])
        # NaN here makes the gradients of a row without its positive NaN as well: neither half can pass unnoticed.
        return loss_R.masked_fill_(~one_positive_R, torch.inf), softmax_2R.masked_fill_(~one_positive_R, torch.nan)


def slices(length: int, step: int) -> list[slice]:
    """Consecutive slices of ``step`` that cover ``length``."""
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def scan_block(block: Block, state: RowState) -> None:
    """Takes a block of keys into ``state``, in place."""
    for row in slices(len(block.query_RD), block.tile[0]):
        scaled_rD = block.query_RD[row] * block.scale
        for col in slices(len(block.key_kD), block.tile[1]):
            tile = block.rows(row).keys(col)
            logits_rc = scaled_rD @ tile.key_kD.T
            positive_rc, excluded_rc = block.masks.of(tile.query_ids, tile.key_ids)
            state.positive_R[row] += torch.where(positive_rc, logits_rc, 0).sum(1)
            state.n_positive_R[row] += positive_rc.sum(1)
            state.masked += excluded_rc.sum()
            negatives_rc = logits_rc.masked_fill_(excluded_rc.logical_or_(positive_rc), -torch.inf)
            state.hardest_R[row] = torch.maximum(state.hardest_R[row], negatives_rc.amax(1))
            state.negative_lse_R[row] = torch.logaddexp(state.negative_lse_R[row], negatives_rc.logsumexp(1))


def add_block_gradients(
    block: Block,
    softmax_2R: torch.Tensor,
    upstream_R: torch.Tensor,
    grad_query_RD: torch.Tensor,
    grad_key_kD: torch.Tensor,
) -> None:
    """Adds the gradients of sum(upstream_R * loss_R) that run through a block of keys, in place.

    ``softmax_2R`` is what ``RowState.finish`` gave for *all* keys. The sums are float32 (float64), whatever the
    embeddings.
    """
    coefficient_R = upstream_R * block.scale
    lse_R, at_positive_R = softmax_2R
    for row in slices(len(block.query_RD), block.tile[0]):
        scaled_rD = block.query_RD[row] * block.scale
        for col in slices(len(block.key_kD), block.tile[1]):
            tile = block.rows(row).keys(col)
            logits_rc = scaled_rD @ tile.key_kD.T
            positive_rc, excluded_rc = block.masks.of(tile.query_ids, tile.key_ids)
            grad_rc = logits_rc.sub_(lse_R[row, None]).exp_().masked_fill_(excluded_rc, 0)
            grad_rc = torch.where(positive_rc, at_positive_R[row, None], grad_rc).mul_(coefficient_R[row, None])
            grad_query_RD[row].addmm_(grad_rc, tile.key_kD)
            grad_key_kD[col].addmm_(grad_rc.T, tile.query_RD)
