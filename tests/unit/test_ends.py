"""What ended a run is written down once, in one line, whatever state the disk is in."""

from __future__ import annotations

import os
from datetime import datetime, timezone
from pathlib import Path

import pytest

from muco_ds.ends import ENDS_FILE, read_ends, record_end


def test_an_end_is_read_as_it_was_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "3", "SLURM_JOB_ID": "812", "SLURM_RESTART_COUNT": "2"}.items():
        monkeypatch.setenv(name, value)
    record_end(tmp_path / "runs" / "x", 75, "signal SIGUSR1", 12)
    (end,) = read_ends(tmp_path / "runs" / "x")
    assert (end.step, end.status, end.cause, end.rank) == (12, 75, "signal SIGUSR1", 3)
    assert (end.job, end.restart) == ("812", 2)
    written = datetime.fromisoformat(end.time)
    assert written.tzinfo is not None and abs((datetime.now(timezone.utc) - written).total_seconds()) < 60


def test_without_slurm_there_is_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    record_end(tmp_path, 0, "finished")
    (end,) = read_ends(tmp_path)
    assert (end.step, end.rank, end.job, end.restart) == (None, 0, None, 0)


def test_a_cause_of_many_lines_is_one_line_short_enough_to_be_written_at_once(tmp_path: Path) -> None:
    record_end(tmp_path, 1, "first\nsecond\t" + "x" * 9000)
    record_end(tmp_path, 1, "next")
    assert [end.cause[:13] for end in read_ends(tmp_path)] == ["first second ", "next"]
    assert all(len(line) < 4096 for line in (tmp_path / ENDS_FILE).read_bytes().splitlines())


def test_lines_that_were_cut_or_are_of_another_kind_are_skipped(tmp_path: Path) -> None:
    record_end(tmp_path, 0, "finished")
    whole = (tmp_path / ENDS_FILE).read_bytes()
    (tmp_path / ENDS_FILE).write_bytes(whole[:30] + b"\n[1, 2]\n{}\n\xff\xfe\n" + whole + whole[:-20])
    assert [end.cause for end in read_ends(tmp_path)] == ["finished"]
    assert read_ends(tmp_path / "nowhere") == []


def test_an_end_after_a_line_that_was_cut_is_not_lost_with_it(tmp_path: Path) -> None:
    (tmp_path / ENDS_FILE).write_text('{"time": "2026-')
    record_end(tmp_path, 0, "finished")
    record_end(tmp_path, 1, "next")
    assert [end.cause for end in read_ends(tmp_path)] == ["finished", "next"]
    assert len((tmp_path / ENDS_FILE).read_bytes().splitlines()) == 3


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full to stand for a full disk")
def test_a_disk_that_takes_nothing_does_not_hide_the_cause(tmp_path: Path) -> None:
    (tmp_path / ENDS_FILE).symlink_to("/dev/full")
    record_end(tmp_path, 1, "finished")
    (tmp_path / "file").touch()
    record_end(tmp_path / "file" / "run", 1, "finished")
