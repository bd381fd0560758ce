"""InfoNCE over ids: positives and false negatives are found by id, and no rows x keys matrix is ever held.

Shape legend: R rows (local queries), K keys (all ranks' targets, then negatives), D embedding width, N either of R and
K, r the rows of one panel.

With logits s_ij = q_i . k_j / tau, P_i the keys that are positives of row i (those with its pair_id; with its target
text too, where ``same_target`` is "positive"), X_i the keys excluded for it (no positives, and of its image, with its
target text, or more similar to it than its limit), and N_i all others, the loss of a row is

    L_i = log sum_{j in P_i or N_i} e^{s_ij} - mean_{p in P_i} s_ip
        = log(1 + e^{lse_N - lse_P}) + (lse_P - mean_{p in P_i} s_ip),      lse_A = log sum_{j in A} e^{s_ij},

which is L_out of supervised contrastive learning (arXiv 2004.11362, eq. 2) and, with one positive, where the last
bracket is 0, the pre-training loss of MuCo (arXiv 2602.06393: one-way, tau = 0.02, the other targets of the same image
masked) with masks taken from ids instead of positions. It is returned as sum_i L_i: the caller divides by the global
number of rows. The gradient is dL_i/ds_ij = e^{s_ij} / (e^{lse_P} + e^{lse_N}) - [j in P_i] / |P_i|, zero where
excluded (``RowState.finish`` has a form without cancellation), and
dL/dtau = -sum_ij dL/ds_ij s_ij / tau = -sum_i q_i . dL/dq_i / tau. What is excluded is decided without a gradient.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from muco_ds.losses import tiles
from muco_ds.losses.ids import Masks, RowIds, SameTarget, label_ids
from muco_ds.losses.tiles import STATS, Block, RowState

# Rows whose gradient is summed in float32 at a time when it is returned in bfloat16: 50 MB at a width of 1,536.
PANEL_ROWS = 8192


@dataclass(frozen=True)
class InfoNCE:
    """The loss summed over rows, and what to log about it.

    ``loss_sum`` is a 0-d tensor with a graph (float64 for float64 inputs, else float32); ``count`` is the number of
    rows. ``stats`` holds detached float32 0-d *sums*, so that sums over packs and ranks are again sums, and nothing
    waits for the device:

    - ``same_image``, ``same_target``, ``false_negatives``: row/key entries excluded for the row's image, else for its
      target's text, else for their similarity; ``extra_positives``: positives beyond a row's first; ``entries``: all
      row/key entries, R * K
    - ``top1``: rows whose best positive is strictly above every negative that counts (a row without such a negative is
      one): the nearest key that counts is a positive
    - ``pos_sim``: cosine of row and positive, of several their mean
    - ``hardest_neg_sim``: cosine of row and nearest negative that counts, over ``negative_rows`` rows (those that have
      one)
    """

    loss_sum: torch.Tensor
    count: int
    stats: dict[str, torch.Tensor]


def block_functions(query_RD: torch.Tensor) -> ModuleType:
    """The module whose ``scan_block`` and ``add_block_gradients`` serve these embeddings: Triton's or plain torch's."""
    if query_RD.is_cuda and query_RD.dtype != torch.float64 and importlib.util.find_spec("triton") is not None:
        # Imported here: CPU machines may lack triton, and the kernels' module cannot be loaded without it.
        from muco_ds.losses import info_nce_triton

        return info_nce_triton
    return tiles


def as_computed(query_RD: torch.Tensor, key_KD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in the one dtype that the block functions take: float32, float64, or bfloat16 where the kernels run."""
    dtype = torch.promote_types(query_RD.dtype, key_KD.dtype)
    if dtype != torch.bfloat16 or block_functions(query_RD) is tiles:
        dtype = torch.promote_types(dtype, torch.float32)
    return query_RD.to(dtype), key_KD.to(dtype)


def reciprocal(temperature: float | torch.Tensor, query_RD: torch.Tensor) -> torch.Tensor:
    """1 / temperature as a 0-d tensor beside the embeddings, in the logits' dtype."""
    dtype = torch.promote_types(query_RD.dtype, torch.float32)
    if isinstance(temperature, torch.Tensor):
        return temperature.detach().to(query_RD.device, dtype).reciprocal().reshape(())
    return torch.full((), 1 / temperature, dtype=dtype, device=query_RD.device)


def temperature_gradient(query_RD: torch.Tensor, grad_query_RD: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What some rows say about the gradient of the temperature (the module's last equation), a 0-d tensor."""
    return -torch.linalg.vecdot(query_RD.to(grad_query_RD.dtype), grad_query_RD).sum() * scale


class _BlockInfoNCE(torch.autograd.Function):
    """The loss of each row by one scan over the keys; backward recomputes the logits from the saved log-sum-exp.

    Outputs loss_R (differentiable) and ``RowState.stats``. ``temperature`` is an argument for its gradient alone: the
    block's scale is what is computed with.
    """

    @staticmethod
    def forward(
        ctx: Any, query_RD: torch.Tensor, key_KD: torch.Tensor, temperature: float | torch.Tensor, block: Block
    ) -> tuple[torch.Tensor, torch.Tensor]:
        state = RowState.empty(query_RD)
        # Under autocast the product would be taken in bf16, whose error at temperature 0.02 is as large as the margins
        # learned.
        with torch.autocast(query_RD.device.type, enabled=False):
            block_functions(query_RD).scan_block(block, state)
        loss_R, softmax_4R = state.finish()
        stats = state.stats(len(key_KD), block.scale)
        ctx.save_for_backward(query_RD, key_KD, softmax_4R)
        ctx.block = block
        ctx.temperature = temperature if ctx.needs_input_grad[2] else None
        ctx.mark_non_differentiable(stats)
        return loss_R, stats

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_R: torch.Tensor, _unused: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, None]:
        query_RD, key_KD, softmax_4R = ctx.saved_tensors
        block = replace(ctx.block, query_RD=query_RD, key_kD=key_KD)  # these are checked for changes in place
        grad_query_RD = torch.zeros_like(query_RD)
        grad_key_KD = torch.zeros_like(key_KD, dtype=softmax_4R.dtype)
        grad_temperature = torch.zeros_like(block.scale)
        with torch.autocast(query_RD.device.type, enabled=False):
            for row in tiles.slices(len(query_RD), PANEL_ROWS):
                panel = block.rows(row)
                sum_rD = grad_query_RD[row].to(softmax_4R.dtype)  # the same memory unless the embeddings are bfloat16
                block_functions(query_RD).add_block_gradients(
                    panel, softmax_4R[:, row], grad_R[row], sum_rD, grad_key_KD
                )
                if sum_rD.dtype != grad_query_RD.dtype:
                    grad_query_RD[row] = sum_rD
                if ctx.temperature is not None:
                    grad_temperature += temperature_gradient(panel.query_RD, sum_rD, block.scale)
        wanted = None if ctx.temperature is None else grad_temperature.to(ctx.temperature)
        return grad_query_RD, grad_key_KD.to(key_KD.dtype), wanted, None


def info_nce(
    query_RD: torch.Tensor,
    key_KD: torch.Tensor,
    query_ids: RowIds,
    key_ids: RowIds,
    *,
    temperature: float | torch.Tensor = 0.02,
    mask_same_image: bool = True,
    same_target: SameTarget = "mask",
    limit_R: torch.Tensor | None = None,
    tile_rows: int = 1024,
    tile_keys: int = 4096,
) -> InfoNCE:
    """InfoNCE of R rows against K keys, in memory linear in R + K (the module's docstring has the equation).

    ``query_RD`` and ``key_KD`` are unit-length embeddings; logits and sums are float32 (float64 for float64) whatever
    their dtype, under autocast too. On CUDA with triton installed the kernels of ``info_nce_triton`` run, in which
    bfloat16 embeddings are multiplied as they are; elsewhere tiles of ``tile_rows`` x ``tile_keys`` in plain torch.

    ``temperature`` is a float or a 0-d tensor, which may require a gradient. Keys with the row's pair_id are its
    positives, any number of them; those with its target text leave the denominator (``same_target="mask"``), are
    positives as well ("positive") or count as any other ("keep"). Keys of the row's image (``mask_same_image``) and
    those whose cosine is above ``limit_R``, a number for each row (``false_negative_limit``), leave the denominator
    unless they are positives. So a hard negative counts only where its image_id and target_hash differ from the row's,
    or that is switched off.

    The symmetric loss is this function called twice by the caller, the second time with the local targets as rows and
    the gathered queries as keys. For several ranks see ``muco_ds.distributed.gather``: divide by the *global* number of
    rows.

    A row must have a positive. This is not checked on the host (that would wait for the device): the loss of a row
    without is inf and its gradient NaN, so ``loss_sum`` is then not finite. R may be 0: the sum is 0 and its graph
    reaches both inputs, so that a rank without rows still joins the backward of the gather.
    """
    assert len(query_RD) == len(query_ids) and len(key_KD) == len(key_ids), "one row of ids per embedding"
    query_RD, key_KD = as_computed(query_RD, key_KD)
    masks, scale = Masks(mask_same_image, same_target), reciprocal(temperature, query_RD)
    labels = label_ids(query_ids, key_ids)
    block = Block(query_RD.detach(), key_KD.detach(), *labels, masks, scale, limit_R, (tile_rows, tile_keys))
    return summarise(*_BlockInfoNCE.apply(query_RD, key_KD, temperature, block))


def info_nce_dense(
    query_RD: torch.Tensor,
    key_KD: torch.Tensor,
    query_ids: RowIds,
    key_ids: RowIds,
    *,
    temperature: float | torch.Tensor = 0.02,
    mask_same_image: bool = True,
    same_target: SameTarget = "mask",
    limit_R: torch.Tensor | None = None,
    tile_rows: int = 1024,
    tile_keys: int = 4096,
) -> InfoNCE:
    """``info_nce`` on the whole matrix in plain autograd: the twin that tests and benchmarks compare with.

    Tile sizes are taken, so that the two can be swapped, and ignored. The gradient of a row without a positive is
    unspecified here; its loss is inf as well.
    """
    del tile_rows, tile_keys
    dtype = torch.promote_types(torch.promote_types(query_RD.dtype, key_KD.dtype), torch.float32)
    query_RD, key_KD = query_RD.to(dtype), key_KD.to(dtype)
    scale = reciprocal(temperature, query_RD)
    positive_RK, masked_RK = Masks(mask_same_image, same_target).of(query_ids, key_ids)
    same_image_RK = masked_RK & (query_ids.image_id_N[:, None] == key_ids.image_id_N) & mask_same_image
    with torch.autocast(query_RD.device.type, enabled=False):
        logits_RK = (query_RD / temperature) @ key_KD.T
        excluded_RK = masked_RK
        if limit_R is not None:
            excluded_RK = masked_RK | ((logits_RK > limit_R[:, None] * scale) & ~positive_RK)
        n_positive_R, positive_R = positive_RK.sum(1), torch.where(positive_RK, logits_RK, 0).sum(1)
        loss_R = logits_RK.masked_fill(excluded_RK, -torch.inf).logsumexp(1) - positive_R / n_positive_R
    loss_R = torch.where(n_positive_R > 0, loss_R, torch.inf)
    with torch.no_grad():
        state = RowState.empty(query_RD)
        state.n_positive_R, state.positive_R = n_positive_R, positive_R
        lowest_R1 = logits_RK.new_full((len(query_RD), 1), -torch.inf)  # so that K = 0 has a maximum
        state.best_R = torch.cat([logits_RK.masked_fill(~positive_RK, -torch.inf), lowest_R1], 1).amax(1)
        negatives_RK = logits_RK.masked_fill(positive_RK | excluded_RK, -torch.inf)
        state.hardest_R = torch.cat([negatives_RK, lowest_R1], 1).amax(1)
        state.same_image, state.same_target = same_image_RK.sum(), (masked_RK & ~same_image_RK).sum()
        state.false_negatives = (excluded_RK & ~masked_RK).sum()
        stats = state.stats(len(key_KD), scale)
    return summarise(loss_R, stats)


def summarise(loss_R: torch.Tensor, stats: torch.Tensor) -> InfoNCE:
    """The result type from each row's loss and ``RowState.stats``."""
    return InfoNCE(loss_R.sum(), len(loss_R), dict(zip(STATS, stats.unbind(), strict=True)))


def false_negative_limit(query_RD: torch.Tensor, positive_RD: torch.Tensor, margin: float) -> torch.Tensor:
    """``limit_R`` of rows whose own positives stand in the same order: their cosine plus a margin, without a gradient.

    A negative nearer to the row than this is likely another right answer (arXiv 2506.05176, eq. 1, has margin 0.1).
    """
    dtype = torch.promote_types(query_RD.dtype, torch.float32)
    return torch.linalg.vecdot(query_RD.detach().to(dtype), positive_RD.detach().to(dtype)) + margin
