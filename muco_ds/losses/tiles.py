"""The two block functions of the contrastive loss in plain torch, tile by tile, and the types that every form shares.

Shape legend: R rows, k keys of one block (K over all blocks), D embedding width, r and c the rows and keys of one
tile.

A loss is a scan over blocks of keys that fills a ``RowState``, and its gradient is a second pass over the same blocks
with the log-sum-exp of the first. Neither pass keeps anything of R x k. A block function holds whatever its caller
gives it in memory: one process gives it all keys at once, a ring (``muco_ds.distributed.ring``) one rank's at a time.
``muco_ds.losses.info_nce_triton`` has the same two functions as kernels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from muco_ds.losses.ids import Masks, RowIds


@dataclass(frozen=True)
class Block:
    """Rows against one block of keys, with ids as ``label_ids`` gives them.

    ``scale`` is 1 / temperature, a 0-d tensor: a float would wait for the device. ``limit_R`` is the cosine above which
    a key that is no positive is taken for a false negative, None for none. ``tile`` is the (rows, keys) of a tile of
    the plain-torch functions.
    """

    query_RD: torch.Tensor
    key_kD: torch.Tensor
    query_ids: RowIds
    key_ids: RowIds
    masks: Masks
    scale: torch.Tensor
    limit_R: torch.Tensor | None
    tile: tuple[int, int]

    def rows(self, row: slice) -> Block:
        ids = self.query_ids.rows(row.start, row.stop)
        limit_R = None if self.limit_R is None else self.limit_R[row]
        return replace(self, query_RD=self.query_RD[row], query_ids=ids, limit_R=limit_R)

    def keys(self, col: slice) -> Block:
        ids = self.key_ids.rows(col.start, col.stop)
        return replace(self, key_kD=self.key_kD[col], key_ids=ids)

    def split(self, logits_Rk: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Bool (positive_Rk, excluded_Rk, false_negative_Rk): the last, None without a limit, is part of the second."""
        positive_Rk, excluded_Rk = self.masks.of(self.query_ids, self.key_ids)
        if self.limit_R is None:
            return positive_Rk, excluded_Rk, None
        false_negative_Rk = logits_Rk > (self.limit_R * self.scale)[:, None]
        false_negative_Rk.logical_and_((positive_Rk | excluded_Rk).logical_not_())
        return positive_Rk, excluded_Rk.logical_or_(false_negative_Rk), false_negative_Rk


STATS = (
    *("same_image", "same_target", "false_negatives", "extra_positives", "entries"),
    *("top1", "pos_sim", "hardest_neg_sim", "negative_rows"),
)
"""Names of ``RowState.stats``, explained at ``muco_ds.losses.InfoNCE``."""


@dataclass
class RowState:
    """What a scan knows of each row so far: logits are float32, or float64 for float64 embeddings.

    Of the positives: their number ``n_positive_R`` (int64), the sum ``positive_R`` of their logits, the largest
    ``best_R`` (-inf where there is none) and ``positive_exp_R``, the sum of e^{s - best}. Of the negatives that count:
    the largest logit ``hardest_R`` and the log-sum-exp ``negative_lse_R``, -inf where there is none. Of the excluded:
    how many entries each reason took out (int64, 0-d), the first that holds in the order of the fields.
    """

    n_positive_R: torch.Tensor
    positive_R: torch.Tensor
    best_R: torch.Tensor
    positive_exp_R: torch.Tensor
    hardest_R: torch.Tensor
    negative_lse_R: torch.Tensor
    same_image: torch.Tensor
    same_target: torch.Tensor
    false_negatives: torch.Tensor

    @classmethod
    def empty(cls, query_RD: torch.Tensor) -> RowState:
        dtype = torch.promote_types(query_RD.dtype, torch.float32)
        zero_R = query_RD.new_zeros(len(query_RD), dtype=dtype)
        lowest_R = torch.full_like(zero_R, -torch.inf)
        none = torch.zeros((), dtype=torch.int64, device=query_RD.device)
        return cls(
            *(torch.zeros_like(zero_R, dtype=torch.int64), zero_R, lowest_R, zero_R.clone()),
            *(lowest_R.clone(), lowest_R.clone(), none, none.clone(), none.clone()),
        )

    def count(self, block: Block) -> torch.Tensor:
        """Takes in what the ids of a block say; returns how many of its entries they make no negative (0-d)."""
        n_positive_R, same_image, same_target = block.masks.count(block.query_ids, block.key_ids)
        self.n_positive_R += n_positive_R
        self.same_image += same_image
        self.same_target += same_target
        return n_positive_R.sum() + same_image + same_target

    def add_positives(self, row: slice, sum_r: torch.Tensor, best_r: torch.Tensor, exp_r: torch.Tensor) -> None:
        """Takes in more positives of some rows: their sum, the largest, the sum of e^{s - largest} (0 for none)."""
        together_r = torch.maximum(self.best_R[row], best_r)
        origin_r = finite(together_r)
        seen_r = self.positive_exp_R[row] * (self.best_R[row] - origin_r).exp()
        self.positive_exp_R[row] = seen_r + exp_r * (best_r - origin_r).exp()
        self.best_R[row] = together_r
        self.positive_R[row] += sum_r

    def add_negatives(self, row: slice, hardest_r: torch.Tensor, lse_r: torch.Tensor) -> None:
        self.hardest_R[row] = torch.maximum(self.hardest_R[row], hardest_r)
        self.negative_lse_R[row] = torch.logaddexp(self.negative_lse_R[row], lse_r)

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        """loss_R, and what the gradients need, once all keys are seen: softmax_4R of (lse, centre, slope, offset).

        At what counts as a negative dL/ds = e^{s - lse}, with lse over positives and negatives. At each of n positives
        it is slope (e^{s - centre} - 1) + offset, where centre is the logarithm of the mean of their e^s, the offset
        -1/n of the negatives' share of the softmax, and slope 1/n of the positives' share, 0 for n = 1.

        As e^{s - lse} - 1/n it would be rounding noise in rows that are nearly solved: lse is near 50 at a temperature
        of 0.02, and float32 knows it to 4e-6.
        """
        n_R = self.n_positive_R.to(self.positive_R.dtype)
        centre_R = self.best_R + (self.positive_exp_R / n_R).log()
        positive_lse_R = centre_R + n_R.log()
        spread_R = positive_lse_R - self.positive_R / n_R
        loss_R = spread_R - torch.nn.functional.logsigmoid(positive_lse_R - self.negative_lse_R)
        lse_R = torch.logaddexp(positive_lse_R, self.negative_lse_R)
        negative_share_R = torch.sigmoid(self.negative_lse_R - positive_lse_R)
        slope_R = torch.where(n_R > 1, (1 - negative_share_R) / n_R, 0)
        softmax_4R = torch.stack([lse_R, centre_R, slope_R, -negative_share_R / n_R])
        # NaN here makes the gradients of a row without a positive NaN as well: neither half can pass unnoticed.
        lost_R = n_R == 0
        return loss_R.masked_fill_(lost_R, torch.inf), softmax_4R.masked_fill_(lost_R, torch.nan)

    def stats(self, n_keys: int, scale: torch.Tensor) -> torch.Tensor:
        """The sums named ``STATS`` after a scan of ``n_keys`` keys, float32."""
        has_negative_R = self.hardest_R > -torch.inf
        entries = torch.full_like(scale, len(self.best_R) * n_keys)
        mean_R = self.positive_R / self.n_positive_R.clamp_min(1)
        sums = [self.same_image, self.same_target, self.false_negatives, (self.n_positive_R - 1).clamp_min(0).sum()]
        sums += [entries, (self.best_R > self.hardest_R).sum(), (mean_R / scale).sum()]
        sums += [(torch.where(has_negative_R, self.hardest_R, 0) / scale).sum(), has_negative_R.sum()]
        return torch.stack([value.float() for value in sums])


def finite(logits: torch.Tensor) -> torch.Tensor:
    """0 in place of -inf: what may be subtracted from -inf."""
    return logits.masked_fill(logits == -torch.inf, 0)


def slices(length: int, step: int) -> list[slice]:
    """Consecutive slices of ``step`` that cover ``length``."""
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def scan_block(block: Block, state: RowState) -> None:
    """Takes a block of keys into ``state``, in place."""
    state.count(block)
    for row in slices(len(block.query_RD), block.tile[0]):
        scaled_rD = block.query_RD[row] * block.scale
        for col in slices(len(block.key_kD), block.tile[1]):
            tile = block.rows(row).keys(col)
            logits_rc = scaled_rD @ tile.key_kD.T
            positive_rc, excluded_rc, false_negative_rc = tile.split(logits_rc)
            if false_negative_rc is not None:
                state.false_negatives += false_negative_rc.sum()
            positives_rc = torch.where(positive_rc, logits_rc, -torch.inf)
            best_r = positives_rc.amax(1)
            exp_r = positives_rc.sub_(finite(best_r)[:, None]).exp_().sum(1)
            state.add_positives(row, torch.where(positive_rc, logits_rc, 0).sum(1), best_r, exp_r)
            negatives_rc = logits_rc.masked_fill_(excluded_rc.logical_or_(positive_rc), -torch.inf)
            state.add_negatives(row, negatives_rc.amax(1), negatives_rc.logsumexp(1))


def add_block_gradients(
    block: Block,
    softmax_4R: torch.Tensor,
    upstream_R: torch.Tensor,
    grad_query_RD: torch.Tensor,
    grad_key_kD: torch.Tensor,
) -> None:
    """Adds the gradients of sum(upstream_R * loss_R) that run through a block of keys, in place.

    ``softmax_4R`` is what ``RowState.finish`` gave for *all* keys. The sums are float32 (float64), whatever the
    embeddings.
    """
    coefficient_R = upstream_R * block.scale
    for row in slices(len(block.query_RD), block.tile[0]):
        scaled_rD = block.query_RD[row] * block.scale
        lse_r1, centre_r1, slope_r1, offset_r1 = softmax_4R[:, row, None]
        for col in slices(len(block.key_kD), block.tile[1]):
            tile = block.rows(row).keys(col)
            logits_rc = scaled_rD @ tile.key_kD.T
            positive_rc, excluded_rc, _ = tile.split(logits_rc)
            grad_rc = logits_rc.sub_(torch.where(positive_rc, centre_r1, lse_r1)).exp_().masked_fill_(excluded_rc, 0)
            at_positive_rc = (grad_rc - 1).mul_(slope_r1).add_(offset_r1)
            grad_rc = torch.where(positive_rc, at_positive_rc, grad_rc).mul_(coefficient_R[row, None])
            grad_query_RD[row].addmm_(grad_rc, tile.key_kD)
            grad_key_kD[col].addmm_(grad_rc.T, tile.query_RD)
