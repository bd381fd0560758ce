"""Which examples a step takes, from one data set or several: a pure function of (seed, step).

Examples are taken in runs of N from one data set (N = 1 mixes them, N = the batch makes batches homogeneous). Data set
s, with share w_s of the runs, places its k-th run at the time (k + u) / w_s, u drawn uniformly for each run; runs are
taken in the order of their times. Over any stretch of T runs a data set thus gets T w_s of them, give or take two, and
which runs a step takes is known without looking at the steps before.

Shape suffixes: S data sets, R runs of one step, B examples of the global batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from muco_ds.data import draws
from muco_ds.errors import UserError

_SEEDS_APART = 0x9E3779B97F4A7C15


class Mixture:
    """The sampling schedule.

    Args:
        sizes: usable examples of each data set.
        weights: relative share of each in the examples drawn; all None: its size.
        images: examples of the global batch.
        run: consecutive examples from one data set; divides `images`. A single data set is taken in whole batches.
        seed: of the run.
    Raises:
        UserError: a data set smaller than a run or than its share of a batch, or all of them smaller than a batch.
    """

    def __init__(
        self, sizes: Sequence[int], weights: Sequence[float | None], *, images: int, run: int, seed: int
    ) -> None:
        if sum(sizes) < images:
            raise UserError(f"batch.images={images} but data.train has {sum(sizes)} usable rows: lower batch.images")
        self.run = images if len(sizes) == 1 else run
        assert images % self.run == 0, (images, self.run)
        for i, size in enumerate(sizes):
            if size < self.run:
                raise UserError(f"data.train[{i}] has {size} usable rows, batch.source_run={run}: lower it")
        self.sizes, self.images, self.seed = list(sizes), images, seed
        self.first_sample_S = np.cumsum([0, *sizes[:-1]])
        shares_S = np.array(sizes if None in weights else weights, np.float64)
        self.shares_S = shares_S / shares_S.sum()
        for i, (size, share) in enumerate(zip(sizes, self.shares_S.tolist(), strict=True)):
            if share * images > size:
                taken = f"its weight takes {share * images:.0f} for every batch"
                raise UserError(f"data.train[{i}] has {size} usable rows but {taken}: lower its weight or batch.images")

    @property
    def steps_per_epoch(self) -> int:
        """Steps that take as many examples as there are, in whole batches."""
        return sum(self.sizes) // self.images

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Sample positions of a step, data sets one after the other in one numbering, and the pass of each: int64 [B].

        A data set goes through all its rows (but for a remainder smaller than a run) in a new order in each pass. Where
        a pass ends within a batch of a mixture, a row may come again in it, in the next pass.
        """
        per_step = self.images // self.run
        source_R, count_R = self._runs(step * per_step, (step + 1) * per_step)
        samples_B, passes_B = (np.empty((per_step, self.run), np.int64) for _ in range(2))
        for source in np.unique(source_R).tolist():
            size = self.sizes[source]
            pass_R, position_R = np.divmod(count_R, size // self.run)
            for number in np.unique(pass_R[source_R == source]).tolist():
                mine_R = (source_R == source) & (pass_R == number)
                positions_RN = position_R[mine_R, None] * self.run + np.arange(self.run)
                # Of its own for each: data sets of equal sizes would show their n-th rows together.
                samples_N = draws.permute(positions_RN.reshape(-1), size, self.seed + source * _SEEDS_APART, number)
                samples_B[mine_R] = self.first_sample_S[source] + samples_N.reshape(positions_RN.shape)
                passes_B[mine_R] = number
        return samples_B.reshape(-1), passes_B.reshape(-1)

    def _runs(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Data set of runs start .. stop, and how many runs it had before each."""
        # Up to time t a data set has placed t * share runs, give or take one: all runs sought lie within this window.
        earliest, latest = start - len(self.sizes) - 1.0, stop + len(self.sizes) + 1.0
        before = 0
        times, sources, counts = [], [], []
        for source, share in enumerate(self.shares_S.tolist()):
            count = np.arange(max(0, int(share * earliest) - 2), int(share * latest) + 2)
            jitter = draws.draw_uniform(self.seed, source, count, draws.MIXTURE)
            time = (count + jitter) / share
            inside = time >= earliest
            before += int(count[0] + (~inside).sum())
            times.append(time[inside])
            counts.append(count[inside])
            sources.append(np.full(inside.sum(), source))
        order = np.argsort(np.concatenate(times), kind="stable")[start - before : stop - before]
        return np.concatenate(sources)[order], np.concatenate(counts)[order]
