"""The plan: the batch is the batch for any number of ranks, every row at most once an epoch, packs within budget."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from muco_ds.data.assign import largest_first
from muco_ds.data.plan import Plan
from muco_ds.data.schema import RowCounts
from muco_ds.errors import UserError

from demo import Rows, synthetic_index


@pytest.fixture(scope="module")
def big(scenes: Rows) -> Rows:
    return dataclasses.replace(scenes, index=synthetic_index(1000))


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_the_global_batch_does_not_depend_on_the_ranks(big: Rows, world_size: int) -> None:
    one, many = big.plan(1, images=64, pack_tokens=100_000), big.plan(world_size, images=64, pack_tokens=100_000)
    for step in (0, 1, 17):
        a, b = one.step(step), many.step(step)
        assert len(b.packs) == world_size
        assert a.samples_B.tolist() == b.samples_B.tolist() and a.passes_B.tolist() == b.passes_B.tolist()
        for plan in (a, b):
            assert sorted(np.concatenate([pack for rank in plan.packs for pack in rank])) == list(range(64))
        assert (a.tokens, a.patches, a.images) == (b.tokens, b.patches, b.images)
        assert a.flops == pytest.approx(b.flops)


def test_an_epoch_visits_a_row_at_most_once(big: Rows) -> None:
    plan = big.plan(images=96, pack_tokens=1_000_000)
    assert plan.mixture.steps_per_epoch == 10
    epochs = []
    for epoch in range(3):
        steps = [plan.mixture.batch(step) for step in range(epoch * 10, epoch * 10 + 10)]
        assert {number for _, passes in steps for number in passes} == {epoch}
        epochs.append(np.concatenate([samples for samples, _ in steps]))
        assert len(set(epochs[-1])) == 960
    assert (epochs[0] == epochs[1]).mean() < 0.02
    left_out = [set(range(1000)) - set(samples) for samples in epochs]
    assert left_out[0] != left_out[1] != left_out[2]


def test_a_fresh_plan_gives_the_same_step_and_another_seed_another(big: Rows) -> None:
    first, again, other = (big.plan(3, 32, 100_000, seed=seed).step(123) for seed in (5, 5, 6))
    for a, b in zip(first.packs, again.packs, strict=True):
        assert [pack.tolist() for pack in a] == [pack.tolist() for pack in b]
    for name in ("samples_B", "passes_B"):
        assert getattr(first, name).tolist() == getattr(again, name).tolist()
    bare = [dataclasses.replace(plan, packs=[], samples_B=None, passes_B=None) for plan in (first, again)]
    assert bare[0] == bare[1] and first.digest() == again.digest() != other.digest()
    assert first.samples_B.tolist() != other.samples_B.tolist()


def test_packs_stay_within_their_budget(big: Rows) -> None:
    plan = big.plan(2, images=64, pack_tokens=4096)
    for step in range(20):
        step_plan = plan.step(step)
        for rank in step_plan.packs:
            for pack in rank:
                costs = plan.costs(step_plan.samples_B[pack], step_plan.passes_B[pack], step)
                assert costs.tokens_B.sum() <= 4096
        n_packs = max(map(len, step_plan.packs))
        assert step_plan.pack_fill == pytest.approx(step_plan.tokens / (2 * n_packs * 4096))


def test_no_epoch_draws_a_row_that_outgrows_a_pack(big: Rows) -> None:
    """Paraphrases and layouts are drawn anew each epoch: the check at the start covers all of them."""
    samples = np.arange(1000)
    for history in (0.0, 0.5, 1.0):
        longest = big.stage(history=history).longest(0, 1000)
        plan = big.plan(images=8, pack_tokens=int(longest.max()), history=history)
        drawn = np.stack([plan.costs(samples, np.full(1000, number), 0).tokens_B for number in range(60)])
        assert (drawn <= longest).all()
        assert (drawn.max(0) == longest).mean() > 0.2  # a bound that is reached, not just any
        with pytest.raises(UserError, match="needs"):
            big.plan(images=8, pack_tokens=int(longest.max()) - 1, history=history)
    parts = [big.stage().longest(*part) for part in ((0, 1), (1, 334), (334, 1000))]
    assert (np.concatenate(parts) == big.stage().longest(0, 1000)).all()


@pytest.mark.parametrize("history", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("world_size", [1, 3])
def test_predictions_equal_what_is_collated(mixed: Rows, history: float, world_size: int) -> None:
    plan, collator = mixed.plan(world_size, images=10, history=history), mixed.collator(history=history)
    for step in (0, 5, 11):  # several epochs
        step_plan = plan.step(step)
        tokens = patches = 0
        for packs, counts in zip(step_plan.packs, step_plan.rows_per_rank, strict=True):
            assert len(packs) == 1
            samples, passes = step_plan.samples_B[packs[0]], step_plan.passes_B[packs[0]]
            batch = collator(samples, passes, 0)
            assert batch.counts == counts and counts == RowCounts(counts.queries, counts.queries)
            tokens, patches = tokens + batch.tokens, patches + batch.patches
            assert batch.tokens == plan.costs(samples, passes, 0).tokens_B.sum()
        assert (tokens, patches) == (step_plan.tokens, step_plan.patches)


def test_paraphrases_are_drawn_anew_each_pass(big: Rows) -> None:
    plan = big.plan(images=8, pack_tokens=8192, history=0.0)
    a, b = (plan.costs(np.arange(1000), np.full(1000, number), 0).tokens_B for number in (0, 1))
    assert 0.5 < (a != b).mean() < 1.0
    alone = np.array([plan.costs(np.array([i]), np.array([0]), 0).tokens_B[0] for i in range(0, 1000, 97)])
    assert (alone == a[::97]).all()


def test_ranks_are_balanced(big: Rows) -> None:
    imbalances = [big.plan(8, images=256, pack_tokens=1_000_000).step(step).imbalance for step in range(3)]
    assert max(imbalances) < 1.01
    for rank in big.plan(8, images=8, pack_tokens=1_000_000).step(0).packs:
        assert sum(map(len, rank)) == 1


def test_largest_first_gives_every_example_to_one_part() -> None:
    weights = np.array([7.0, 5.0, 4.0, 3.0, 3.0, 2.0])
    parts = largest_first(weights, 3)
    assert sorted(weights[part].sum() for part in parts) == [7.0, 8.0, 9.0]
    assert sorted(np.concatenate(parts)) == list(range(6))


def test_tokens_decide_where_cost_would_need_more_packs(big: Rows) -> None:
    """Long texts are cheap and pictures dear: balanced on cost alone, one rank would get all the texts."""
    index = synthetic_index(8)
    index.samples["query_image_tokens"], index.samples["query_images"] = 0, 0
    index.samples["patches"], index.samples["patches_squared"] = 0, 0
    index.samples["patches"][0], index.samples["patches_squared"][0] = 10**5, 10**10
    rows = dataclasses.replace(big, index=index)
    total = rows.plan(2, images=8, pack_tokens=100_000).step(0).tokens
    step = rows.plan(2, images=8, pack_tokens=int(total * 0.62)).step(0)
    assert max(map(len, step.packs)) == 1


def test_fewer_examples_than_ranks_leave_some_without_any(scenes: Rows) -> None:
    step = scenes.plan(world_size=5, images=3).step(0)
    assert sorted(sum(map(len, rank)) for rank in step.packs) == [0, 0, 1, 1, 1]
    assert len({len(rank) for rank in step.packs}) == 1
    assert sorted(rows.queries > 0 for rows in step.rows_per_rank) == [False, False, True, True, True]


def test_mistakes_come_with_numbers_and_a_cure(scenes: Rows, mixed: Rows) -> None:
    with pytest.raises(UserError, match=r"batch\.images=65 but data\.train has 64 usable rows: lower batch\.images"):
        scenes.plan(images=65)
    longest = mixed.stage().longest(0, len(mixed.index))
    row, need = mixed.index.samples["row"][longest.argmax()], longest.max()
    message = rf"data\.train row {row} needs up to {need} tokens but batch\.pack_tokens=100: raise batch\.pack_tokens"
    with pytest.raises(UserError, match=message):
        mixed.plan(pack_tokens=100)


def test_planning_is_fast(scenes: Rows) -> None:
    """A step of thousands of examples on many ranks is planned in well under a second: it happens for every step."""
    import time

    rows = dataclasses.replace(scenes, index=synthetic_index(4096))
    plan: Plan = rows.plan(64, images=4096, pack_tokens=200_000)
    start = time.perf_counter()
    plan.step(0)
    assert time.perf_counter() - start < 1.0
