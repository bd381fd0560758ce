"""A run that is told to stop, or whose checkpoints are altered, goes on to the losses of a run that never was.

Killed at any instant: test_faults.py.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from muco_ds.ends import read_ends

from fault_arena import steps_logged
from programs import Demo, Job, Programs, losses, metrics, refusal

STEPS, RANKS = 8, 2
# The constant schedule, because a cosine's end is run.max_steps, which may change between a run and its resumption.
LONG = {"run.max_steps": STEPS, "checkpoint.every": 1, "checkpoint.keep": STEPS, "optim.schedule": "constant"}
# Learned, so that its state is part of what must go on.
LONG |= {"temperature.schedule": "learned", "temperature.lr": 0.05}
REQUEUE = 75


@pytest.fixture(scope="module")
def uninterrupted(demo: Demo, programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a finished run with a checkpoint of each step."""
    out = tmp_path_factory.mktemp("uninterrupted")
    programs.run(demo.train(out, LONG), ranks=RANKS).check()
    assert len(losses(out)) == STEPS
    return out


@pytest.fixture
def finished(uninterrupted: Path, tmp_path: Path) -> Path:
    """A copy of the finished run for a test to spoil."""
    shutil.copytree(uninterrupted, tmp_path / "copy")
    return tmp_path / "copy"


def wait_until(condition: Callable[[], bool], job: Job) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline:
            job.kill()
            raise AssertionError("the run made no step within 60 s")
        time.sleep(0.01)


def test_half_written_and_altered_checkpoints_are_passed_over_and_named(
    demo: Demo, programs: Programs, uninterrupted: Path, finished: Path
) -> None:
    checkpoints = finished / "run" / "checkpoints"
    (checkpoints / "step_0000009.tmp").mkdir()
    (checkpoints / "step_0000008" / "manifest.json").unlink()
    shard = next((checkpoints / "step_0000007" / "model").glob("*optim_states.pt"))
    shard.write_bytes(shard.read_bytes()[:-1])
    next((checkpoints / "step_0000006" / "model").glob("*model_states.pt")).unlink()
    shard = next((checkpoints / "step_0000005" / "model").glob("*rank_1_*optim_states.pt"))
    shard.write_bytes(shard.read_bytes()[:-9] + b"!" + shard.read_bytes()[-8:])
    output = programs.run(demo.train(finished, LONG), ranks=RANKS).check().output
    assert f"step_0000005 is damaged (model/{shard.name} was altered" in output
    for step in (6, 7, 8):
        assert len([line for line in output.splitlines() if f"step_000000{step} is not complete" in line]) == 1, output
    assert f"resumed from {checkpoints / 'step_0000004'}" in output
    assert losses(finished) == losses(uninterrupted)
    assert not list(checkpoints.glob("*.tmp"))


def test_a_signal_to_one_rank_stops_all_with_the_state_saved(
    demo: Demo, programs: Programs, uninterrupted: Path, tmp_path: Path
) -> None:
    overrides = {**LONG, "checkpoint.every": 100}
    job = programs.start(demo.train(tmp_path, overrides), ranks=RANKS)
    wait_until(lambda: steps_logged(tmp_path) > 0, job)
    job.signal(1, signal.SIGUSR1)
    assert job.wait().codes == [REQUEUE] * RANKS
    saved = list((tmp_path / "run" / "checkpoints").glob("step_*"))
    stopped_after = len(metrics(tmp_path))
    assert [path.name for path in saved] == [f"step_{stopped_after:07d}"] and stopped_after < STEPS
    assert "resumed from" in programs.run(demo.train(tmp_path, overrides), ranks=RANKS).check().output
    assert losses(tmp_path) == losses(uninterrupted)


def test_a_signal_to_the_whole_group_spares_the_loader_and_saves(
    demo: Demo, programs: Programs, uninterrupted: Path, tmp_path: Path
) -> None:
    """Schedulers signal every process; a loader worker that died of it would take the run down unsaved."""
    overrides = {**LONG, "checkpoint.every": 100, "data.workers": 1}
    job = programs.start(demo.train(tmp_path, overrides), ranks=RANKS)
    wait_until(lambda: steps_logged(tmp_path) > 0, job)
    os.killpg(job.pid, signal.SIGTERM)
    assert job.wait().codes == [REQUEUE] * RANKS
    assert [(end.status, end.cause) for end in read_ends(tmp_path / "run")] == [(REQUEUE, "signal SIGTERM")]
    programs.run(demo.train(tmp_path, overrides), ranks=RANKS).check()
    assert losses(tmp_path) == losses(uninterrupted)


def test_a_run_with_its_end_moved_behind_it_is_finished(demo: Demo, programs: Programs, finished: Path) -> None:
    """It must not ask to be requeued for ever."""
    programs.run(demo.train(finished, {**LONG, "run.max_steps": STEPS - 2}), ranks=RANKS).check()


def test_a_finished_run_started_again_does_nothing(demo: Demo, programs: Programs, finished: Path) -> None:
    def state() -> list[tuple[Path, int]]:
        return [(path, path.stat().st_mtime_ns) for path in sorted((finished / "run" / "checkpoints").rglob("*"))]

    before, lines = state(), metrics(finished)
    programs.run(demo.train(finished, LONG), ranks=RANKS).check()
    assert state() == before and metrics(finished) == lines


def test_another_run_is_not_continued_by_mistake(
    demo: Demo, programs: Programs, uninterrupted: Path, tmp_path: Path
) -> None:
    line = refusal(programs.run(demo.train(uninterrupted, {**LONG, "loss.temperature": 0.05}), ranks=RANKS))
    assert "loss.temperature=0.05" in line and "trained with 0.02" in line and "run.name" in line
    shutil.copytree(demo.model, tmp_path / "other")
    line = refusal(programs.run(demo.train(uninterrupted, {**LONG, "model.path": tmp_path / "other"})))
    assert f"model.path={tmp_path / 'other'}" in line and str(demo.model) in line and "change it back" in line
    line = refusal(programs.run(demo.train(uninterrupted, {**LONG, "checkpoint.resume": "false"})))
    assert "holds checkpoints" in line and "run.name" in line
