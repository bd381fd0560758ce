"""The words of a heartbeat, and where it lies: for those who write it and those who read it, without torch."""

from __future__ import annotations

from pathlib import Path

STARTING, LOADING, MEETING, TRAINING = "starting", "loading data", "waiting for ranks", "training"
LOGGING, VALIDATING, SAVING, ENDED, FAILED = "logging", "validating", "saving", "ended", "failed"

STAGES = (STARTING, LOGGING, VALIDATING, SAVING, LOADING, MEETING, TRAINING)
"""In the order in which a rank goes through them: with the end of training a step is done."""


def heartbeat_path(folder: Path, rank: int) -> Path:
    return folder / "health" / f"rank_{rank:04d}.json"
