"""What tools/status.py says of folders made by hand: runs that go on, ended, stand still, are gone, or are no runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from muco_ds.ends import record_end
from muco_ds.errors import UserError
from muco_ds.heartbeat import heartbeat_path
from muco_ds.run_status import DEAD, FAILED_RUN, FINISHED, RUNNING, SAVED, STALLED, UNKNOWN, read_status, span

ROOT = Path(__file__).resolve().parents[2]


def beat(folder: Path, rank: int, *, age_s: float = 1.0, **facts: Any) -> None:
    """The heartbeat of one of two ranks, in the middle of step 41 of 100, which usually takes 2 s."""
    values = {
        **{
            "started": "2026-01-01T00:00:00+00:00",
            "ends_before": 0,
            "rank": rank,
            "world_size": 2,
            "host": f"node{rank}",
        },
        **{"pid": 100 + rank, "every_s": 10.0, "phase": "training", "phase_s": 0.5, "late_s": 120.0, "step": 40},
        **{"steps": 100, "usual_step_s": 2.0, "last_hour": {"steps": 30, "seconds": 90.0}, "resident_gib": 1.0 + rank},
        **{"finished": None, "error": None, **facts},
    }
    path = heartbeat_path(folder, rank)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values))
    os.utime(path, (time.time() - age_s,) * 2)


def log(folder: Path, *lines: dict[str, Any]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def stack(folder: Path, rank: int, function: str, age_s: float = 0.0) -> None:
    (folder / "stacks").mkdir(exist_ok=True)
    path = folder / "stacks" / f"rank_{rank}.txt"
    path.write_text(
        "Timeout (0:02:00)!\nThread 0x01 (most recent call first):\n"
        '  File "/lib/threading.py", line 1 in wait\n\nThread 0x02 (most recent call first):\n'
        f'  File "/lib/torch/distributed.py", line 2988 in {function}\n'
        f'  File "{os.sep}x{os.sep}muco_ds{os.sep}trainer.py", line 130 in train_step\n'
    )
    os.utime(path, (time.time() - age_s,) * 2)


def test_a_run_that_goes_on(tmp_path: Path) -> None:
    beat(tmp_path, 0)
    beat(tmp_path, 1, age_s=9.0, step=39)
    log(tmp_path, {"step": 20, "loss": 3.0, "val/overall/precision@1": 0.25}, {"step": 40, "loss": 2.0})
    step = tmp_path / "checkpoints" / "step_0000020"
    step.mkdir(parents=True)
    (step / "manifest.json").write_text(json.dumps({"files": {"a": 10, "b": 32}}))
    sealing = tmp_path / "checkpoints" / "step_0000040.tmp"  # its manifest is there, its name is not
    sealing.mkdir()
    (sealing / "manifest.json").write_text('{"files": {}}')
    status = read_status(tmp_path)
    assert status.verdict == RUNNING and status.well and not status.warnings
    assert (status.step, status.steps, status.ranks, status.hosts) == (40, 100, 2, ["node0", "node1"])
    assert status.rate_now == 0.5 and status.rate_hour == pytest.approx(1 / 3)
    assert status.remaining_s == pytest.approx(180.0)
    assert status.last["loss"] == 2.0 and status.validation == {"step": 20, "val/overall/precision@1": 0.25}
    assert (status.checkpoint, status.checkpoint_bytes) == ("step_0000020", 42)
    assert status.resident_gib == 2.0
    assert json.loads(status.as_json())["verdict"] == "running"


@pytest.mark.parametrize(
    ("code", "cause", "verdict"),
    [
        (0, "finished", FINISHED),
        (75, "signal SIGUSR1", SAVED),
        (2, "data: gone", FAILED_RUN),
        (1, "memory", FAILED_RUN),
    ],
)
def test_ends_of_this_start_decide(code: int, cause: str, verdict: str, tmp_path: Path) -> None:
    record_end(tmp_path, 1, "of an earlier start", 3)
    beat(tmp_path, 0, age_s=4000.0, phase="ended", ends_before=1)
    beat(tmp_path, 1, age_s=4000.0, ends_before=1)
    assert read_status(tmp_path).verdict == DEAD, "an end before this start says nothing of it"
    record_end(tmp_path, code, cause, 41)
    record_end(tmp_path, 1, "what follows from it", 41)
    status = read_status(tmp_path)
    assert status.verdict == verdict and cause in status.why and status.well == (code in (0, 75))


def test_without_a_line_of_its_end_the_ranks_say_it(tmp_path: Path) -> None:
    for finished, verdict in ((True, FINISHED), (False, SAVED)):
        for rank in (0, 1):
            beat(tmp_path, rank, age_s=900.0, phase="ended", finished=finished)
        assert read_status(tmp_path).verdict == verdict
    beat(tmp_path, 1, age_s=900.0, phase="failed", error="out of memory")
    status = read_status(tmp_path)
    assert status.verdict == FAILED_RUN and "rank 1 (node1, pid 101): out of memory" in status.why


def test_a_killed_run_is_dead_once_no_rank_is_heard(tmp_path: Path) -> None:
    for age, verdict in ((50.0, RUNNING), (70.0, DEAD)):
        for rank in (0, 1):
            beat(tmp_path, rank, age_s=age)
        assert read_status(tmp_path).verdict == verdict


def test_a_hang_is_seen_while_heartbeats_go_on_and_names_who_is_behind(tmp_path: Path) -> None:
    stack(tmp_path, 0, "all_gather")
    stack(tmp_path, 1, "of_an_earlier_hang", age_s=5000.0)
    beat(tmp_path, 0, step=41, phase="waiting for ranks", phase_s=119.5)
    beat(tmp_path, 1, step=41, phase="loading data", phase_s=121.0)
    status = read_status(tmp_path)
    assert status.verdict == STALLED and not status.well
    assert "rank 1 (node1, pid 101)" in status.why and "rank 0" not in status.why and "loading data" in status.why
    assert status.stacks == {0: ["torch/distributed.py:2988 all_gather", "muco_ds/trainer.py:130 train_step"]}
    beat(tmp_path, 0, step=41, phase="waiting for ranks", phase_s=100.0)
    beat(tmp_path, 1, step=41, phase="loading data", phase_s=100.0)
    assert read_status(tmp_path).verdict == RUNNING


def test_a_stopped_rank_is_named_when_the_others_wait_for_it(tmp_path: Path) -> None:
    beat(tmp_path, 0, phase="waiting for ranks", phase_s=40.0)
    beat(tmp_path, 1, age_s=70.0)
    status = read_status(tmp_path)
    assert status.verdict == STALLED and "not heard for 70 s: rank 1 (node1, pid 101)" in status.why
    beat(tmp_path, 0, phase_s=0.5)
    status = read_status(tmp_path)  # a late disk or another clock: steps go on
    assert status.verdict == RUNNING and "not heard for 70 s, though steps go on: rank 1" in status.warnings[0]


def test_ranks_of_an_earlier_start_do_not_count(tmp_path: Path) -> None:
    beat(tmp_path, 0, phase="starting", step=0)
    beat(tmp_path, 1, age_s=7000.0, started="2025-12-31T00:00:00+00:00", world_size=4)
    status = read_status(tmp_path)
    assert status.verdict == RUNNING and status.warnings == ["1 of 2 ranks have not been heard since the start"]


def test_a_clock_that_is_ahead_is_said_and_hides_no_hang(tmp_path: Path) -> None:
    for phase_s, verdict in ((1.0, RUNNING), (500.0, STALLED)):
        for rank in (0, 1):
            beat(tmp_path, rank, age_s=-3690.0, phase_s=phase_s)
        status = read_status(tmp_path)
        assert status.verdict == verdict and "clocks differ by 61 min" in status.warnings[0]


def test_what_needs_attention_is_a_warning(tmp_path: Path) -> None:
    beat(tmp_path, 0)
    beat(tmp_path, 1)
    slow = {"slowest_rank": 1, "slowest_late_s": 0.5, "step_s_p50": 2.0}
    log(tmp_path, {"step": 9, "replaced_images": 2}, {"step": 10, "replaced_images": 1, "skipped_steps": 4, **slow})
    step = tmp_path / "checkpoints" / "step_0000010"
    step.mkdir(parents=True)
    (step / "manifest.json").write_text(json.dumps({"files": {"a": 10**18}}))
    for _ in range(2):
        record_end(tmp_path, 1, "CUDA out of memory", 3)
    for rank in (0, 1):
        beat(tmp_path, rank, ends_before=2)
    text = "\n".join(read_status(tmp_path).warnings)
    for part in ("4 steps were skipped", "3 broken", "rank 1 (node1) is 0.50 s late", "GB are free", "in the same way"):
        assert part in text
    log(tmp_path, {"step": 11, "data_wait_frac": 0.3})
    assert "30% of the time" in "\n".join(read_status(tmp_path).warnings)


def test_half_written_folders_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run: {max_steps: 7")
    assert read_status(tmp_path).verdict == UNKNOWN
    (tmp_path / "config.yaml").write_text("run: {max_steps: 7}")
    (tmp_path / "metrics.jsonl").write_bytes(b'\0\0\n[1]\n{"step": 3, "loss": 1.5}\n{"step": 4, "lo')
    (tmp_path / "ends.jsonl").write_text('{"time": "20')
    (tmp_path / "checkpoints" / "step_0000003").mkdir(parents=True)
    heartbeat_path(tmp_path, 0).parent.mkdir()
    for rank, text in enumerate(["", "[]", "{}", '{"rank": 0, "phase": "training"}', "\0"]):
        heartbeat_path(tmp_path, rank).write_text(text)
    status = read_status(tmp_path)
    assert (status.verdict, status.step, status.steps, status.checkpoint) == (UNKNOWN, 3, 7, None)


@pytest.mark.parametrize("made", [True, False])
def test_a_folder_that_is_no_run_is_an_error(made: bool, tmp_path: Path) -> None:
    folder = tmp_path / "none"
    if made:
        folder.mkdir()
    with pytest.raises(UserError, match="give the folder of a run"):
        read_status(folder)


def status_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "status.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_the_tool_has_a_status_for_scripts(tmp_path: Path) -> None:
    beat(tmp_path, 0)
    beat(tmp_path, 1)
    done = status_tool(str(tmp_path))
    assert (
        done.returncode == 0
        and "running: training" in done.stdout
        and "40 of 100 (40%), about 3 min left" in done.stdout
    )
    assert "\033" not in done.stdout, "colours are for terminals"
    record_end(tmp_path, 1, "CUDA out of memory", 41)
    done = status_tool(str(tmp_path), "--json")
    assert done.returncode == 1 and json.loads(done.stdout)["why"].startswith("CUDA out of memory")
    done = status_tool(str(tmp_path / "none"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "is no folder" in done.stderr


def test_spans_are_said_as_people_say_them() -> None:
    assert [span(s) for s in (0, 99, 100, 5999, 7500, 300000)] == [
        "0 s",
        "99 s",
        "1 min",
        "99 min",
        "2 h 05 min",
        "3 d 11 h",
    ]
