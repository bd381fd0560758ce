"""launch/train.py on machines whose clocks are set back by a day in the middle of the run, one after the other."""

from __future__ import annotations

import runpy
import time
from pathlib import Path
from typing import Any

from muco_ds.distributed import env
from muco_ds.trainer import Trainer

AT = {0: 9, 1: 5}  # by rank: the steps before the jump
DAY_S = 86_400.0
clock, train_step = time.time, Trainer.train_step
taken = 0


def jumping_step(self: Trainer, batch: Any) -> Any:
    global taken
    taken += 1
    if taken == AT[env.rank()]:
        time.time = lambda: clock() - DAY_S
    return train_step(self, batch)


Trainer.train_step = jumping_step  # type: ignore[method-assign]
runpy.run_path(str(Path(__file__).resolve().parents[2] / "launch" / "train.py"), run_name="__main__")
