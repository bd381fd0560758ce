"""A rank's heartbeat and log: what they say, when, and that nothing of them ends a run."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from muco_ds import rank_log
from muco_ds.ends import record_end
from muco_ds.errors import UserError
from muco_ds.health import Health
from muco_ds.heartbeat import SAVING, heartbeat_path
from muco_ds.rank_log import log_path


def said(folder: Path) -> dict[str, Any]:
    return json.loads(heartbeat_path(folder, 0).read_text())


def soon(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def step(health: Health, done: int) -> None:
    health.loading()
    health.edge(0.25)
    health.training()
    health.stepped(done)


def test_changes_of_phase_are_written_at_once_and_steps_in_turn(tmp_path: Path) -> None:
    record_end(tmp_path, 75, "signal")
    with Health(tmp_path, every_s=60.0) as health:
        health.begin(7, 20)
        soon(lambda: heartbeat_path(tmp_path, 0).exists() and said(tmp_path)["step"] == 7)
        facts = said(tmp_path)
        assert (facts["phase"], facts["steps"], facts["ends_before"]) == ("starting", 20, 1)
        assert facts["pid"] == os.getpid() and facts["resident_gib"] > 0.05 and facts["open_files"] > 2
        for done in (8, 9, 10):
            step(health, done)
        time.sleep(0.05)
        assert said(tmp_path)["step"] == 7, "a step writes nothing"
        with health.during(SAVING):
            soon(lambda: said(tmp_path)["phase"] == SAVING)
            facts = said(tmp_path)
            assert (facts["step"], facts["data_wait_s"], facts["late_s"]) == (10, 0.25, 1500.0)
            assert 0 <= facts["step_s"] < 1 and facts["last_hour"]["steps"] == 3
        health.end(finished=True)
    assert (said(tmp_path)["phase"], said(tmp_path)["finished"]) == ("ended", True)
    assert not (tmp_path / "stacks").exists() and not list(tmp_path.rglob("*.tmp"))


def test_a_rank_that_hangs_says_for_how_long(tmp_path: Path) -> None:
    with Health(tmp_path, every_s=0.02) as health:
        step(health, 1)
        health.loading()
        soon(lambda: heartbeat_path(tmp_path, 0).exists() and said(tmp_path)["phase"] == "loading data")
        soon(lambda: said(tmp_path)["phase_s"] > 0.1)
        assert said(tmp_path)["finished"] is None


def test_heartbeats_of_many_ranks_come_less_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Health(tmp_path).every_s == 10.0
    monkeypatch.setenv("WORLD_SIZE", "2000")
    assert Health(tmp_path).every_s == 40.0


def test_an_error_is_the_last_word_of_heartbeat_and_log(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), Health(tmp_path) as health:
        step(health, 3)
        raise RuntimeError("device on fire\nsecond line")
    assert (said(tmp_path)["phase"], said(tmp_path)["error"]) == ("failed", "device on fire")
    with pytest.raises(UserError), Health(tmp_path):
        raise UserError("optim.lr is wrong")
    written = log_path(tmp_path, 0).read_text()
    assert "ERROR rank: RuntimeError: device on fire" in written and written.count("Traceback") == 1
    assert "UserError: optim.lr is wrong" in written
    headers = [line for line in written.splitlines() if "start: rank 0 of 1" in line]
    assert len(headers) == 2 and f"pid {os.getpid()}" in headers[0] and "torch 2" in headers[0]


def test_the_log_holds_what_the_console_does_not_show(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warnings, "showwarning", lambda *told: print(told[0], file=sys.stderr))  # pytest has its own
    root, console = logging.getLogger(), logging.StreamHandler()
    library = logging.getLogger("a_library_that_prints_itself")
    library.propagate = False
    library.addHandler(logging.NullHandler())
    before = root.level
    root.addHandler(console)
    root.setLevel(logging.ERROR)  # as on ranks above 0
    try:
        with Health(tmp_path):
            logging.getLogger("muco_ds.x").info("rank 5 was here")
            logging.getLogger("muco_ds.x").error("for both")
            library.warning("library said")
            with warnings.catch_warnings():
                warnings.simplefilter("always")
                warnings.warn("be careful", stacklevel=1)
        assert root.level == logging.ERROR and console.level == logging.NOTSET
    finally:
        root.removeHandler(console)
        root.setLevel(before)
    written, shown = log_path(tmp_path, 0).read_text(), capsys.readouterr().err
    for text in ("INFO muco_ds.x: rank 5 was here", "for both", "WARNING a_library", "UserWarning: be careful"):
        assert text in written
    assert "for both" in shown and "be careful" in shown and "rank 5" not in shown and "library said" not in shown


def test_a_thread_that_ends_by_an_error_is_a_line_and_in_the_log(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    before = threading.excepthook
    with Health(tmp_path):
        thread = threading.Thread(target=full, name="board")
        thread.start()
        thread.join()
    shown, log = capfd.readouterr().err, log_path(tmp_path, 0).read_text()
    assert "board ended: OSError: [Errno 28] No space left on device\n" in shown and "Traceback" not in shown
    assert "board ended" in log and "Traceback" in log
    assert threading.excepthook is before


def test_the_log_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_log, "MOST_BYTES", 4096)
    with Health(tmp_path):
        for i in range(500):
            logging.getLogger("muco_ds.x").error("line %d of many", i)
    assert sum(path.stat().st_size for path in (tmp_path / "logs").iterdir()) < 3 * 4096
    assert "line 499" in log_path(tmp_path, 0).read_text()


def test_a_disk_that_fails_later_ends_nothing(tmp_path: Path) -> None:
    with Health(tmp_path, every_s=0.01) as health:
        soon(heartbeat_path(tmp_path, 0).exists)
        os.rename(tmp_path / "health", tmp_path / "gone")
        step(health, 1)
        time.sleep(0.05)
        os.rename(tmp_path / "gone", tmp_path / "health")
        soon(lambda: said(tmp_path)["step"] == 1)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run.dir: can't write to .*: set another folder"):
        Health(tmp_path / "file" / "run").__enter__()


def test_a_trainer_without_it_writes_nothing(tmp_path: Path) -> None:
    health = Health(tmp_path)
    health.begin(0, 3)
    step(health, 1)
    with health.during(SAVING):
        pass
    health.end(finished=True)
    assert not list(tmp_path.iterdir())
