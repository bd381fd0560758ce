"""How many turns, or hard negatives, of an example a step uses: a limit that may grow from easy to hard with the steps.

Shape suffixes: B examples, N things of those examples that are to be chosen from.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from muco_ds.data import draws
from muco_ds.data.schema import TURNS_PER_SAMPLE

TURNS, NEGATIVES = range(2)
"""What a limit is for; two with different purposes are rounded independently."""


@dataclass(frozen=True)
class Limit:
    """At most `last` of something; if `steps` > 0, `first` at step 0 and on a line to `last` at that step."""

    last: int
    first: int = 0
    steps: int = 0

    def at(self, step: int) -> float:
        """The limit of a step, which need not be whole."""
        if step >= self.steps:
            return float(self.last)
        return self.first + (self.last - self.first) * (step / self.steps)

    def drawn(self, seed: int, samples_B: np.ndarray, passes_B: np.ndarray, step: int, purpose: int) -> np.ndarray:
        """Whole limits, int64 [B], that are `at(step)` on average: 2.3 is 3 for three examples in ten, for others 2."""
        low, part = divmod(self.at(step), 1.0)
        more_B = draws.draw_uniform(seed, passes_B, samples_B, draws.CURRICULUM, purpose) < part
        return int(low) + more_B.astype(np.int64)


ALL_TURNS, NO_NEGATIVES = Limit(TURNS_PER_SAMPLE), Limit(0)


def first_of_each(owner_N: np.ndarray, key_N: np.ndarray, at_most_N: np.ndarray | int) -> np.ndarray:
    """Places of the `at_most` lowest keys of each owner, by owner and key: int64.

    Args:
        owner_N: ascending.
        at_most_N: the same for all places of an owner.
    """
    order_N = np.lexsort((key_N, owner_N))
    first_N = np.searchsorted(owner_N, owner_N, side="left")
    return order_N[np.arange(len(owner_N)) - first_N < at_most_N]
