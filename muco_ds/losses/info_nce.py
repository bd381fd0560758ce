"""InfoNCE over ids: positives and false negatives are found by id, and no rows x keys matrix is ever held.

Shape legend: R rows (local queries), K keys (all ranks' targets, then negatives), D embedding width, N either of R and
K, r the rows of one panel.

With logits s_ij = q_i . k_j / tau, p(i) the one key that has row i's pair_id, and X_i the keys excluded for row i (not
p(i), and of row i's image or with row i's target text), the loss of a row is

    L_i = -log [ e^{s_ip} / ( e^{s_ip} + sum_{j not in X_i, j != p} e^{s_ij} ) ] = log(1 + e^{lse_i - s_ip}),
    lse_i = log sum_{j not in X_i, j != p} e^{s_ij},

which is the pre-training loss of MuCo (arXiv 2602.06393: one-way, tau = 0.02, the other targets of the same image
masked) with masks taken from ids instead of positions, as sum_i L_i: the caller divides by the global number of rows.
With P_ij = e^{s_ij} / (e^{s_ip} + e^{lse_i}) (zero where excluded) the gradient is dL_i/ds_ij = P_ij - [j = p(i)] (at
the positive computed as minus the sum of the others, which a difference of nearly equal numbers is not), and
dL/dtau = -sum_ij dL/ds_ij s_ij / tau = -sum_i q_i . dL/dq_i / tau.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from muco_ds.losses import tiles
from muco_ds.losses.tiles import Block, Masks, RowIds, RowState, label_ids

# Rows whose gradient is summed in float32 at a time when it is returned in bfloat16: 50 MB at a width of 1,536.
PANEL_ROWS = 8192


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

    Outputs loss_R (differentiable), the positive's and the hardest negative's logit per row, and the number of excluded
    entries. ``temperature`` is an argument for its gradient alone: the block's scale is what is computed with.
    """

    @staticmethod
    def forward(
        ctx: Any, query_RD: torch.Tensor, key_KD: torch.Tensor, temperature: float | torch.Tensor, block: Block
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        state = RowState.empty(query_RD)
        # Under autocast the product would be taken in bf16, whose error at temperature 0.02 is as large as the margins
        # learned.
        with torch.autocast(query_RD.device.type, enabled=False):
            block_functions(query_RD).scan_block(block, state)
        loss_R, softmax_2R = state.finish()
        ctx.save_for_backward(query_RD, key_KD, softmax_2R)
        ctx.block = block
        ctx.temperature = temperature if ctx.needs_input_grad[2] else None
        ctx.mark_non_differentiable(state.positive_R, state.hardest_R, state.masked)
        return loss_R, state.positive_R, state.hardest_R, state.masked

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_R: torch.Tensor, *_unused: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, None]:
        query_RD, key_KD, softmax_2R = ctx.saved_tensors
        block = replace(ctx.block, query_RD=query_RD, key_kD=key_KD)  # these are checked for changes in place
        grad_query_RD = torch.zeros_like(query_RD)
        grad_key_KD = torch.zeros_like(key_KD, dtype=softmax_2R.dtype)
        grad_temperature = torch.zeros_like(block.scale)
        with torch.autocast(query_RD.device.type, enabled=False):
            for row in tiles.slices(len(query_RD), PANEL_ROWS):
                panel = block.rows(row)
                sum_rD = grad_query_RD[row].to(softmax_2R.dtype)  # the same memory unless the embeddings are bfloat16
                block_functions(query_RD).add_block_gradients(
                    panel, softmax_2R[:, row], grad_R[row], sum_rD, grad_key_KD
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
    mask_same_target: bool = True,
    tile_rows: int = 1024,
    tile_keys: int = 4096,
) -> InfoNCE:
    """InfoNCE of R rows against K keys, in memory linear in R + K (the module's docstring has the equation).

    ``query_RD`` and ``key_KD`` are unit-length embeddings; logits and sums are float32 (float64 for float64) whatever
    their dtype, under autocast too. On CUDA with triton installed the kernels of ``info_nce_triton`` run, in which
    bfloat16 embeddings are multiplied as they are; elsewhere tiles of ``tile_rows`` x ``tile_keys`` in plain torch.

    ``temperature`` is a float or a 0-d tensor, which may require a gradient. Keys of the row's image
    (``mask_same_image``) or with the row's target text (``mask_same_target``) leave the denominator
    unless they are the positive; a hard negative therefore counts only where its image_id and target_hash differ from
    the row's, or that mask is off.

    The symmetric loss is this function called twice by the caller, the second time with the local targets as rows and
    the gathered queries as keys. For several ranks see ``muco_ds.distributed.gather``: divide by the *global* number of
    rows.

    A row must have exactly one key with its pair_id. This is not checked on the host (that would wait for the device):
    the loss of a row with none or several is inf and its gradient NaN, so ``loss_sum`` is then not finite. R may be 0:
    the sum is 0 and its graph reaches both inputs, so that a rank without rows still joins the backward of the gather.
    """
    assert len(query_RD) == len(query_ids) and len(key_KD) == len(key_ids), "one row of ids per embedding"
    query_RD, key_KD = as_computed(query_RD, key_KD)
    masks, scale = Masks(mask_same_image, mask_same_target), reciprocal(temperature, query_RD)
    labels = label_ids(query_ids, key_ids)
    block = Block(query_RD.detach(), key_KD.detach(), *labels, masks, scale, (tile_rows, tile_keys))
    loss_R, positive_R, hardest_R, masked = _BlockInfoNCE.apply(query_RD, key_KD, temperature, block)
    return summarise(loss_R, positive_R, hardest_R, masked, len(key_KD), scale)


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
    dtype = torch.promote_types(torch.promote_types(query_RD.dtype, key_KD.dtype), torch.float32)
    query_RD, key_KD = query_RD.to(dtype), key_KD.to(dtype)
    positive_RK, excluded_RK = Masks(mask_same_image, mask_same_target).of(query_ids, key_ids)
    with torch.autocast(query_RD.device.type, enabled=False):
        logits_RK = (query_RD / temperature) @ key_KD.T
        positive_R = torch.where(positive_RK, logits_RK, 0).sum(1)
        loss_R = logits_RK.masked_fill(excluded_RK, -torch.inf).logsumexp(1) - positive_R
    loss_R = torch.where(positive_RK.sum(1) == 1, loss_R, torch.inf)
    no_key_R1 = logits_RK.new_full((len(query_RD), 1), -torch.inf)  # so that K = 0 has a maximum
    hardest_R = torch.cat([logits_RK.masked_fill(positive_RK | excluded_RK, -torch.inf), no_key_R1], 1).amax(1)
    scale = reciprocal(temperature, query_RD)
    return summarise(loss_R, positive_R, hardest_R, excluded_RK.sum(), len(key_KD), scale)


def summarise(
    loss_R: torch.Tensor,
    positive_R: torch.Tensor,
    hardest_R: torch.Tensor,
    masked: torch.Tensor,
    n_keys: int,
    scale: torch.Tensor,
) -> InfoNCE:
    """The result type from what each row found among ``n_keys`` keys; logits are divided by ``scale``."""
    with torch.no_grad():
        has_negative_R = hardest_R > -torch.inf
        sums = {
            "masked": masked,
            "entries": torch.full((), len(loss_R) * n_keys, device=loss_R.device, dtype=torch.float32),
            "top1": (positive_R > hardest_R).sum(),
            "pos_sim": (positive_R / scale).sum(),
            "hardest_neg_sim": (torch.where(has_negative_R, hardest_R, 0) / scale).sum(),
            "negative_rows": has_negative_R.sum(),
        }
        stats = {name: value.detach().float() for name, value in sums.items()}
    return InfoNCE(loss_sum=loss_R.sum(), count=len(loss_R), stats=stats)
