"""Pooling: hidden states at the pooled tokens -> final RMSNorm -> unit-length embeddings.

Shape legend: T tokens of the packed row, D hidden size, E embeddings (pooled tokens).
"""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F

L2_EPS = 1e-12  # torch.nn.functional.normalize's default


def pool_normalize(
    hidden_TD: torch.Tensor, emb_index_E: torch.Tensor, norm_weight_D: torch.Tensor, eps: float
) -> torch.Tensor:
    """Embeddings emb_ED (float32, unit length) of the rows ``emb_index_E`` of ``hidden_TD``.

    Row e is normalize(w * x * rsqrt(mean(x^2) + eps)) with x = hidden[emb_index[e]]: the final RMSNorm of the text
    tower (Qwen2RMSNorm, except that the normalised state is not rounded to the model's dtype before the weight) on E
    rows instead of T, then ``torch.nn.functional.normalize``. (Up to rounding the RMSNorm's scale cancels in the second
    step; it counts where the norm is clamped.) All arithmetic is float32; a float64 ``hidden_TD`` stays float64 on the
    CPU.

    ``hidden_TD`` is the last layer's output *before* the final norm (float32, bfloat16 or float16); ``emb_index_E``
    int64 in [0, T), in any order, repeats allowed, not range-checked by the kernel; ``norm_weight_D`` the norm's
    weight, which ZeRO-3 must have gathered; ``eps`` the norm's epsilon. Gradients come back in the dtype of each input.
    On CUDA with triton installed this is one kernel forward and one backward, elsewhere ``pool_normalize_reference``.
    """
    if hidden_TD.is_cuda and importlib.util.find_spec("triton") is not None:
        # Imported here: CPU machines may lack triton, and the kernels' module cannot be loaded without it.
        from muco_ds.ops.pool_normalize_triton import pool_normalize_triton

        return pool_normalize_triton(hidden_TD, emb_index_E, norm_weight_D, eps)
    return pool_normalize_reference(hidden_TD, emb_index_E, norm_weight_D, eps)


def pool_normalize_reference(
    hidden_TD: torch.Tensor, emb_index_E: torch.Tensor, norm_weight_D: torch.Tensor, eps: float
) -> torch.Tensor:
    """``pool_normalize`` in plain torch and autograd, on any device."""
    dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
    x_ED = hidden_TD.index_select(0, emb_index_E).to(dtype)
    rstd_E1 = torch.rsqrt(x_ED.square().mean(-1, keepdim=True) + eps)
    return F.normalize(x_ED * rstd_E1 * norm_weight_D.to(dtype), dim=-1, eps=L2_EPS)
