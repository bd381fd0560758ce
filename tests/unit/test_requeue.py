"""Is a job that ended requeued? srun and the ranks say how it ended; ends alike without progress end it for good."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from muco_ds import ends
from muco_ds.slurm.requeue import RESTARTS, End, progress, reason_to_stop, record, settle

ROOT = Path(__file__).parents[2]


def line(status: int, cause: str, rank: int = 0) -> ends.End:
    return ends.End("2026-11-22T00:00:00+00:00", 7, status, cause, rank, "5", 0)


def history(*ends_of_job: tuple[int, str, int]) -> list[End]:
    return [End("5", i, status, cause, saved) for i, (status, cause, saved) in enumerate(ends_of_job)]


@pytest.mark.parametrize(
    ("srun", "lines", "expected"),
    [
        (0, [line(0, "finished")], (0, "finished")),
        (75, [line(75, "signal SIGUSR1")], (75, "signal SIGUSR1")),
        (75, [], (75, "a signal")),
        # The second rank was on its way out when srun ended it for the first one's 75.
        (143, [line(75, "signal SIGUSR1")], (75, "signal SIGUSR1")),
        # srun ended rank 0 for rank 1's death; it had nothing to do with a request to stop.
        (137, [line(75, "signal SIGTERM before the first step")], (137, "a rank was ended by SIGKILL")),
        (137, [line(1, "CUDA out of memory", 3), line(1, "connection closed")], (1, "CUDA out of memory")),
        (143, [line(75, "signal SIGTERM"), line(1, "CUDA out of memory", 3)], (1, "CUDA out of memory")),
        (143, [line(75, "signal SIGTERM"), line(2, "no such file", 1)], (2, "no such file")),
        (2, [], (2, "an error in the input")),
        (137, [], (137, "a rank was ended by SIGKILL")),
        (9, [], (9, "status 9, and no rank said why")),
    ],
)
def test_ranks_know_better_than_srun(srun: int, lines: list[ends.End], expected: tuple[int, str]) -> None:
    status, cause = settle(srun, lines)
    assert status == expected[0] and cause.startswith(expected[1])


OOM, SIGNAL = (1, "CUDA out of memory: 2.5 GiB"), (75, "signal SIGUSR1")


@pytest.mark.parametrize(
    ("steps", "stops"),
    [
        ([(*OOM, 10)], None),
        ([(*OOM, 10), (*OOM, 10)], None),
        ([(*OOM, 10), (1, "CUDA out of memory: 3 GiB", 10), (*OOM, 10)], "3 ends in a row like this"),
        ([(*OOM, 10), (*OOM, 10), (*OOM, 20)], None),  # a checkpoint came in between
        ([(*OOM, 10), (*SIGNAL, 10), (*OOM, 10)], None),
        ([(*SIGNAL, 10), (*SIGNAL, 10), (*SIGNAL, 10)], "3 ends in a row like this"),  # a time limit that is too short
        ([(*SIGNAL, 10), (*SIGNAL, 20), (*SIGNAL, 30), (*SIGNAL, 40)], None),
        ([(*OOM, 10), (*SIGNAL, 10)] * 3, "6 ends in a row, "),
        ([(*OOM, 5), *([(*OOM, 10), (*SIGNAL, 10)] * 2)], None),
        ([(2, "no such file", 10)], "it won't mend itself"),
        ([(*SIGNAL, 10), (2, "the 16 ranks did not meet", 10)], None),  # a machine, not the input
        ([(*SIGNAL, 10), *[(2, "checkpoint: can't be written", 10)] * 3], "3 ends in a row like this"),
    ],
)
def test_ends_alike_without_progress_end_the_job(steps: list[tuple[int, str, int]], stops: str | None) -> None:
    reason = reason_to_stop(history(*steps), limit=3)
    assert reason is None if stops is None else reason is not None and reason.startswith(stops)


def test_progress_is_the_newest_complete_checkpoint_or_the_data_sets_done(tmp_path: Path) -> None:
    assert progress(tmp_path) == 0
    for name in ("step_0000010", "step_0000020", "step_0000030.tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    for name in ("step_0000010", "step_0000030.tmp"):
        (tmp_path / "checkpoints" / name / "manifest.json").write_text("{}")
    assert progress(tmp_path) == 10
    (tmp_path / "out" / "mmeb_datasets").mkdir(parents=True)
    (tmp_path / "out" / "mmeb_datasets" / "a.json").write_text("{}")
    assert progress(tmp_path / "out") == 1


def test_an_end_without_a_rank_s_line_is_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    (tmp_path / ends.ENDS_FILE).write_text(json.dumps({"job": "4", "status": 1}) + '\n{"half a li\n')
    (tmp_path / "job").mkdir()
    (tmp_path / RESTARTS).write_text('{"job": "5"}\n{"half a li\n')
    (tmp_path / RESTARTS).write_text('{"job": "5"}\n{"half a li')
    for restart in range(2):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        record(tmp_path, "5", restart, 137)
    written = ends.read_ends(tmp_path)
    assert [(end.status, end.job, end.restart) for end in written] == [(137, "5", 0), (137, "5", 1)]
    assert "SIGKILL" in written[0].cause
    assert len((tmp_path / RESTARTS).read_text().splitlines()) == 4
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    ends.record_end(tmp_path, 1, "CUDA out of memory", 3)
    assert record(tmp_path, "5", 2, 137)[-1].cause == "CUDA out of memory"
    assert len(ends.read_ends(tmp_path)) == 3, "the rank's own line stands"


def decide(folder: Path, status: int, restart: int, job: str = "5", limit: str = "3") -> tuple[int, str]:
    program = [sys.executable, ROOT / "launch" / "slurm" / "after.py", "decide", "--folder", folder]
    done = subprocess.run(
        [*program, "--status", str(status), "--limit", limit],
        env={"PYTHONPATH": str(ROOT), "SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": str(restart)},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def test_the_program_requeues_until_the_limit_and_starts_anew_with_another_job(tmp_path: Path) -> None:
    assert [decide(tmp_path, 137, restart)[0] for restart in range(3)] == [75, 75, 137]
    status, said = decide(tmp_path, 137, 0, job="6")
    assert status == 75 and "job 6, restart 0: a rank was ended by SIGKILL" in said
    assert said.strip().count("\n") == 0
    assert decide(tmp_path, 0, 1, job="6")[0] == 0
    assert decide(tmp_path, 2, 0, job="7")[0] == 2
    # 75 would have the job requeued.
    assert [decide(tmp_path, 75, restart, job="8")[0] for restart in range(3)] == [75, 75, 1]
    assert decide(tmp_path, 1, 0, limit="0") == (2, "error: MAX_FAILURES=0: give at least 1\n")
