"""launch/train.py, but rank 1 plans another seed's examples from step 2 on: what a stale data file would do."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import numpy as np

from muco_ds.data.plan import Plan

right = Plan.samples


def wrong(self: Plan, step: int) -> tuple[int, np.ndarray]:
    epoch, samples = right(self, step)
    return epoch, samples[::-1].copy() if step >= 2 else samples


if os.environ.get("RANK") == "1":
    Plan.samples = wrong  # type: ignore[method-assign]
train = Path(__file__).parents[2] / "launch" / "train.py"
sys.argv[0] = str(train)
runpy.run_path(str(train), run_name="__main__")
