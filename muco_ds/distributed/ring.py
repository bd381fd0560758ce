"""InfoNCE against the keys of all ranks without gathering them: blocks of keys travel from rank to rank.

Shape legend: W ranks, R query rows and N keys of this rank, M the largest N of any rank, D embedding width.

``gather_rows`` gives every rank all keys, O(R + W M) memory. Here a rank holds its own rows, the block of keys that
is with it and the one arriving, O(R + M). Each rank starts with its own keys; at every step it computes with the block
that it holds while that block is on its way to the next rank and another arrives, so that after W - 1 shifts each rank
has met all keys. In the backward the blocks travel again, each followed by the gradient that the ranks so far have
added to it: a rank computes its own part of a block's gradient first and needs the travelled sum only then. The W-th
shift of the sums brings each to the rank that the block belongs to.

Blocks are padded to M rows, so that buffers and messages have one size; the padding is never computed with. Shifts
happen at the same points of the program on every rank, also on one that has no rows or no keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from muco_ds.distributed.gather import is_collective, pad_rows
from muco_ds.losses import InfoNCE, RowIds, info_nce
from muco_ds.losses.ids import Masks, SameTarget, label_ids
from muco_ds.losses.info_nce import as_computed, block_functions, reciprocal, summarise, temperature_gradient
from muco_ds.losses.tiles import Block, RowState


def ring_info_nce(
    query_RD: torch.Tensor,
    key_ND: torch.Tensor,
    query_ids: RowIds,
    key_ids: RowIds,
    counts: Sequence[int],
    *,
    temperature: float | torch.Tensor = 0.02,
    mask_same_image: bool = True,
    same_target: SameTarget = "mask",
    limit_R: torch.Tensor | None = None,
    tile_rows: int = 1024,
    tile_keys: int = 4096,
) -> InfoNCE:
    """``info_nce`` of this rank's rows against the keys of all ranks, in memory O(R + M) (the module's docstring).

    Value, statistics and gradients are those of ``info_nce(query_RD, gather_rows(key_ND, counts), ...)`` with the ids
    gathered as well, up to the order of sums: the gradient of ``key_ND`` is the sum over all ranks' losses, so
    what ``muco_ds.distributed.gather`` says about scaling holds here too.

    ``query_RD`` and ``key_ND`` are this rank's, ``counts`` the number of keys of each rank, the same list on every rank
    (the batch plan knows it), so nothing waits for the device. A rank may hold no rows, no keys or neither. ``limit_R``
    stays with the rows: a limit that hangs on a row's own positive must be known before the keys go round.

    Both passes are collective: every rank must call it, with embeddings of one dtype that require a gradient on all
    ranks or on none, and must run the backward, also where it has no rows. With one process, without a process group or
    without any keys it is ``info_nce``.
    """
    if not is_collective(key_ND, counts):
        return info_nce(
            query_RD,
            key_ND,
            query_ids,
            key_ids,
            temperature=temperature,
            mask_same_image=mask_same_image,
            same_target=same_target,
            limit_R=limit_R,
            tile_rows=tile_rows,
            tile_keys=tile_keys,
        )
    query_RD, key_ND = as_computed(query_RD, key_ND)
    masks, scale = Masks(mask_same_image, same_target), reciprocal(temperature, query_RD)
    mine = Block(query_RD.detach(), key_ND.detach(), query_ids, key_ids, masks, scale, limit_R, (tile_rows, tile_keys))
    return summarise(*_RingInfoNCE.apply(query_RD, key_ND, temperature, mine, tuple(counts)))


class _Shift:
    """Tensors on their way to the next rank while others arrive from the previous one."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        self._leaving = tensors  # kept alive until they have left
        self._arriving = tuple(torch.empty_like(tensor) for tensor in tensors)
        operations = [dist.P2POp(dist.isend, tensor, (rank + 1) % world_size) for tensor in tensors]
        operations += [dist.P2POp(dist.irecv, tensor, (rank - 1) % world_size) for tensor in self._arriving]
        self._works = dist.batch_isend_irecv(operations)

    def wait(self) -> tuple[torch.Tensor, ...]:
        """What arrived. On a GPU this makes the stream wait, not the host."""
        for work in self._works:
            work.wait()
        return self._arriving


def _blocks(mine: Block, counts: tuple[int, ...]) -> Iterator[Block]:
    """This rank's rows against the keys of each rank, its own first; the next block arrives while one is computed with.

    The iterator must be run to its end: the ranks shift together.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    key_MD = pad_rows(mine.key_kD, max(counts))
    ids_M3 = pad_rows(mine.key_ids.columns().T, max(counts))
    for step in range(world_size):
        shift = _Shift(key_MD, ids_M3) if step < world_size - 1 else None
        count = counts[(rank - step) % world_size]
        labels = label_ids(mine.query_ids, RowIds.from_table(ids_M3[:count]))
        yield replace(mine, key_kD=key_MD[:count], query_ids=labels[0], key_ids=labels[1])
        if shift is not None:
            key_MD, ids_M3 = shift.wait()


class _RingInfoNCE(torch.autograd.Function):
    """``muco_ds.losses.info_nce._BlockInfoNCE`` with one block of keys per rank."""

    @staticmethod
    def forward(
        ctx: Any,
        query_RD: torch.Tensor,
        key_ND: torch.Tensor,
        temperature: float | torch.Tensor,
        mine: Block,
        counts: tuple[int, ...],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        state = RowState.empty(query_RD)
        with torch.autocast(query_RD.device.type, enabled=False):
            for block in _blocks(mine, counts):
                block_functions(query_RD).scan_block(block, state)
        loss_R, softmax_4R = state.finish()
        stats = state.stats(sum(counts), mine.scale)
        ctx.save_for_backward(query_RD, key_ND, softmax_4R)
        ctx.mine, ctx.counts = mine, counts
        ctx.temperature = temperature if ctx.needs_input_grad[2] else None
        ctx.mark_non_differentiable(stats)
        return loss_R, stats

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_R: torch.Tensor, _unused: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, None, None]:
        query_RD, key_ND, softmax_4R = ctx.saved_tensors
        mine = replace(ctx.mine, query_RD=query_RD, key_kD=key_ND)  # these are checked for changes in place
        grad_query_RD = torch.zeros_like(query_RD, dtype=softmax_4R.dtype)
        shift: _Shift | None = None
        with torch.autocast(query_RD.device.type, enabled=False):
            for block in _blocks(mine, ctx.counts):
                grad_MD = grad_query_RD.new_zeros(max(ctx.counts), grad_query_RD.shape[1])
                grad_kD = grad_MD[: len(block.key_kD)]
                block_functions(query_RD).add_block_gradients(block, softmax_4R, grad_R, grad_query_RD, grad_kD)
                if shift is not None:
                    grad_MD += shift.wait()[0]
                shift = _Shift(grad_MD)
            wanted = None
            if ctx.temperature is not None:
                wanted = temperature_gradient(query_RD, grad_query_RD, mine.scale).to(ctx.temperature)
        assert shift is not None
        grad_key_ND = shift.wait()[0][: len(key_ND)]
        return grad_query_RD.to(query_RD.dtype), grad_key_ND.to(key_ND.dtype), wanted, None, None
