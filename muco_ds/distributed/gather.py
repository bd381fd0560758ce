"""Gathering embeddings and ids of all ranks, differentiable and ragged.

Shape legend: W ranks, N rows of this rank, M the largest N of any rank, K rows of all ranks, D embedding width, C
columns.

Why the loss needs no world-size factor of its own. Let R be the rows of all ranks and L = (1/R) sum_r L_r the loss of
one process on the whole batch, where L_r sums the rows of rank r against all K keys. Rank r computes L_r alone, from
its own queries and the gathered keys. The backward of ``gather_rows`` sums, over ranks, the gradients that all the L_r
send to this rank's keys; the gradients of the weights summed over ranks are then exactly those of sum_r L_r. Data
parallelism *averages* gradients over ranks, a factor 1/W, so each rank back-propagates

    L_r * W / R        (``loss_sum * world_size / global_rows``)

and the averaged gradient is that of L. With equal rows per rank this is the plain local mean, with no factor at all.
With ragged rows the local mean is wrong (gradient cosine 0.970 on a toy model), and so is a gather without gradient,
with the *same loss value* (0.937). A learned temperature is averaged like any other parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

# torch 2.13 renamed both and warns at every use of the old names, which are all that earlier versions have.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def gather_rows(local_ND: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """All ranks' rows in rank order: rows_KD, K = sum(counts), with a gradient.

    ``counts`` are the rows of each rank, the same list on every rank (the batch plan knows it), so nothing waits for
    the device. A rank may hold no rows. The backward of this rank is the sum over all ranks of the gradients of its
    rows.

    Both passes are collective: every rank must call it, with inputs that require a gradient on all ranks or on none,
    and must run the backward through the result, also where it has no rows of its own. With one process or without a
    process group it returns its argument.
    """
    if not is_collective(local_ND, counts):
        return local_ND
    return _GatherRows.apply(local_ND, tuple(counts))


def gather_table(ids_NC: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """``gather_rows`` for tables without a gradient, such as int64 ids: table_KC in rank order."""
    if not is_collective(ids_NC, counts):
        return ids_NC
    return _all_gather_ragged(ids_NC, tuple(counts))


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_collective(local: torch.Tensor, counts: Sequence[int]) -> bool:
    """Whether there is anything to exchange; all ranks answer alike, since they hold the same counts."""
    world = _world_size()
    rank = dist.get_rank() if world > 1 else 0
    assert len(counts) == world and counts[rank] == len(local), (list(counts), rank, len(local))
    return world > 1 and sum(counts) > 0


def pad_rows(rows: torch.Tensor, length: int) -> torch.Tensor:
    if len(rows) == length:
        return rows.contiguous()
    padded = rows.new_zeros(length, *rows.shape[1:])
    padded[: len(rows)] = rows
    return padded


def _all_gather_ragged(local: torch.Tensor, counts: tuple[int, ...]) -> torch.Tensor:
    longest = max(counts)
    padded = local.new_empty(len(counts) * longest, *local.shape[1:])
    _all_gather_single(padded, pad_rows(local, longest))
    if min(counts) == longest:
        return padded
    return torch.cat([rows[:count] for rows, count in zip(padded.split(longest), counts, strict=True)])


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local_ND: torch.Tensor, counts: tuple[int, ...]) -> torch.Tensor:
        ctx.counts = counts
        return _all_gather_ragged(local_ND, counts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_KD: torch.Tensor) -> tuple[torch.Tensor, None]:
        counts, longest = ctx.counts, max(ctx.counts)
        padded = torch.cat([pad_rows(rows, longest) for rows in grad_KD.split(counts)])
        mine_MD = torch.empty_like(padded[:longest])
        _reduce_scatter_single(mine_MD, padded)
        return mine_MD[: counts[dist.get_rank()]], None
