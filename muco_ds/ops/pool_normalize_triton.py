"""Triton kernels behind ``muco_ds.ops.pool_normalize``: one program per embedding, fewer backward.

Shape legend: T tokens of the packed row, D hidden size, E embeddings, S rows per embedding (the span), R = E * S
pooled rows, P programs of the backward.

With x_s the rows of an embedding, n_s = x_s * rstd_s, m = mean_S n_s, y = m * w, v = 1 / max(|y|, L2_EPS) and
e = y * v, the gradient g of e goes back as

    dy = v * (g - e (e . g))    (dy = v * g where |y| was clamped)
    dw = sum_E dy * m
    dx_s = rstd_s * (dn - n_s * mean_D(dn * n_s))    with dn = dy * w / S

Only rstd and v are saved; n, y and e are recomputed from x.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from muco_ds.ops.pool_normalize import L2_EPS, span_rows

# By the embeddings alone, not by the number of multiprocessors: the order of the weight gradient's sum is then the same
# on every GPU. A program waits for each of its rows, so several must run on a multiprocessor at a time.
BACKWARD_PROGRAMS = 1024
ROWS_PER_PROGRAM = 4  # at least: each program leaves a row of the weight's gradient to be summed


@triton.jit
def _forward_kernel(
    hidden_ptr,
    stride_t,
    index_ptr,
    weight_ptr,
    emb_ptr,
    rstd_ptr,
    inv_norm_ptr,
    dim,
    eps,
    l2_eps,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    emb = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    inside = col < dim
    weight = tl.load(weight_ptr + col, mask=inside, other=0.0).to(tl.float32)
    first_token = tl.load(index_ptr + emb) - (SPAN - 1)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for s in range(SPAN):
        # Upcast before any arithmetic: half precision would lose the statistics, and Triton's interpreter computes
        # bf16 wrongly.
        x = tl.load(hidden_ptr + (first_token + s) * stride_t + col, mask=inside, other=0.0).to(tl.float32)
        rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / dim + eps)
        tl.store(rstd_ptr + emb * SPAN + s, rstd)
        total += x * rstd
    y = total / SPAN * weight
    inv_norm = 1.0 / tl.maximum(tl.sqrt(tl.sum(y * y, axis=0)), l2_eps)
    tl.store(emb_ptr + emb * dim + col, y * inv_norm, mask=inside)
    tl.store(inv_norm_ptr + emb, inv_norm)


@triton.jit(do_not_specialize=["n_embs"])
def _backward_kernel(
    grad_emb_ptr,
    hidden_ptr,
    stride_t,
    index_ptr,
    weight_ptr,
    rstd_ptr,
    inv_norm_ptr,
    grad_row_ptr,
    grad_weight_ptr,
    n_embs,
    dim,
    l2_eps,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0)
    col = tl.arange(0, BLOCK)
    inside = col < dim
    weight = tl.load(weight_ptr + col, mask=inside, other=0.0).to(tl.float32)
    grad_weight = tl.zeros([BLOCK], dtype=tl.float32)
    for emb32 in range(first, n_embs, tl.num_programs(0)):
        emb = tl.cast(emb32, tl.int64)
        grad = tl.load(grad_emb_ptr + emb * dim + col, mask=inside, other=0.0)
        inv_norm = tl.load(inv_norm_ptr + emb)
        first_token = tl.load(index_ptr + emb) - (SPAN - 1)
        total = tl.zeros([BLOCK], dtype=tl.float32)
        for s in range(SPAN):
            x = tl.load(hidden_ptr + (first_token + s) * stride_t + col, mask=inside, other=0.0).to(tl.float32)
            total += x * tl.load(rstd_ptr + emb * SPAN + s)
        mean = total / SPAN
        unit = mean * weight * inv_norm
        # A clamped norm is a constant: only the unclamped one has a gradient of its own.
        radial = tl.where(inv_norm * l2_eps < 1.0, tl.sum(unit * grad, axis=0), 0.0)
        grad_y = inv_norm * (grad - unit * radial)
        grad_weight += grad_y * mean
        grad_n = grad_y * weight / SPAN
        for s in range(SPAN):
            x = tl.load(hidden_ptr + (first_token + s) * stride_t + col, mask=inside, other=0.0).to(tl.float32)
            rstd = tl.load(rstd_ptr + emb * SPAN + s)
            normed = x * rstd
            grad_x = rstd * (grad_n - normed * (tl.sum(grad_n * normed, axis=0) / dim))
            row = (emb * SPAN + s) * dim
            tl.store(grad_row_ptr + row + col, grad_x.to(grad_row_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_weight_ptr + first.to(tl.int64) * dim + col, grad_weight, mask=inside)


def _launch_options(dim: int, span: int) -> dict[str, int]:
    block = triton.next_power_of_2(dim)
    return {"SPAN": span, "BLOCK": block, "num_warps": 4 if block <= 2048 else 8 if block <= 4096 else 16}


class _PoolNormalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: torch.Tensor,
        emb_index_E: torch.Tensor | None,
        norm_weight_D: torch.Tensor,
        eps: float,
        span: int,
    ) -> torch.Tensor:
        if hidden_TD.stride(1) != 1:
            hidden_TD = hidden_TD.contiguous()
        ctx.all_rows = emb_index_E is None
        if emb_index_E is None:
            emb_index_E = torch.arange(len(hidden_TD) // span, device=hidden_TD.device) * span + (span - 1)
            assert len(emb_index_E) * span == len(hidden_TD), "spans one behind the other"
        emb_index_E, norm_weight_D = emb_index_E.contiguous(), norm_weight_D.contiguous()
        n_embs, dim = len(emb_index_E), hidden_TD.shape[1]
        emb_ED = torch.empty(n_embs, dim, dtype=torch.float32, device=hidden_TD.device)
        rstd_ES = torch.empty(n_embs, span, dtype=torch.float32, device=hidden_TD.device)
        inv_norm_E = torch.empty(n_embs, dtype=torch.float32, device=hidden_TD.device)
        with torch.cuda.device_of(hidden_TD):  # Triton launches on the current device
            _forward_kernel[(n_embs,)](
                hidden_TD,
                hidden_TD.stride(0),
                emb_index_E,
                norm_weight_D,
                emb_ED,
                rstd_ES,
                inv_norm_E,
                dim,
                eps,
                L2_EPS,
                **_launch_options(dim, span),
            )
        ctx.save_for_backward(hidden_TD, emb_index_E, norm_weight_D, rstd_ES, inv_norm_E)
        return emb_ED

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_emb_ED: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor, None, None]:
        hidden_TD, emb_index_E, norm_weight_D, rstd_ES, inv_norm_E = ctx.saved_tensors
        (n_embs, span), dim = rstd_ES.shape, hidden_TD.shape[1]
        n_programs = min(triton.cdiv(n_embs, ROWS_PER_PROGRAM), BACKWARD_PROGRAMS)
        grad_row_RD = torch.empty(n_embs * span, dim, dtype=hidden_TD.dtype, device=hidden_TD.device)
        grad_weight_PD = torch.empty(n_programs, dim, dtype=torch.float32, device=hidden_TD.device)
        with torch.cuda.device_of(hidden_TD):
            _backward_kernel[(n_programs,)](
                grad_emb_ED.contiguous(),
                hidden_TD,
                hidden_TD.stride(0),
                emb_index_E,
                norm_weight_D,
                rstd_ES,
                inv_norm_E,
                grad_row_RD,
                grad_weight_PD,
                n_embs,
                dim,
                L2_EPS,
                **_launch_options(dim, span),
            )
        grad_weight_D = grad_weight_PD.sum(0).to(norm_weight_D.dtype)
        if ctx.all_rows:
            return grad_row_RD, None, grad_weight_D, None, None
        grad_hidden_TD = torch.zeros_like(hidden_TD)
        # Not index_add_: with a repeated index that is a race of atomics on CUDA, while this sorts and is reproducible.
        grad_hidden_TD.index_put_((span_rows(emb_index_E, span),), grad_row_RD, accumulate=True)
        return grad_hidden_TD, None, grad_weight_D, None, None


def pool_normalize_triton(
    hidden_TD: torch.Tensor, emb_index_E: torch.Tensor | None, norm_weight_D: torch.Tensor, eps: float, *, span: int = 1
) -> torch.Tensor:
    """``muco_ds.ops.pool_normalize`` by the kernels: CUDA tensors, or any under TRITON_INTERPRET=1."""
    assert span >= 1, span
    return _PoolNormalize.apply(hidden_TD, emb_index_E, norm_weight_D, eps, span)
