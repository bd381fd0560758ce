"""The config's section `checkpoint`."""

from __future__ import annotations

import math
from dataclasses import dataclass

CHECKPOINT_RANGES: dict[str, tuple[float, bool, float]] = {
    "checkpoint.every": (1, True, math.inf),
    "checkpoint.keep": (1, True, math.inf),
    "checkpoint.keep_every": (0, True, math.inf),
}


@dataclass
class CheckpointOptions:
    """Checkpoints under `runs/NAME/checkpoints`.

    Args:
        every: Steps between checkpoints.
        keep: How many of the newest checkpoints stay on disk.
        keep_every: Checkpoints of steps divisible by this stay, too; 0: none.
        resume: Continue from the newest intact checkpoint of this run, if there is one.
        background: Write while training goes on, from a copy of weights and optimizer states in host memory; without
            room for it, false: training waits for the disk.
        copy_to: Folder on another file system that gets a copy of each checkpoint, below the run's name, from which
            the run goes on where its own folder holds none; null: no copies.
    """

    every: int = 500
    keep: int = 3
    keep_every: int = 0
    resume: bool = True
    background: bool = True
    copy_to: str | None = None
