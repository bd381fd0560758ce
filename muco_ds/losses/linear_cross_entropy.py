"""Cross-entropy over a vocabulary straight from hidden states: the N x V logits are never held.

Shape legend: N rows with a label, V rows of the vocabulary table, D hidden size, r the rows of one chunk.

With logits s_i = W x_i the loss is sum_i (log sum_v e^{s_iv} - s_i,label_i), and its gradients are
dx_i = W^T (softmax(s_i) - onehot(label_i)) and dW = sum_i (softmax(s_i) - onehot(label_i)) x_i^T. Both are computed
chunk by chunk in the *forward* pass, while a chunk's logits are at hand, and backward only scales them: the logits are
computed once, as in the dense form (recomputing them in backward would cost a third more; Liger-Kernel does the same,
arXiv 2410.10989).
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from muco_ds.losses.tiles import slices

CHUNK_BYTES = 128 * 2**20
"""Upper limit of a chunk's float32 logits, unless MIN_CHUNK_ROWS of them are larger.

220 rows of a 152,064-row table; half as many made the products of a width of 1,536 a fifth slower on a CPU."""
MIN_CHUNK_ROWS = 32  # fewer, and the products wait for the table to be read


def linear_cross_entropy(state_ND: torch.Tensor, weight_VD: torch.Tensor, label_N: torch.Tensor) -> torch.Tensor:
    """sum over N of -log softmax(state_ND @ weight_VD.T)[label_N], in memory linear in N, as a 0-d float32 tensor.

    ``state_ND`` and ``weight_VD`` are float32, bfloat16 or float16, of two types in the wider one (float64 stays
    float64); ``label_N`` is int64 in [0, V): rows without a label are left out by the caller, who also divides by the
    *global* number of rows. Logits, softmax and sums are float32 in plain torch, under autocast too. On CUDA with
    liger-kernel installed its fused kernel runs, which rounds half-precision logits to their inputs' type before a
    float32 softmax.

    Gradients come back in each input's dtype; that of the table is summed in float32, and is not computed for a table
    that needs none. N may be 0: the sum is 0 and its graph reaches both inputs, so that a rank without labels still
    joins the collectives of the backward pass. The gradients are made in the forward pass: the result may be scaled and
    added to other losses, but has no second derivative.
    """
    assert label_N.shape == state_ND.shape[:1], "one label per row"
    dtype = torch.promote_types(state_ND.dtype, weight_VD.dtype)
    state_ND, weight_VD = state_ND.to(dtype), weight_VD.to(dtype)
    with torch.autocast(state_ND.device.type, enabled=False):
        if _liger_serves(state_ND, weight_VD):
            return _liger(state_ND, weight_VD, label_N)
        return _LinearCrossEntropy.apply(state_ND, weight_VD, label_N, torch.is_grad_enabled())


def linear_cross_entropy_reference(
    state_ND: torch.Tensor, weight_VD: torch.Tensor, label_N: torch.Tensor
) -> torch.Tensor:
    """``linear_cross_entropy`` on the whole logits in plain autograd: the twin of tests and benchmarks."""
    dtype = torch.promote_types(torch.promote_types(state_ND.dtype, weight_VD.dtype), torch.float32)
    with torch.autocast(state_ND.device.type, enabled=False):
        return F.cross_entropy(state_ND.to(dtype) @ weight_VD.to(dtype).T, label_N, reduction="sum")


def _liger_serves(state_ND: torch.Tensor, weight_VD: torch.Tensor) -> bool:
    """Liger 0.8.5 divides by zero for no rows, and gives the table no gradient where the states need none."""
    supported = state_ND.is_cuda and state_ND.dtype != torch.float64 and len(state_ND) > 0
    complete = state_ND.requires_grad or not weight_VD.requires_grad
    return supported and complete and importlib.util.find_spec("liger_kernel") is not None


def _liger(state_ND: torch.Tensor, weight_VD: torch.Tensor, label_N: torch.Tensor) -> torch.Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    bias = class_weight = softcap = None
    ignored_label, z_loss, smoothing, returns_z_loss, sums_in = -100, 0.0, 0.0, False, torch.float32
    options = (bias, class_weight, ignored_label, z_loss, smoothing, "sum", softcap, returns_z_loss, sums_in)
    return LigerFusedLinearCrossEntropyFunction.apply(state_ND, weight_VD, label_N, *options)[0]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, state_ND: torch.Tensor, weight_VD: torch.Tensor, label_N: torch.Tensor, with_gradients: bool
    ) -> torch.Tensor:
        dtype = torch.promote_types(state_ND.dtype, torch.float32)
        wants_state, wants_weight = (with_gradients and needed for needed in ctx.needs_input_grad[:2])
        grad_state_ND = torch.empty_like(state_ND) if wants_state else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=dtype) if wants_weight else None
        loss_N = state_ND.new_empty(len(state_ND), dtype=dtype)
        # A CPU has no product of half-precision inputs with a float32 result.
        table_VD = weight_VD if weight_VD.is_cuda else weight_VD.to(dtype)
        n_rows = chunk_rows(len(weight_VD))
        # One buffer for all chunks: on a CPU a fresh one costs more page faults than the softmax takes.
        buffer_rV = loss_N.new_empty(min(n_rows, len(state_ND)), len(weight_VD))
        for row in slices(len(state_ND), n_rows):
            state_rD, label_r1 = state_ND[row].to(table_VD.dtype), label_N[row, None]
            logits_rV = _product(state_rD, table_VD.T, buffer_rV[: len(state_rD)])
            logits_rV.sub_(logits_rV.amax(1, keepdim=True))
            label_logit_r1 = logits_rV.gather(1, label_r1)
            exp_rV = logits_rV.exp_()
            sum_r1 = exp_rV.sum(1, keepdim=True)
            loss_N[row] = (sum_r1.log() - label_logit_r1)[:, 0]
            if not (wants_state or wants_weight):
                continue
            grad_rV = exp_rV.div_(sum_r1).scatter_add_(1, label_r1, torch.full_like(sum_r1, -1.0)).to(table_VD.dtype)
            if grad_state_ND is not None:
                grad_state_ND[row] = grad_rV @ table_VD
            if grad_weight_VD is not None:
                _add_product(grad_weight_VD, grad_rV.T, state_rD)
        ctx.save_for_backward(grad_state_ND, None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype))
        return loss_N.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        grad_state_ND, grad_weight_VD = (None if saved is None else saved * grad for saved in ctx.saved_tensors)
        return grad_state_ND, grad_weight_VD, None, None


def chunk_rows(n_vocabulary: int) -> int:
    """Rows of a chunk."""
    return max(MIN_CHUNK_ROWS, CHUNK_BYTES // (4 * n_vocabulary))


def _product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """a @ b into ``out``, float32 or float64; half-precision inputs are on CUDA."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b in place, ``total`` float32 (float64)."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, out=total)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
