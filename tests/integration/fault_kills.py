"""kill -9 of all processes at once: anywhere in a run's life, in training, and while a checkpoint is written."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from fault_arena import RANKS, Arena, Outcome, last_checkpoint, last_step, steps_logged
from programs import Job


def kills(arena: Arena, count: int) -> list[Outcome]:
    """Kill a run again and again until it is through, then the next, `count` times in all; a third while saving."""
    tries = dict.fromkeys(("anywhere", "in training", "while saving"), 0)
    again = dict.fromkeys(tries, 0)  # most steps that were taken a second time
    runs, out, start_s = 0, arena.new("killed"), 5.0
    while sum(tries.values()) < count:
        kind = min(tries, key=tries.__getitem__)
        before, began = steps_logged(out), time.monotonic()
        job = arena.programs.start(arena.argv(out), ranks=RANKS)
        if kind == "anywhere":
            _sleep(job, arena.rng.uniform(0, 1.5 * start_s))
        else:
            _until(job, lambda out=out, before=before: steps_logged(out) != before)
            start_s = time.monotonic() - began
            if kind == "in training":
                _sleep(job, arena.rng.uniform(0, 2))
            else:
                _until(job, lambda out=out: _saving(out))
                _sleep(job, arena.rng.uniform(0, 0.2))
        ended = _over(job)
        job.kill()
        if ended:
            assert job.wait().codes == [0] * RANKS, job.wait().output[-3000:]
            arena.compare(out)
            runs, out = runs + 1, arena.new("killed")
            continue
        if kind == "while saving" and not _saving(out):
            kind = "in training"  # the checkpoint was quicker
        tries[kind] += 1
        again[kind] = max(again[kind], last_step(out) - last_checkpoint(out))
    arena.finish(out)
    happened = f"resumed each time; {runs + 1} runs finished, their losses bit-equal to the undisturbed one's"
    return [
        Outcome(f"kill -9 {kind}", tries[kind], happened, f"nothing; at most {again[kind]} steps taken again")
        for kind in tries
    ]


def _saving(out: Path) -> bool:
    return any((out / "run" / "checkpoints").glob("step_*.tmp"))


def _over(job: Job) -> bool:
    return (job.folder / "status.json").exists()


def _until(job: Job, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition() and not _over(job):
        if time.monotonic() > deadline:
            job.kill()
            raise AssertionError(f"nothing within 120 s: {job.wait(1).output[-3000:]}")
        time.sleep(0.001)


def _sleep(job: Job, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not _over(job):
        time.sleep(0.001)
