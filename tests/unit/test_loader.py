"""Batches from worker processes: the same for any number of workers and from any step on; mistakes stay one line."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from demo import Rows

from muco_ds.data.collator import Collator
from muco_ds.data.loader import StepDataset, step_batches
from muco_ds.data.schema import PackedBatch, StepBatch
from muco_ds.errors import UserError

STEPS = 6


def dataset_of(rows: Rows, rank: int = 0, world_size: int = 2, **options: int) -> StepDataset:
    return StepDataset(rows.plan(world_size, images=10, **options), rows.collator(), rank, max_steps=STEPS)


def batches(rows: Rows, start: int = 0, workers: int = 0, rank: int = 0) -> list[StepBatch]:
    return list(step_batches(dataset_of(rows, rank), start, workers=workers, pin_memory=False))


def assert_same(a: StepBatch, b: StepBatch) -> None:
    assert (a.step, a.epoch, a.rows_per_rank, a.images, a.cost) == (b.step, b.epoch, b.rows_per_rank, b.images, b.cost)
    assert a.sample_rows.tolist() == b.sample_rows.tolist() and len(a.packs) == len(b.packs)
    for x, y in zip(a.packs, b.packs, strict=True):
        assert_same_pack(x, y)


def assert_same_pack(x: PackedBatch, y: PackedBatch) -> None:
    for name in ("input_ids_T", "position_ids_41T", "pixels_PC", "grid_thw_I3", "emb_index_E", "ids_E3"):
        assert torch.equal(getattr(x, name), getattr(y, name)), name
    assert x.counts == y.counts and x.has_images == y.has_images
    assert torch.equal(x.segments.dense_mask(), y.segments.dense_mask())


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(mixed: Rows, workers: int) -> None:
    inline, parallel = batches(mixed), batches(mixed, workers=workers)
    assert [batch.step for batch in inline] == list(range(STEPS)) and len(parallel) == STEPS
    assert {batch.epoch for batch in inline} == {0, 1}
    for a, b in zip(inline, parallel, strict=True):
        assert_same(a, b)


def test_starting_later_equals_skipping(mixed: Rows) -> None:
    whole, rest = batches(mixed), batches(mixed, start=4, workers=2)
    assert len(rest) == 2
    for a, b in zip(whole[4:], rest, strict=True):
        assert_same(a, b)
    assert batches(mixed, start=STEPS) == []


def test_a_step_tells_each_rank_about_all(mixed: Rows) -> None:
    for a, b in zip(batches(mixed, rank=0), batches(mixed, rank=1), strict=True):
        assert a.rows_per_rank == b.rows_per_rank == [a.packs[0].counts, b.packs[0].counts]
        assert not set(a.sample_rows) & set(b.sample_rows) and len(a.sample_rows) + len(b.sample_rows) == a.images == 10
        assert a.cost == b.cost and a.cost["llm_tokens"] == a.packs[0].tokens + b.packs[0].tokens
        assert a.cost["vit_patches"] == a.packs[0].patches + b.packs[0].patches
        assert 0 < a.cost["pack_fill"] <= 1 <= a.cost["imbalance"]


class MistakenCollator(Collator):
    def __call__(self, samples: np.ndarray, epoch: int) -> PackedBatch:
        raise UserError(f"row {samples[0]}: the reason: the cure")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_mistake_found_by_a_worker_stays_one_line(mixed: Rows, workers: int) -> None:
    dataset = dataset_of(mixed)
    first = dataset.plan.step(0).packs[0][0][0]
    collator = mixed.collator()
    collator.__class__ = MistakenCollator
    dataset.collator = collator
    with pytest.raises(UserError) as caught:
        list(step_batches(dataset, 0, workers=workers, pin_memory=False))
    assert str(caught.value) == f"row {first}: the reason: the cure"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_that_needs_two_packs_says_what_to_change(scenes: Rows, workers: int) -> None:
    need = -(-scenes.plan(2, images=10).step(0).tokens // 2)
    dataset = dataset_of(scenes, pack_tokens=int(need * 0.8))
    message = (
        rf"step 0: batch\.images=10 needs about {need} tokens on each of 2 ranks but "
        rf"batch\.pack_tokens={int(need * 0.8)}: raise batch\.pack_tokens .* lower batch\.images, or use more ranks"
    )
    with pytest.raises(UserError, match=message) as caught:
        list(step_batches(dataset, 0, workers=workers, pin_memory=False))
    assert "\n" not in str(caught.value)
