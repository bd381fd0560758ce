"""launch/train.py, but rank 1 plans another seed's examples from step 2 on: what a stale data file would do."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import numpy as np

from muco_ds.data.mixture import Mixture

right = Mixture.batch


def wrong(self: Mixture, step: int) -> tuple[np.ndarray, np.ndarray]:
    samples_B, passes_B = right(self, step)
    return (samples_B[::-1].copy() if step >= 2 else samples_B), passes_B


if os.environ.get("RANK") == "1":
    Mixture.batch = wrong  # type: ignore[method-assign]
train = Path(__file__).parents[2] / "launch" / "train.py"
sys.argv[0] = str(train)
runpy.run_path(str(train), run_name="__main__")
