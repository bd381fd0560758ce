"""A signal is obeyed at once where there is nothing to save, remembered where there is, and forced by the next one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from muco_ds.distributed.signals import EXIT_REQUEUE

# Imports neither torch nor the recipe. The lock that the main thread waits for stands for a collective that hangs in C.
PROGRAM = """
import os, sys, time, ctypes
from pathlib import Path
from muco_ds.distributed import signals
from muco_ds.ends import RunEnd
signals._SETTLE_S = 0.3
end = RunEnd(Path(sys.argv[1]))
end.steps = lambda: 7
signals.listen(float(sys.argv[2]), end.forced)
if "remember" in sys.argv:
    signals.remember()
if "fork" in sys.argv and os.fork() == 0:
    os.kill(os.getpid(), 15)
    time.sleep(0.2)
    os._exit(0)
if "ignore" in sys.argv:
    signals.ignore()
print("ready", flush=True)
if "hang" in sys.argv:
    ctypes.CDLL(None).sem_wait(ctypes.create_string_buffer(64))
started = time.monotonic()
while time.monotonic() - started < float(os.environ.get("LIVE_S", "20")):
    time.sleep(0.02)
    if signals.heard() and "obey" in sys.argv:
        print("heard", signals.heard())
        break
"""


class Program:
    def __init__(self, folder: Path, *argv: str, deadline_s: float = 60.0, live_s: float = 20.0) -> None:
        command = [sys.executable, "-c", PROGRAM, str(folder), str(deadline_s), *argv]
        environment = os.environ | {"LIVE_S": str(live_s)}
        self.folder = folder
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stdout is not None and self.process.stdout.readline() == "ready\n"

    def end(self) -> tuple[int, list[str]]:
        """Exit status and recorded causes."""
        from muco_ds.ends import read_ends

        self.process.communicate(timeout=15)
        ends = read_ends(self.folder)
        assert all(end.status == EXIT_REQUEUE and end.step == 7 for end in ends)
        return self.process.returncode, [end.cause for end in ends]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_before_the_first_step_it_ends_at_once(number: signal.Signals, tmp_path: Path) -> None:
    program = Program(tmp_path, "hang")
    program.process.send_signal(number)
    assert program.end() == (EXIT_REQUEUE, [f"signal {number.name} before the first step"])


def test_once_steps_are_taken_it_is_remembered_and_left_to_the_program(tmp_path: Path) -> None:
    program = Program(tmp_path, "remember", "obey")
    program.process.send_signal(signal.SIGUSR1)
    assert program.end() == (0, [])


def test_the_same_said_by_terminal_and_launcher_is_one_signal(tmp_path: Path) -> None:
    program = Program(tmp_path, "remember", live_s=1.5)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
        program.process.send_signal(number)
        time.sleep(0.05)
    assert program.end() == (0, [])


@pytest.mark.parametrize("state", ["awake", "hang"])
def test_a_second_signal_forces_the_end_even_of_a_hanging_process(state: str, tmp_path: Path) -> None:
    program = Program(tmp_path, "remember", state)
    program.process.send_signal(signal.SIGTERM)
    time.sleep(0.6)
    program.process.send_signal(signal.SIGINT)
    cause = "signal SIGTERM and then signal SIGINT: ended without saving"
    assert program.end() == (EXIT_REQUEUE, [cause])


def test_the_deadline_forces_the_end_of_a_hanging_process(tmp_path: Path) -> None:
    program = Program(tmp_path, "remember", "hang", deadline_s=0.5)
    started = time.monotonic()
    program.process.send_signal(signal.SIGUSR1)
    cause = "signal SIGUSR1: not saved within run.deadline_s=0.5, ended without"
    assert program.end() == (EXIT_REQUEUE, [cause])
    assert time.monotonic() - started > 0.5


def test_what_a_forked_helper_is_told_is_not_what_the_run_is_told(tmp_path: Path) -> None:
    program = Program(tmp_path, "fork", live_s=0.8)
    assert program.end() == (0, [])


def test_an_end_under_way_is_not_hurried(tmp_path: Path) -> None:
    program = Program(tmp_path, "ignore", live_s=0.8)
    program.process.send_signal(signal.SIGTERM)
    assert program.end() == (0, [])
