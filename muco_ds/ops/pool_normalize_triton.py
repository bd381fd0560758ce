"""Triton kernels behind ``muco_ds.ops.pool_normalize``: one program per pooled row, fewer backward.

Shape legend: T tokens of the packed row, D hidden size, E embeddings, P programs of the backward.

With x a pooled row, n = x * rstd, y = n * w, v = 1 / max(|y|, L2_EPS) and e = y * v, the gradient g of e goes back as

    dy = v * (g - e (e . g))    (dy = v * g where |y| was clamped)
    dw = sum_E dy * n
    dx = rstd * (dy * w - n * mean(dy * w * n))

Only rstd and v are saved per row; n, y and e are recomputed from x.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from muco_ds.ops.pool_normalize import L2_EPS

# Fixed, not the number of multiprocessors: the order of the weight gradient's sum is then the same on every GPU.
BACKWARD_PROGRAMS = 128


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
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    inside = col < dim
    token = tl.load(index_ptr + row)
    # Upcast before any arithmetic: half precision would lose the statistics, and Triton's interpreter computes bf16
    # wrongly.
    x = tl.load(hidden_ptr + token * stride_t + col, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + col, mask=inside, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / dim + eps)
    y = x * rstd * weight
    inv_norm = 1.0 / tl.maximum(tl.sqrt(tl.sum(y * y, axis=0)), l2_eps)
    tl.store(emb_ptr + row * dim + col, y * inv_norm, mask=inside)
    tl.store(rstd_ptr + row, rstd)
    tl.store(inv_norm_ptr + row, inv_norm)


@triton.jit(do_not_specialize=["n_rows"])
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
    n_rows,
    dim,
    l2_eps,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0)
    col = tl.arange(0, BLOCK)
    inside = col < dim
    weight = tl.load(weight_ptr + col, mask=inside, other=0.0).to(tl.float32)
    grad_weight = tl.zeros([BLOCK], dtype=tl.float32)
    for row32 in range(first, n_rows, tl.num_programs(0)):
        row = tl.cast(row32, tl.int64)
        token = tl.load(index_ptr + row)
        x = tl.load(hidden_ptr + token * stride_t + col, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_emb_ptr + row * dim + col, mask=inside, other=0.0)
        rstd = tl.load(rstd_ptr + row)
        inv_norm = tl.load(inv_norm_ptr + row)
        normed = x * rstd
        emb = normed * weight * inv_norm
        # A clamped norm is a constant: only the unclamped one has a gradient of its own.
        radial = tl.where(inv_norm * l2_eps < 1.0, tl.sum(emb * grad, axis=0), 0.0)
        grad_y = inv_norm * (grad - emb * radial)
        grad_weight += grad_y * normed
        grad_n = grad_y * weight
        grad_x = rstd * (grad_n - normed * (tl.sum(grad_n * normed, axis=0) / dim))
        tl.store(grad_row_ptr + row * dim + col, grad_x.to(grad_row_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_weight_ptr + first.to(tl.int64) * dim + col, grad_weight, mask=inside)


def _launch_options(dim: int) -> dict[str, int]:
    block = triton.next_power_of_2(dim)
    return {"BLOCK": block, "num_warps": 4 if block <= 2048 else 8 if block <= 4096 else 16}


class _PoolNormalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: torch.Tensor, emb_index_E: torch.Tensor, norm_weight_D: torch.Tensor, eps: float
    ) -> torch.Tensor:
        if hidden_TD.stride(1) != 1:
            hidden_TD = hidden_TD.contiguous()
        emb_index_E, norm_weight_D = emb_index_E.contiguous(), norm_weight_D.contiguous()
        n_rows, dim = len(emb_index_E), hidden_TD.shape[1]
        emb_ED = torch.empty(n_rows, dim, dtype=torch.float32, device=hidden_TD.device)
        rstd_E = torch.empty(n_rows, dtype=torch.float32, device=hidden_TD.device)
        inv_norm_E = torch.empty_like(rstd_E)
        with torch.cuda.device_of(hidden_TD):  # Triton launches on the current device
            _forward_kernel[(n_rows,)](
                hidden_TD,
                hidden_TD.stride(0),
                emb_index_E,
                norm_weight_D,
                emb_ED,
                rstd_E,
                inv_norm_E,
                dim,
                eps,
                L2_EPS,
                **_launch_options(dim),
            )
        ctx.save_for_backward(hidden_TD, emb_index_E, norm_weight_D, rstd_E, inv_norm_E)
        return emb_ED

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_emb_ED: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor, None]:
        hidden_TD, emb_index_E, norm_weight_D, rstd_E, inv_norm_E = ctx.saved_tensors
        n_rows, dim = len(emb_index_E), hidden_TD.shape[1]
        n_programs = min(n_rows, BACKWARD_PROGRAMS)
        grad_row_ED = torch.empty(n_rows, dim, dtype=hidden_TD.dtype, device=hidden_TD.device)
        grad_weight_PD = torch.empty(n_programs, dim, dtype=torch.float32, device=hidden_TD.device)
        with torch.cuda.device_of(hidden_TD):
            _backward_kernel[(n_programs,)](
                grad_emb_ED.contiguous(),
                hidden_TD,
                hidden_TD.stride(0),
                emb_index_E,
                norm_weight_D,
                rstd_E,
                inv_norm_E,
                grad_row_ED,
                grad_weight_PD,
                n_rows,
                dim,
                L2_EPS,
                **_launch_options(dim),
            )
        grad_hidden_TD = torch.zeros_like(hidden_TD)
        # Not index_add_: with a repeated index that is a race of atomics on CUDA, while this sorts and is reproducible.
        grad_hidden_TD.index_put_((emb_index_E,), grad_row_ED, accumulate=True)
        return grad_hidden_TD, None, grad_weight_PD.sum(0).to(norm_weight_D.dtype), None


def pool_normalize_triton(
    hidden_TD: torch.Tensor, emb_index_E: torch.Tensor, norm_weight_D: torch.Tensor, eps: float
) -> torch.Tensor:
    """``muco_ds.ops.pool_normalize`` by the kernels: CUDA tensors, or any under TRITON_INTERPRET=1."""
    return _PoolNormalize.apply(hidden_TD, emb_index_E, norm_weight_D, eps)
