"""Mixtures: shares are kept, runs are homogeneous, passes are whole, any step is known without the ones before."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from muco_ds.data.mixture import Mixture
from muco_ds.errors import UserError

SIZES = [700, 90, 2000, 13]


def sources_of(mixture: Mixture, samples: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.cumsum(mixture.sizes), samples, side="right")


def mixed(weights: list[float | None] | None = None, images: int = 64, run: int = 1, seed: int = 0) -> Mixture:
    return Mixture(SIZES, weights or [None] * 4, images=images, run=run, seed=seed)


@pytest.mark.parametrize("run", [1, 8])
@pytest.mark.parametrize("weights", [None, [5.0, 1.0, 0.01, 0.7]])
def test_every_stretch_has_the_shares(run: int, weights: list[float | None] | None) -> None:
    mixture = mixed(weights, run=run)
    shares = np.array(weights or SIZES, float)
    shares /= shares.sum()
    steps = [mixture.batch(step)[0] for step in range(300)]
    for start, stop in ((0, 300), (100, 101), (7, 50)):
        found = np.bincount(sources_of(mixture, np.concatenate(steps[start:stop])), minlength=4)
        expected = shares * (stop - start) * 64
        assert (np.abs(found - expected) <= (2 + len(SIZES) * shares) * run).all(), (found, expected)


def test_a_step_does_not_depend_on_the_steps_before() -> None:
    """What `_runs` takes from a window of times is what the whole order of times gives."""
    mixture = mixed([3.0, 1.0, 4.0, 0.5])
    whole_source, whole_count = mixture._runs(0, 5000)
    for start, stop in ((0, 1), (1, 2), (64, 128), (777, 1555), (4990, 5000)):
        source, count = mixture._runs(start, stop)
        assert (source == whole_source[start:stop]).all() and (count == whole_count[start:stop]).all()
    for source in range(4):  # its runs are numbered without a gap
        mine = np.sort(whole_count[whole_source == source])
        assert (mine == np.arange(len(mine))).all()


def test_runs_come_from_one_data_set() -> None:
    for run, images in ((8, 64), (64, 64)):
        mixture = Mixture([700, 90, 2000], [None] * 3, images=images, run=run, seed=1)
        seen: Counter[int] = Counter()
        for step in range(40):
            sources = sources_of(mixture, mixture.batch(step)[0]).reshape(-1, run)
            assert (sources == sources[:, :1]).all()
            seen.update(sources[:, 0].tolist())
        assert len(seen) == 3


def test_a_pass_visits_each_row_at_most_once_and_leaves_out_less_than_a_run() -> None:
    mixture = mixed(run=8)
    visited: dict[tuple[int, int], list[int]] = {}
    for step in range(150):
        samples, passes = mixture.batch(step)
        for source, number, sample in zip(sources_of(mixture, samples), passes, samples, strict=True):
            visited.setdefault((source, number), []).append(sample)
    assert len({number for source, number in visited if source == 1}) > 2
    for (source, number), rows in visited.items():
        assert len(set(rows)) == len(rows)
        if (source, number + 1) in visited and (source, number + 2) in visited:  # a finished pass
            assert len(rows) == SIZES[source] // 8 * 8


def test_one_data_set_is_taken_in_whole_batches() -> None:
    mixture = Mixture([100], [None], images=48, run=1, seed=0)
    for step in range(10):
        samples, passes = mixture.batch(step)
        assert len(set(samples)) == 48 and set(passes) == {step // 2}


def test_seeds_give_other_batches() -> None:
    assert mixed(seed=1).batch(5)[0].tolist() != mixed(seed=2).batch(5)[0].tolist()
    assert mixed(seed=1).batch(5)[0].tolist() == mixed(seed=1).batch(5)[0].tolist()


def test_data_sets_of_equal_size_are_not_shuffled_alike() -> None:
    """The n-th rows of two sets that were made from the same pictures must not always meet in a batch."""
    mixture = Mixture([500, 500], [None, None], images=20, run=1, seed=0)
    together = 0
    for step in range(50):
        samples = mixture.batch(step)[0]
        together += len(set(samples[samples < 500]) & set(samples[samples >= 500] - 500))
    assert together < 100  # of 500; about 20 by chance


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match=r"data\.train\[3\] has 13 usable rows but its weight takes 25 for every batch"):
        mixed([1.0, 0.5, 0.5, 1.3])
    with pytest.raises(UserError, match=r"batch\.images=5000 but data\.train has 2803 usable rows: lower"):
        mixed(images=5000)
    with pytest.raises(UserError, match=r"data\.train\[3\] has 13 usable rows, batch\.source_run=16: lower it"):
        mixed(run=16)
