"""Pooling: hidden states at the pooled tokens -> final RMSNorm -> mean over each span -> unit-length embeddings.

Shape legend: T tokens of the packed row, D hidden size, E embeddings, S tokens pooled per embedding (the span).
"""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F

L2_EPS = 1e-12  # torch.nn.functional.normalize's default


def pool_normalize(
    hidden_TD: torch.Tensor, emb_index_E: torch.Tensor | None, norm_weight_D: torch.Tensor, eps: float, *, span: int = 1
) -> torch.Tensor:
    """Embeddings emb_ED (float32, unit length), each of the ``span`` rows of ``hidden_TD`` that end at ``emb_index_E``.

    Row e is normalize(mean over s < span of rms_norm(hidden[emb_index[e] - s])), with rms_norm(x) = w * x *
    rsqrt(mean(x^2) + eps) the final RMSNorm of the text tower (Qwen2RMSNorm, except that the normalised state is not
    rounded to the model's dtype before the weight) on E * span rows instead of T; then
    ``torch.nn.functional.normalize``. ``span`` 1 pools one token per embedding; K pools the states of K compression
    tokens (CoMa, arXiv 2511.08480). (With ``span`` 1, up to rounding, the RMSNorm's scale cancels in the second step;
    it counts where the norm is clamped.) All arithmetic is float32; a float64 ``hidden_TD`` stays float64 on the CPU.

    ``hidden_TD`` is the last layer's output *before* the final norm (float32, bfloat16 or float16); ``emb_index_E``
    int64 in [span - 1, T), in any order, spans may overlap or repeat, not range-checked by the kernel, or None: every
    row is pooled, span by span (T = E * span), which spares the backward pass a scatter;
    ``norm_weight_D`` the norm's weight, which ZeRO-3 must have gathered; ``eps`` the norm's epsilon. Gradients come
    back in the dtype of each input. On CUDA with triton installed this is one kernel forward and one backward,
    elsewhere ``pool_normalize_reference``.
    """
    if hidden_TD.is_cuda and importlib.util.find_spec("triton") is not None:
        # Imported here: CPU machines may lack triton, and the kernels' module cannot be loaded without it.
        from muco_ds.ops.pool_normalize_triton import pool_normalize_triton

        return pool_normalize_triton(hidden_TD, emb_index_E, norm_weight_D, eps, span=span)
    return pool_normalize_reference(hidden_TD, emb_index_E, norm_weight_D, eps, span=span)


def pool_normalize_reference(
    hidden_TD: torch.Tensor, emb_index_E: torch.Tensor | None, norm_weight_D: torch.Tensor, eps: float, *, span: int = 1
) -> torch.Tensor:
    """``pool_normalize`` in plain torch and autograd, on any device."""
    dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
    rows_RD = hidden_TD if emb_index_E is None else hidden_TD.index_select(0, span_rows(emb_index_E, span))
    x_ESD = rows_RD.to(dtype).view(-1, span, hidden_TD.shape[1])
    rstd_ES1 = torch.rsqrt(x_ESD.square().mean(-1, keepdim=True) + eps)
    return F.normalize((x_ESD * rstd_ES1).mean(1) * norm_weight_D.to(dtype), dim=-1, eps=L2_EPS)


def span_rows(emb_index_E: torch.Tensor, span: int) -> torch.Tensor:
    """Rows of the packed row that each embedding pools, int64 of length E * span, embedding by embedding."""
    assert span >= 1, span
    return (emb_index_E[:, None] + torch.arange(1 - span, 1, device=emb_index_E.device)).view(-1)
