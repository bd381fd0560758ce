"""Segment attention for both towers: one function, several backends, registered with transformers.

Shape suffixes: T rows of the pack (or patches of its pictures), Q those that ask, H query heads, G key/value heads,
d head dimension, J gathered rows, n segments of a group, q / k their padded lengths.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from muco_ds.data.segments import SegmentPlan

BACKENDS = {
    "auto": "muco_auto",
    "flash_attn": "muco_fa",
    "varlen": "muco_varlen",
    "sdpa": "muco_sdpa",
    "dense": "muco_dense",
}
"""Config value -> registered name. transformers treats any name that contains "flash" as a hub kernel to download."""

_GROUP_ROUNDING = 16  # padded lengths are multiples of this: few groups, little padding


def segment_attention(
    q_QHd: torch.Tensor, k_TGd: torch.Tensor, v_TGd: torch.Tensor, plan: SegmentPlan, scale: float, backend: str
) -> torch.Tensor:
    """Attention of every query row to what its segment may see.

    Args:
        q_QHd, k_TGd, v_TGd: any float dtype for "sdpa" and "dense"; fp16 or bf16 on CUDA for the other backends.
        backend: a key of BACKENDS; "auto" takes flash_attn, else torch's varlen_attn, else grouped SDPA.
    Returns:
        [Q, H, d] in the dtype of q.
    """
    if backend == "auto":
        backend = _best_backend(q_QHd.device.type, q_QHd.dtype)
    return _FUNCTIONS[backend](q_QHd, k_TGd, v_TGd, plan, scale)


@cache
def _best_backend(device: str, dtype: torch.dtype) -> str:
    if device != "cuda" or dtype == torch.float32:
        return "sdpa"
    if flash_function(torch.cuda.get_device_capability()[0]) is not None:
        return "flash_attn"
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401

        return "varlen"
    except ImportError:
        return "sdpa"


_FLASH_MODULES = {2: "flash_attn", 3: "flash_attn_interface", 4: "flash_attn.cute"}


@cache
def flash_function(capability: int) -> Callable[..., Any] | None:
    """`flash_attn_varlen_func` of the best installed FlashAttention for a GPU of that major compute capability.

    Three is for Hopper (9) alone, four for it and its successors; all three name their arguments alike.
    """
    preferred = {9: (3, 4, 2)}.get(capability, (4, 2) if capability > 9 else (2,))
    for version in preferred:
        try:
            # The package of version 4 alone leaves a `flash_attn` without the function of version 2.
            return importlib.import_module(_FLASH_MODULES[version]).flash_attn_varlen_func
        except (ImportError, AttributeError):
            continue
    return None


def _gathered(x_TGd: torch.Tensor, plan: SegmentPlan) -> torch.Tensor:
    return x_TGd if plan.kv_index_J is None else x_TGd.index_select(0, plan.kv_index_J)


def _flash_attn(
    q_QHd: torch.Tensor, k_TGd: torch.Tensor, v_TGd: torch.Tensor, plan: SegmentPlan, scale: float
) -> torch.Tensor:
    function = flash_function(torch.cuda.get_device_capability()[0])
    assert function is not None, "model.attention=flash_attn: install flash-attn"
    out = function(
        q_QHd,
        _gathered(k_TGd, plan),
        _gathered(v_TGd, plan),
        cu_seqlens_q=plan.cu_q_S1,
        cu_seqlens_k=plan.cu_k_S1,
        max_seqlen_q=plan.max_q,
        max_seqlen_k=plan.max_k,
        softmax_scale=scale,
        causal=plan.causal,
    )
    return out[0] if isinstance(out, tuple) else out  # version 4 adds the log-sum-exp


def _varlen(
    q_QHd: torch.Tensor, k_TGd: torch.Tensor, v_TGd: torch.Tensor, plan: SegmentPlan, scale: float
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    k_JGd, v_JGd, parameters = _gathered(k_TGd, plan), _gathered(v_TGd, plan), _varlen_parameters()
    # The signature changed between torch 2.10 (is_causal, no scale, no GQA) and 2.12 (window_size, scale, enable_gqa).
    options: dict[str, Any] = {"window_size": (-1, 0) if plan.causal else (-1, -1)}
    if "is_causal" in parameters:
        options = {"is_causal": plan.causal}
    if "scale" in parameters:
        options["scale"] = scale
    else:
        q_QHd = q_QHd * (scale * q_QHd.shape[-1] ** 0.5)
    if "enable_gqa" in parameters:
        options["enable_gqa"] = True
    else:
        repeats = q_QHd.shape[1] // k_JGd.shape[1]
        k_JGd, v_JGd = k_JGd.repeat_interleave(repeats, 1), v_JGd.repeat_interleave(repeats, 1)
    out = varlen_attn(q_QHd, k_JGd, v_JGd, plan.cu_q_S1, plan.cu_k_S1, plan.max_q, plan.max_k, **options)
    assert isinstance(out, torch.Tensor)
    return out


@cache
def _varlen_parameters() -> frozenset[str]:
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


@dataclass(frozen=True)
class _Group:
    """Segments of similar shape as a padded batch: n of them, with q query and k key rows each."""

    segments: int
    queries: int
    keys: int
    mask_n1qk: torch.Tensor | None
    is_causal: bool  # the plain causal mask


@dataclass(frozen=True)
class _Groups:
    """All groups of a plan: the rows that they are made of, group after group, and where each row's output then lies.
    None: the rows as they stand."""

    groups: list[_Group]
    q_rows: torch.Tensor | None
    k_rows: torch.Tensor | None
    inverse_Q: torch.Tensor | None


def _sdpa(
    q_QHd: torch.Tensor, k_TGd: torch.Tensor, v_TGd: torch.Tensor, plan: SegmentPlan, scale: float
) -> torch.Tensor:
    made = _sdpa_groups(plan, q_QHd.device)
    repeats = q_QHd.shape[1] // k_TGd.shape[1]
    # Heads are repeated before the gather: SDPA's own enable_gqa falls back to the unfused kernel on a CPU.
    k_THd, v_THd = (x_TGd.repeat_interleave(repeats, 1) if repeats > 1 else x_TGd for x_TGd in (k_TGd, v_TGd))
    # Rows are gathered once for all groups: a gather for each would have as many gradients of the whole to add up.
    q_sizes, k_sizes = (
        [group.segments * getattr(group, side) for group in made.groups] for side in ("queries", "keys")
    )
    parts = zip(
        made.groups,
        _select(q_QHd, made.q_rows).split(q_sizes),
        _select(k_THd, made.k_rows).split(k_sizes),
        _select(v_THd, made.k_rows).split(k_sizes),
        strict=True,
    )
    outs = []
    for group, *rows in parts:
        q, k, v = (x.unflatten(0, (group.segments, -1)).transpose(1, 2) for x in rows)
        out_nHqd = F.scaled_dot_product_attention(
            q, k, v, attn_mask=group.mask_n1qk, is_causal=group.is_causal, scale=scale
        )
        outs.append(out_nHqd.transpose(1, 2).flatten(0, 1))
    return _select(torch.cat(outs) if len(outs) > 1 else outs[0], made.inverse_Q)


def _select(x_NHd: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    return x_NHd if rows is None else x_NHd.index_select(0, rows)


def _sdpa_groups(plan: SegmentPlan, device: torch.device) -> _Groups:
    """Computed once per plan."""
    if "sdpa" in plan.cache:
        return plan.cache["sdpa"]
    cu_q, cu_k = plan.cu_q_S1.cpu().numpy().astype(np.int64), plan.cu_k_S1.cpu().numpy().astype(np.int64)
    len_q, len_k = np.diff(cu_q), np.diff(cu_k)
    kv_index = np.arange(cu_k[-1]) if plan.kv_index_J is None else plan.kv_index_J.cpu().numpy()
    rounding = _GROUP_ROUNDING if plan.causal else 1  # unpadded, segments that see all of themselves need no mask
    padded = np.stack([-(-len_q // rounding), -(-len_k // rounding)], 1) * rounding
    # Numbered as they first come: segments of one length each stay in their places.
    _, firsts, owner = np.unique(padded, axis=0, return_index=True, return_inverse=True)
    groups, all_q, all_k = [], [], []
    inverse, offset = np.empty(cu_q[-1], np.int64), 0
    for g in np.argsort(firsts):
        members = np.flatnonzero(owner.reshape(-1) == g)
        q_max, k_max = len_q[members].max(), len_k[members].max()
        q_pos, k_pos = np.arange(q_max), np.arange(k_max)
        q_real = q_pos < len_q[members, None]
        # Padding repeats the segment's own last row, so no other dialogue's values are ever touched, not even times 0.
        q_rows = cu_q[members, None] + np.minimum(q_pos, len_q[members, None] - 1)
        all_k.append(kv_index[cu_k[members, None] + np.minimum(k_pos, len_k[members, None] - 1)].reshape(-1))
        shift = (len_k - len_q)[members, None, None]  # bottom right: row i sees keys up to i + shift
        is_causal = plan.causal and not shift.any()  # padding lies behind what a row sees
        mask_n1qk = None
        if plan.causal and not is_causal:
            mask = (k_pos[None, None, :] <= q_pos[None, :, None] + shift) & (k_pos < len_k[members, None])[:, None, :]
            mask_n1qk = torch.from_numpy(mask[:, None]).to(device)
        inverse[q_rows[q_real]] = offset + np.flatnonzero(q_real.reshape(-1))
        offset += q_rows.size
        all_q.append(q_rows.reshape(-1))
        groups.append(_Group(len(members), int(q_max), int(k_max), mask_n1qk, is_causal))
    q_rows, k_rows = np.concatenate(all_q), np.concatenate(all_k)
    plan.cache["sdpa"] = _Groups(
        groups,
        None if _in_place(q_rows) else torch.from_numpy(q_rows).to(device),
        None if plan.kv_index_J is None and _in_place(k_rows) else torch.from_numpy(k_rows).to(device),
        None if _in_place(inverse) and offset == len(inverse) else torch.from_numpy(inverse).to(device),
    )
    return plan.cache["sdpa"]


def _in_place(rows: np.ndarray) -> bool:
    return np.array_equal(rows, np.arange(len(rows)))


def _dense(
    q_QHd: torch.Tensor, k_TGd: torch.Tensor, v_TGd: torch.Tensor, plan: SegmentPlan, scale: float
) -> torch.Tensor:
    """The plain twin: one mask over everything, softmax written out. Quadratic; for tests."""
    repeats = q_QHd.shape[1] // k_TGd.shape[1]
    k_THd, v_THd = k_TGd.repeat_interleave(repeats, 1), v_TGd.repeat_interleave(repeats, 1)
    scores_HQT = torch.einsum("qhd,khd->hqk", q_QHd, k_THd) * scale
    scores_HQT = scores_HQT.masked_fill(~plan.dense_mask(len(k_TGd)).to(q_QHd.device), float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores_HQT.softmax(-1), v_THd)


_FUNCTIONS = {"flash_attn": _flash_attn, "varlen": _varlen, "sdpa": _sdpa, "dense": _dense}


def register_attention() -> None:
    """Make the backends known to transformers' AttentionInterface; the stock models then call them."""
    for backend, name in BACKENDS.items():
        AttentionInterface.register(name, _interface(backend))


def _interface(backend: str) -> Any:
    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,  # [1, H, Q, d]
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        scaling: float,
        segments: SegmentPlan,
        dropout: float = 0.0,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        assert attention_mask is None and dropout == 0.0 and query.shape[0] == 1
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return segment_attention(q, k, v, segments, scaling, backend)[None], None

    return attention
