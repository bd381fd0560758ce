"""Ranks that diverge are named on every rank at once; a signal to one rank stops all of them before the same step."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from muco_ds.data.schema import PackedBatch, RowCounts, StepBatch
from muco_ds.data.segments import SegmentBuilder, causal, separate
from muco_ds.data.vision import VisionInputs
from muco_ds.distributed import signals
from muco_ds.distributed.lockstep import Lockstep
from muco_ds.distributed.testing import run_distributed
from muco_ds.errors import UserError

pytestmark = pytest.mark.distributed

ROWS = [RowCounts(3, 3), RowCounts(2, 2), RowCounts(2, 2)]


def batch(step: int, rank: int) -> StepBatch:
    """What a rank of three holds, as far as the exchange reads it."""
    segments = SegmentBuilder()
    segments.add(causal(1))
    empty, none = torch.empty(0), separate([1])
    counts = [RowCounts(ROWS[rank].queries - 1, ROWS[rank].targets - 1), RowCounts(1, 1)]
    rows = {"segments": segments.build(), "read_segments": none, "read_rows_Q": empty, "image_rows_N": empty}
    packs = [
        PackedBatch(
            input_ids_T=empty,
            position_ids_41T=empty,
            pixels_PY=empty,
            palette_CV=empty,
            grid_thw_I3=empty,
            vision=VisionInputs({}, none),
            has_images=False,
            emb_index_E=empty,
            ids_E3=empty,
            counts=c,
            **rows,
        )
        for c in counts
    ]
    return StepBatch(step, 0, packs, plan_digest=77, rows_per_rank=ROWS, samples=empty.numpy(), images=3, pairs=7)


def diverging(what: str) -> str:
    """The error of a rank when rank 1 differs in one thing, after a step in which all agree."""
    rank = dist.get_rank()
    lockstep = Lockstep()
    assert lockstep.stop_before(batch(6, rank)) is False
    mine = batch(7, rank)
    if rank == 1:
        fewer = [replace(mine.packs[0], counts=RowCounts(0, 1)), mine.packs[1]]
        mine = {
            "step": replace(mine, step=8),
            "plan": replace(mine, plan_digest=78),
            "packs": replace(mine, packs=mine.packs[:1]),
            "query rows": replace(mine, packs=fewer),
        }[what]
    try:
        lockstep.stop_before(mine)
    except UserError as error:
        assert error.on_every_rank
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("step", "8 instead of 7"),
        ("plan", "78 instead of 77"),
        ("packs", "1 instead of 2"),
        ("query rows", "1 instead of 2"),
    ],
)
def test_every_rank_names_the_one_that_differs(what: str, said: str) -> None:
    for message in run_distributed(diverging, 3, what, timeout_s=60.0):
        assert message.startswith("rank 1 differs at step") and f"{what} {said}" in message


def stopping() -> tuple[bool, bool, int, int | None]:
    rank = dist.get_rank()
    signals.listen(60.0, print)
    lockstep = Lockstep()
    first = lockstep.stop_before(batch(0, rank))
    if rank == 2:
        os.kill(os.getpid(), signal.SIGUSR1)
    return first, lockstep.stop_before(batch(1, rank)), lockstep.stopped_by, lockstep.steps


def test_a_signal_to_one_rank_is_heard_by_all_before_the_next_step() -> None:
    assert run_distributed(stopping, 3) == [(False, True, signal.SIGUSR1, 1)] * 3
