"""Batches from worker processes: the same for any number of workers and from any step on; mistakes stay one line."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from muco_ds.data.collator import Collator
from muco_ds.data.loader import StepDataset, step_batches
from muco_ds.data.schema import PackedBatch, StepBatch
from muco_ds.errors import UserError

from demo import Rows

STEPS = 6


def dataset_of(rows: Rows, rank: int = 0, world_size: int = 2, **options: int) -> StepDataset:
    return StepDataset(rows.plan(world_size, images=10, **options), rows.collator(), rank, max_steps=STEPS)


def batches(rows: Rows, start: int = 0, workers: int = 0, rank: int = 0) -> list[StepBatch]:
    return list(step_batches(dataset_of(rows, rank), start, workers=workers, pin_memory=False))


def assert_same(a: StepBatch, b: StepBatch) -> None:
    assert (a.step, a.epoch, a.rows_per_rank, a.images, a.cost) == (b.step, b.epoch, b.rows_per_rank, b.images, b.cost)
    assert a.samples.tolist() == b.samples.tolist() and len(a.packs) == len(b.packs)
    for x, y in zip(a.packs, b.packs, strict=True):
        assert_same_pack(x, y)


def assert_same_pack(x: PackedBatch, y: PackedBatch) -> None:
    for name in ("input_ids_T", "position_ids_41T", "pixels_PY", "palette_CV", "grid_thw_I3", "emb_index_E", "ids_E3"):
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
        assert a.pairs == b.pairs == sum(rows.queries for rows in a.rows_per_rank)
        assert not set(a.samples) & set(b.samples) and len(a.samples) + len(b.samples) == a.images == 10
        assert a.cost == b.cost and a.cost["llm_tokens"] == a.packs[0].tokens + b.packs[0].tokens
        assert a.cost["vit_patches"] == a.packs[0].patches + b.packs[0].patches
        assert 0 < a.cost["pack_fill"] <= 1 <= a.cost["imbalance"]


class MistakenCollator(Collator):
    def __call__(self, samples_B: np.ndarray, passes_B: np.ndarray, step: int) -> PackedBatch:
        raise UserError(f"row {samples_B[0]}: the reason: the cure")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_mistake_found_by_a_worker_stays_one_line(mixed: Rows, workers: int) -> None:
    dataset = dataset_of(mixed)
    plan = dataset.plan.step(0)
    first = plan.samples_B[plan.packs[0][0][0]]
    collator = mixed.collator()
    collator.__class__ = MistakenCollator
    dataset.collator = collator
    with pytest.raises(UserError) as caught:
        list(step_batches(dataset, 0, workers=workers, pin_memory=False))
    assert str(caught.value) == f"row {first}: the reason: the cure"


def test_every_rank_gets_equally_many_packs_and_an_empty_one_has_no_rows(scenes: Rows) -> None:
    """Uneven work: three examples of about the same size on two ranks, a pack of one example each."""
    largest = max(
        scenes.plan(images=3).costs(np.arange(len(scenes.index)), np.zeros(len(scenes.index), int), 0).tokens_B
    )
    plan = scenes.plan(2, images=3, pack_tokens=int(largest * 1.2))
    counts = []
    for rank in range(2):
        dataset = StepDataset(plan, scenes.collator(), rank, max_steps=2)
        batch = dataset[0]
        assert isinstance(batch, StepBatch)
        assert len(batch.packs) == 2
        counts.append([pack.counts.queries for pack in batch.packs])
        assert sum(counts[-1]) == batch.rows_per_rank[rank].queries
        for pack in batch.packs:
            assert len(pack.emb_index_E) == len(pack.ids_E3) == pack.counts.queries + pack.counts.targets
    assert sorted(map(sorted, counts)) == [[0, 7], [7, 7]]
