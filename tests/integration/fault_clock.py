"""A clock that is set back in the middle of a run, whose environment holds a secret that must be nowhere written."""

from __future__ import annotations

import os
import time
from pathlib import Path

from fault_arena import RANKS, STEPS, Arena, Outcome, last_checkpoint

_PROGRAM = Path(__file__).with_name("jumping_train.py")
_SECRET = "canary-7fQ2pX"  # what a test looks for, no secret


def set_back(arena: Arena) -> Outcome:
    """By a day, on each rank at another step; then the run goes on from checkpoints that seem to be of tomorrow."""
    out = arena.new("clock")
    argv = [_PROGRAM, *arena.argv(out, {"run.max_steps": STEPS // 2})[1:]]
    arena.programs.run(argv, ranks=RANKS, HF_TOKEN=_SECRET, OPENAI_API_KEY=_SECRET).check()
    assert last_checkpoint(out) == STEPS // 2
    tomorrow = time.time() + 86_400
    for path in (out / "run").rglob("*"):
        os.utime(path, (tomorrow, tomorrow))
    assert f"step_{STEPS // 2:07d}" in arena.finish(out)
    written = [path for path in (out / "run").rglob("*") if path.is_file()]
    assert len(written) > 10 and not [path for path in written if _SECRET.encode() in path.read_bytes()]
    return Outcome("clock set back by a day, files of tomorrow", 1, "went on; resumed", "nothing")
