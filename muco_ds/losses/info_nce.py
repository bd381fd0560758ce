"""InfoNCE over ids: positives and false negatives are found by id, and no rows x keys matrix is ever held.

Shape legend: R rows (local queries), K keys (all ranks' targets, then negatives), D embedding width, N either of R and
K, r and k the rows and keys of one tile.

With logits s_ij = q_i . k_j / tau, p(i) the one key that has row i's pair_id, and X_i the keys excluded for row i (not
p(i), and of row i's image or with row i's target text), the loss of a row is

    L_i = -log [ e^{s_ip} / ( e^{s_ip} + sum_{j not in X_i, j != p} e^{s_ij} ) ] = log(1 + e^{lse_i - s_ip}),
    lse_i = log sum_{j not in X_i, j != p} e^{s_ij},

which is the pre-training loss of MuCo (arXiv 2602.06393: one-way, tau = 0.02, the other targets of the same image
masked) with masks taken from ids instead of positions, as sum_i L_i: the caller divides by the global number of rows.
With P_ij = e^{s_ij} / (e^{s_ip} + e^{lse_i}) (zero where excluded) the gradient is dL_i/ds_ij = P_ij - [j = p(i)].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable


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


@dataclass(frozen=True)
class InfoNCE:
    """The loss summed over rows, and what to log about it.

    ``loss_sum`` is a 0-d tensor with a graph (float64 for float64 inputs, else float32); ``count`` is the number of
    rows. ``stats`` holds detached float32 0-d *sums*, so that sums over packs and ranks are again sums, and nothing
    waits for the device:

    - ``masked``: row/key entries excluded by the masks; ``entries``: all of them, R * K
    - ``top1``: rows whose positive is strictly above every negative that counts (a row without such a negative is one)
    - ``pos_sim``: cosine of row and positive
    - ``hardest_neg_sim``: cosine of row and nearest negative that counts, over ``negative_rows`` rows (those that have
      one)
    """

    loss_sum: torch.Tensor
    count: int
    stats: dict[str, torch.Tensor]


@dataclass(frozen=True)
class _Masks:
    """Which masks are on, and the two ids tables they are taken from."""

    query: RowIds
    key: RowIds
    same_image: bool
    same_target: bool

    def tile(self, row: slice, col: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Bool (positive_rk, excluded_rk) of one tile."""
        q, k = self.query.rows(row.start, row.stop), self.key.rows(col.start, col.stop)
        positive_rk = q.pair_id_N[:, None] == k.pair_id_N[None, :]
        excluded_rk = torch.zeros_like(positive_rk)
        if self.same_image:
            excluded_rk |= q.image_id_N[:, None] == k.image_id_N[None, :]
        if self.same_target:
            excluded_rk |= q.target_hash_N[:, None] == k.target_hash_N[None, :]
        return positive_rk, excluded_rk & ~positive_rk


def _slices(length: int, tile: int) -> list[slice]:
    return [slice(start, min(start + tile, length)) for start in range(0, length, tile)]


class _TiledInfoNCE(torch.autograd.Function):
    """Per-row loss by online log-sum-exp over tiles; backward recomputes the tiles from the saved log-sum-exp.

    Outputs loss_R (differentiable), the positive's and the hardest negative's logit per row, and the number of excluded
    entries.
    """

    @staticmethod
    def forward(
        ctx: Any, query_RD: torch.Tensor, key_KD: torch.Tensor, masks: _Masks, tile_rows: int, tile_keys: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        n_rows, n_keys = len(query_RD), len(key_KD)
        positive_R = query_RD.new_zeros(n_rows)
        n_positive_R = query_RD.new_zeros(n_rows)
        hardest_R = query_RD.new_full((n_rows,), -torch.inf)
        negative_lse_R = query_RD.new_full((n_rows,), -torch.inf)
        masked = torch.zeros((), dtype=torch.int64, device=query_RD.device)
        # Under autocast the product would be taken in bf16, whose error at temperature 0.02 is as large as the margins
        # learned.
        with torch.autocast(query_RD.device.type, enabled=False):
            for row in _slices(n_rows, tile_rows):
                for col in _slices(n_keys, tile_keys):
                    logits_rk = query_RD[row] @ key_KD[col].T
                    positive_rk, excluded_rk = masks.tile(row, col)
                    positive_R[row] += torch.where(positive_rk, logits_rk, 0).sum(1)
                    n_positive_R[row] += positive_rk.sum(1)
                    masked += excluded_rk.sum()
                    negatives_rk = logits_rk.masked_fill_(positive_rk | excluded_rk, -torch.inf)
                    hardest_R[row] = torch.maximum(hardest_R[row], negatives_rk.amax(1))
                    negative_lse_R[row] = torch.logaddexp(negative_lse_R[row], negatives_rk.logsumexp(1))
        one_positive_R = n_positive_R == 1
        loss_R = -torch.nn.functional.logsigmoid(positive_R - negative_lse_R)
        loss_R.masked_fill_(~one_positive_R, torch.inf)
        # NaN here makes the gradients of a row without its positive NaN as well: neither half can pass unnoticed.
        lse_R = torch.logaddexp(positive_R, negative_lse_R).masked_fill_(~one_positive_R, torch.nan)
        ctx.save_for_backward(query_RD, key_KD, lse_R)
        ctx.masks, ctx.tile_rows, ctx.tile_keys = masks, tile_rows, tile_keys
        ctx.mark_non_differentiable(positive_R, hardest_R, masked)
        return loss_R, positive_R, hardest_R, masked

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_R: torch.Tensor, *_unused: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        query_RD, key_KD, lse_R = ctx.saved_tensors
        grad_query_RD, grad_key_KD = torch.zeros_like(query_RD), torch.zeros_like(key_KD)
        with torch.autocast(query_RD.device.type, enabled=False):
            for row in _slices(len(query_RD), ctx.tile_rows):
                for col in _slices(len(key_KD), ctx.tile_keys):
                    logits_rk = query_RD[row] @ key_KD[col].T
                    positive_rk, excluded_rk = ctx.masks.tile(row, col)
                    grad_rk = logits_rk.sub_(lse_R[row, None]).exp_().masked_fill_(excluded_rk, 0)
                    grad_rk = grad_rk.sub_(positive_rk.to(grad_rk.dtype)).mul_(grad_R[row, None])
                    grad_query_RD[row].addmm_(grad_rk, key_KD[col])
                    grad_key_KD[col].addmm_(grad_rk.T, query_RD[row])
        return grad_query_RD, grad_key_KD, None, None, None


def info_nce(
    query_RD: torch.Tensor,
    key_KD: torch.Tensor,
    query_ids: RowIds,
    key_ids: RowIds,
    *,
    temperature: float | torch.Tensor = 0.02,
    mask_same_image: bool = True,
    mask_same_target: bool = True,
    tile_rows: int = 1024,
    tile_keys: int = 4096,
) -> InfoNCE:
    """InfoNCE of R rows against K keys, in memory linear in R + K (the module's docstring has the equation).

    ``query_RD`` and ``key_KD`` are unit-length embeddings; half precision is upcast, so logits are float32 (float64
    stays float64), under autocast too. ``temperature`` is a float or a 0-d tensor, which may require a gradient. Keys
    of the row's image (``mask_same_image``) or with the row's target text (``mask_same_target``) leave the denominator
    unless they are the positive; a hard negative therefore counts only where its image_id and target_hash differ from
    the row's, or that mask is off.

    The symmetric loss is this function called twice by the caller, the second time with the local targets as rows and
    the gathered queries as keys. For several ranks see ``muco_ds.distributed.gather``: divide by the *global* number of
    rows.

    A row must have exactly one key with its pair_id. This is not checked on the host (that would wait for the device):
    the loss of a row with none or several is inf and its gradient NaN, so ``loss_sum`` is then not finite. R may be 0:
    the sum is 0 and its graph reaches both inputs, so that a rank without rows still joins the backward of the gather.
    """
    query_RD, key_KD = _at_least_float32(query_RD, key_KD)
    masks = _Masks(query_ids, key_ids, mask_same_image, mask_same_target)
    assert len(query_RD) == len(query_ids) and len(key_KD) == len(key_ids), "one row of ids per embedding"
    loss_R, positive_R, hardest_R, masked = _TiledInfoNCE.apply(
        query_RD / temperature, key_KD, masks, tile_rows, tile_keys
    )
    return _summarise(loss_R, positive_R, hardest_R, masked, len(key_KD), temperature)


def info_nce_dense(
    query_RD: torch.Tensor,
    key_KD: torch.Tensor,
    query_ids: RowIds,
    key_ids: RowIds,
    *,
    temperature: float | torch.Tensor = 0.02,
    mask_same_image: bool = True,
    mask_same_target: bool = True,
    tile_rows: int = 1024,
    tile_keys: int = 4096,
) -> InfoNCE:
    """``info_nce`` on the whole matrix in plain autograd: the twin that tests and benchmarks compare with.

    Tile sizes are taken, so that the two can be swapped, and ignored. The gradient of a row that has not exactly one
    positive is unspecified here; its loss is inf as well.
    """
    del tile_rows, tile_keys
    query_RD, key_KD = _at_least_float32(query_RD, key_KD)
    masks = _Masks(query_ids, key_ids, mask_same_image, mask_same_target)
    positive_RK, excluded_RK = masks.tile(slice(0, len(query_RD)), slice(0, len(key_KD)))
    with torch.autocast(query_RD.device.type, enabled=False):
        logits_RK = (query_RD / temperature) @ key_KD.T
        positive_R = torch.where(positive_RK, logits_RK, 0).sum(1)
        loss_R = logits_RK.masked_fill(excluded_RK, -torch.inf).logsumexp(1) - positive_R
    loss_R = torch.where(positive_RK.sum(1) == 1, loss_R, torch.inf)
    no_key_R1 = logits_RK.new_full((len(query_RD), 1), -torch.inf)  # so that K = 0 has a maximum
    hardest_R = torch.cat([logits_RK.masked_fill(positive_RK | excluded_RK, -torch.inf), no_key_R1], 1).amax(1)
    return _summarise(loss_R, positive_R, hardest_R, excluded_RK.sum(), len(key_KD), temperature)


def _at_least_float32(query_RD: torch.Tensor, key_KD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.promote_types(torch.promote_types(query_RD.dtype, key_KD.dtype), torch.float32)
    return query_RD.to(dtype), key_KD.to(dtype)


def _summarise(
    loss_R: torch.Tensor,
    positive_R: torch.Tensor,
    hardest_R: torch.Tensor,
    masked: torch.Tensor,
    n_keys: int,
    temperature: float | torch.Tensor,
) -> InfoNCE:
    with torch.no_grad():
        has_negative_R = hardest_R > -torch.inf
        sums = {
            "masked": masked,
            "entries": torch.full((), len(loss_R) * n_keys, device=loss_R.device, dtype=torch.float32),
            "top1": (positive_R > hardest_R).sum(),
            "pos_sim": (positive_R * temperature).sum(),
            "hardest_neg_sim": (torch.where(has_negative_R, hardest_R, 0) * temperature).sum(),
            "negative_rows": has_negative_R.sum(),
        }
        stats = {name: value.detach().float() for name, value in sums.items()}
    return InfoNCE(loss_sum=loss_R.sum(), count=len(loss_R), stats=stats)
