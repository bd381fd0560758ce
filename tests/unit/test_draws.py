"""Draws and permutations: pure, independent of batching, uniform."""

from __future__ import annotations

import numpy as np
import pytest

from muco_ds.data.draws import PARAPHRASE, TURN_ORDER, draw_u64, draw_uniform, permute


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 64, 65, 1000, 4096])
def test_permute_is_a_bijection(n: int) -> None:
    for seed, epoch in ((0, 0), (1, 3)):
        assert sorted(permute(np.arange(n), n, seed, epoch)) == list(range(n))


def test_permute_depends_on_seed_and_epoch_and_not_on_the_batch() -> None:
    positions = np.arange(1000)
    base = permute(positions, 1000, seed=0, epoch=0)
    for seed, epoch in ((0, 1), (1, 0), (1, 1)):
        # Two random permutations of 1000 agree in about one place.
        assert (permute(positions, 1000, seed, epoch) == base).sum() < 10
    assert (base == positions).sum() < 10
    assert (permute(positions[137:260], 1000, 0, 0) == base[137:260]).all()


def test_permute_sends_every_place_everywhere() -> None:
    landed = np.stack([permute(np.arange(6), 6, seed, 0) for seed in range(600)])
    for place in range(6):
        counts = np.bincount(landed[:, place], minlength=6)
        assert counts.min() > 55 and counts.max() < 145  # 100 +- 9


def test_permute_of_billions_costs_nothing() -> None:
    n = 5_000_000_000
    out = permute(np.arange(n - 1000, n), n, 0, 0)
    assert out.min() >= 0 and out.max() < n and len(np.unique(out)) == 1000


def test_a_draw_is_the_same_alone_and_in_a_batch() -> None:
    samples, lanes = np.arange(50), np.arange(50) % 7
    batch = draw_u64(3, 2, samples, PARAPHRASE, lanes)
    alone = [draw_u64(3, 2, np.array([i]), PARAPHRASE, np.array([i % 7]))[0] for i in range(50)]
    assert batch.tolist() == alone
    grid = draw_u64(3, 2, samples[:, None], PARAPHRASE, np.arange(7)[None, :])
    assert grid.shape == (50, 7) and (grid[samples, lanes] == batch).all()


def test_a_draw_depends_on_every_argument() -> None:
    sample = np.array([3])
    draws = [
        draw_u64(1, 2, sample, PARAPHRASE, 4),
        draw_u64(9, 2, sample, PARAPHRASE, 4),
        draw_u64(1, 9, sample, PARAPHRASE, 4),
        draw_u64(1, 2, np.array([9]), PARAPHRASE, 4),
        draw_u64(1, 2, sample, TURN_ORDER, 4),
        draw_u64(1, 2, sample, PARAPHRASE, 9),
    ]
    assert len({int(draw[0]) for draw in draws}) == 6


def test_draws_are_uniform_and_uncorrelated() -> None:
    samples = np.arange(20000)
    u = draw_uniform(0, 0, samples, PARAPHRASE)
    assert u.min() >= 0 and u.max() < 1
    counts = np.histogram(u, bins=20, range=(0, 1))[0]
    assert np.abs(counts - 1000).max() < 150  # five standard deviations
    other = [draw_uniform(0, 1, samples, PARAPHRASE), draw_uniform(0, 0, samples, TURN_ORDER), np.roll(u, 1)]
    for v in other:
        assert abs(np.corrcoef(u, v)[0, 1]) < 0.04
