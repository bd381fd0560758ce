"""Assignment: every example once, packs within budget, the fewest packs, the slowest rank near the mean, fast."""

from __future__ import annotations

import time
from functools import cache
from itertools import product

import numpy as np
import pytest

from muco_ds.data.assign import GOOD_ENOUGH, assign, differencing, largest_first, least_pack_tokens

SEEDS = range(40)


def instance(seed: int) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Costs, tokens, ranks and a budget: few or many examples, ties, sizes alike or far apart, tight or loose."""
    rng = np.random.default_rng(seed)
    ranks, per_rank = int(rng.choice([1, 2, 3, 8, 17])), int(rng.choice([1, 2, 5, 20]))
    examples = ranks * per_rank + int(rng.integers(0, ranks))
    tokens_B = rng.integers(200, int(rng.choice([210, 1600, 9000])), examples)
    related = rng.choice(3)
    cost_B = [tokens_B.astype(float), rng.random(examples) + 0.1, tokens_B**2.0 + rng.random(examples)][related]
    budget = max(int(tokens_B.max()), int(tokens_B.sum() / ranks / rng.choice([0.7, 1, 3]) * rng.choice([1.01, 1.3])))
    return cost_B, tokens_B, ranks, budget


def m3t_like(examples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Costs and tokens of pictures of common aspect ratios, short side 640, under seven turns of text."""
    rng = np.random.default_rng(seed)
    common_B = rng.choice([4 / 3, 3 / 4, 3 / 2, 2 / 3], examples, p=[0.55, 0.2, 0.15, 0.1])
    aspect_B = np.where(rng.random(examples) < 0.8, common_B, np.exp(rng.normal(0, 0.3, examples)).clip(0.5, 2))
    image_B = (23 * np.round(23 * np.maximum(aspect_B, 1 / aspect_B))).clip(256, 1280)
    tokens_B = (image_B + rng.normal(7 * 60, 60, examples).clip(150)).astype(np.int64)
    return 13.1e9 * tokens_B + 5.2e9 * image_B + 1.6e5 * (4 * image_B) ** 2, tokens_B


def loads(packs: list[list[np.ndarray]], values_B: np.ndarray) -> np.ndarray:
    """Sum of each pack, [ranks, packs]."""
    return np.array([[values_B[pack].sum() for pack in rank] for rank in packs])


@pytest.mark.parametrize("seed", SEEDS)
def test_every_example_once_within_the_budget(seed: int) -> None:
    cost_B, tokens_B, ranks, budget = instance(seed)
    packs = assign(cost_B, tokens_B, ranks, budget)
    assert len(packs) == ranks and len({len(rank) for rank in packs}) == 1
    members = [pack for rank in packs for pack in rank]
    assert all(pack.dtype == np.int64 and (np.diff(pack) > 0).all() for pack in members)
    assert sorted(np.concatenate(members)) == list(range(len(tokens_B)))
    assert loads(packs, tokens_B).max() <= budget
    units_B = scaled(cost_B)
    for rank in packs:  # dearest first, so spare packs come last
        cost_and_use = [(units_B[pack].sum(), len(pack) > 0) for pack in rank]
        assert cost_and_use == sorted(cost_and_use, reverse=True)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_more_packs_than_balancing_tokens_and_no_slower_than_largest_first(seed: int) -> None:
    cost_B, tokens_B, ranks, budget = instance(seed)
    packs = assign(cost_B, tokens_B, ranks, budget)
    assert len(packs[0]) >= -(-tokens_B.sum() // (ranks * budget))
    by_cost, by_tokens = (
        [first_fit(part, tokens_B, budget) for part in largest_first(scaled(values_B), ranks)]
        for values_B in (cost_B, tokens_B)
    )
    for twin in (by_cost, by_tokens):
        assert len(packs[0]) <= max(map(len, twin))
        if len(packs[0]) == max(map(len, twin)):
            slowest = max(cost_B[[i for pack in rank for i in pack]].sum() for rank in twin)
            assert loads(packs, cost_B).sum(1).max() <= slowest * (1 + 1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_slower_than_differencing_where_packs_are_large(seed: int) -> None:
    cost_B, tokens_B, ranks, _ = instance(seed)
    packs = assign(cost_B, tokens_B, ranks, int(tokens_B.sum()))
    for parts in (differencing(scaled(cost_B), ranks, 1), differencing(scaled(cost_B), ranks, ranks)):
        slowest = max(cost_B[part].sum() for part in parts)
        assert loads(packs, cost_B).sum(1).max() <= slowest * (1 + GOOD_ENOUGH)


def scaled(values_B: np.ndarray) -> np.ndarray:
    return np.floor(values_B * (2**40 / values_B.max())).astype(np.int64)


def first_fit(members: list[int], tokens_B: np.ndarray, budget: int) -> list[list[int]]:
    """First-fit-decreasing, written down anew."""
    packs: list[list[int]] = []
    for i in sorted(members, key=lambda i: -tokens_B[i]):
        fitting = [pack for pack in packs if tokens_B[pack].sum() + tokens_B[i] <= budget]
        fitting[0].append(i) if fitting else packs.append([i])
    return packs


@pytest.mark.parametrize("seed", range(12))
def test_small_instances_against_all_assignments(seed: int) -> None:
    """Two ranks, seven examples: every one of the 4^7 ways to put them into two packs each."""
    rng = np.random.default_rng(seed)
    tokens_B = rng.integers(100, 1000, 7)
    cost_B = tokens_B * rng.uniform(0.5, 2, 7)
    budget = int(max(tokens_B.max(), tokens_B.sum() / 4 * 1.15))
    packs = assign(cost_B, tokens_B, 2, budget)
    places = np.array(list(product(range(4), repeat=7)))
    filled = np.stack([(tokens_B * (places == pack)).sum(1) for pack in range(4)])
    fits = (filled <= budget).all(0)
    if not fits.any():
        assert len(packs[0]) > 2
        return
    first_rank = (cost_B * (places < 2)).sum(1)[fits]
    best = np.maximum(first_rank, cost_B.sum() - first_rank).min()
    assert len(packs[0]) == 2 and loads(packs, cost_B).sum(1).max() <= best * 1.25


def test_the_same_on_every_call_whatever_the_ties() -> None:
    tokens_B = np.repeat([700, 500, 500, 300], 50)
    for cost_B in (tokens_B.astype(float), np.ones(200), np.zeros(200)):
        first, again = (assign(cost_B, tokens_B, 7, 4096) for _ in range(2))
        assert [[p.tolist() for p in r] for r in first] == [[p.tolist() for p in r] for r in again]
    noise_B = tokens_B * (1 + 1e-15)  # the last bits of a cost, which differ between machines, decide nothing
    noisy = assign(noise_B, tokens_B, 7, 4096)
    assert [[p.tolist() for p in r] for r in noisy] == [
        [p.tolist() for p in r] for r in assign(tokens_B.astype(float), tokens_B, 7, 4096)
    ]


def test_differencing_beats_largest_first_where_it_is_known_to() -> None:
    weights = np.array([8, 7, 6, 5, 4])  # Karmarkar and Karp's example
    slowest = [max(weights[part].sum() for part in parts) for parts in both(weights, 2)]
    assert slowest == [17, 16]
    halves = differencing(np.arange(1, 13), 3, 3)
    assert [len(part) for part in halves] == [4, 4, 4] and sorted(np.concatenate(halves)) == list(range(12))
    packs = assign(weights * 1.0, np.ones(5, int), 2, 5)
    assert loads(packs, weights).sum(1).max() == 15  # and a swap finds the optimum


def both(weights: np.ndarray, parts: int) -> tuple[list[list[int]], list[list[int]]]:
    return largest_first(weights, parts), differencing(weights, parts, 1)


def test_packs_come_before_balance() -> None:
    """One dear picture and cheap long texts: on cost alone one rank would get all the texts, and two packs of them."""
    tokens_B, cost_B = np.full(9, 100), np.array([8.0] + [1.0] * 8)
    packs = assign(cost_B, tokens_B, 2, 500)
    assert len(packs[0]) == 1 and sorted(len(rank[0]) for rank in packs) == [4, 5]
    loose = assign(cost_B, tokens_B, 2, 800)
    assert loads(loose, cost_B).sum(1).tolist() == [8, 8]


def test_alone_or_more_ranks_than_examples() -> None:
    tokens_B = np.array([5, 3, 4])
    assert [pack.tolist() for pack in assign(tokens_B * 1.0, tokens_B, 1, 12)[0]] == [[0, 1, 2]]
    assert sum(len(pack) for rank in assign(tokens_B * 1.0, tokens_B, 5, 12) for pack in rank) == 3
    with pytest.raises(AssertionError, match="exceeds a pack"):
        assign(tokens_B * 1.0, tokens_B, 1, 4)


def test_no_rank_is_idle_while_another_has_two_examples() -> None:
    for seed in SEEDS:
        cost_B, tokens_B, ranks, budget = instance(seed)
        sizes = [sum(map(len, rank)) for rank in assign(cost_B, tokens_B, ranks, budget)]
        assert min(sizes) >= 1


@pytest.mark.parametrize("ranks, per_rank", [(8, 128), (16, 64), (64, 16), (256, 16)])
def test_balance_and_fill_on_m3t_like_sizes(ranks: int, per_rank: int) -> None:
    """Where a rank holds 16 examples or more and `pack_tokens` is 2 % above the batch's tokens per pack."""
    cost_B, tokens_B = m3t_like(ranks * per_rank, seed=ranks)
    wanted = max(1, per_rank // 16)
    packs = assign(cost_B, tokens_B, ranks, int(tokens_B.sum() / ranks / wanted * 1.02))
    assert len(packs[0]) == wanted  # so that fill is 1 / 1.02, above 0.97
    per_pack = loads(packs, cost_B)
    assert per_pack.sum(1).max() / per_pack.sum(1).mean() <= 1.02
    # All ranks wait for the slowest in every pack under ZeRO-3: what counts there stays close too.
    assert per_pack.max(0).sum() / per_pack.sum(1).mean() <= 1.05


def test_packs_nearly_full_are_still_the_fewest() -> None:
    """13 examples a pack and 1 % of room: neither first-fit nor largest-first gets there."""
    cost_B, tokens_B = m3t_like(1024, seed=0)
    budget = int(tokens_B.sum() / 80 * 1.01)
    assert len(first_fit(list(range(1024)), tokens_B, budget)) > 80
    assert max(tokens_B[part].sum() for part in largest_first(tokens_B, 80)) > budget
    assert len(assign(cost_B, tokens_B, 8, budget)[0]) == 10


@pytest.mark.parametrize("seed", range(12))
def test_the_least_budget_for_a_number_of_packs(seed: int) -> None:
    cost_B, tokens_B, ranks, budget = instance(seed)
    n_packs = len(assign(cost_B, tokens_B, ranks, budget)[0])
    least = least_pack_tokens(tokens_B, ranks, n_packs, budget)
    assert least <= budget and len(assign(cost_B, tokens_B, ranks, least)[0]) == n_packs
    lower = int(least * 0.99)
    if lower >= tokens_B.max():
        assert len(assign(cost_B, tokens_B, ranks, lower)[0]) > n_packs


@cache
def seconds(ranks: int, examples: int) -> float:
    cost_B, tokens_B = m3t_like(examples, seed=1)
    budget = int(tokens_B.sum() / ranks * 1.02)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        assign(cost_B, tokens_B, ranks, budget)
        times.append(time.perf_counter() - start)
    return min(times)


def test_fast_enough_for_every_step() -> None:
    assert seconds(64, 1024) < 0.05  # 5 ms on an idle core; a loader process plans every step
    assert seconds(1024, 16384) < 2.0
