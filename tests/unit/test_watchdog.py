"""A late step writes where it hangs; a run without one leaves nothing behind."""

from __future__ import annotations

import time
from pathlib import Path

from muco_ds.distributed.watchdog import Watchdog


def hang_here(seconds: float) -> None:
    time.sleep(seconds)


def test_a_late_step_writes_its_stack_and_later_steps_go_on(tmp_path: Path) -> None:
    watchdog = Watchdog(tmp_path / "stacks", least_s=0.05, times=3.0)
    for _ in range(5):
        watchdog.step()
    hang_here(0.4)
    watchdog.step()
    watchdog.close()
    written = (tmp_path / "stacks" / "rank_0.txt").read_text()
    assert "hang_here" in written and "Timeout" in written


def test_quick_steps_and_rests_write_nothing(tmp_path: Path) -> None:
    watchdog = Watchdog(tmp_path / "stacks", least_s=0.2, times=3.0)
    for _ in range(5):
        watchdog.step()
    with watchdog.resting("saving"):
        time.sleep(0.5)
    watchdog.step()
    watchdog.close()
    assert not (tmp_path / "stacks").exists()


def test_what_is_usual_is_learned_from_the_run(tmp_path: Path) -> None:
    """Steps of 0.1 s with a floor of 0.05 s: late only at many times the usual."""
    watchdog = Watchdog(tmp_path / "stacks", least_s=0.05, times=50.0)
    for _ in range(4):
        watchdog.step()
        time.sleep(0.1)
    watchdog.close()
    assert not (tmp_path / "stacks").exists()


def test_a_rest_has_a_limit_too_which_learns_how_long_rests_are(tmp_path: Path) -> None:
    watchdog = Watchdog(tmp_path / "stacks", rest_s=0.2)
    with watchdog.resting("validating"):
        hang_here(0.4)
    written = (tmp_path / "stacks" / "rank_0.txt").read_text()
    assert "hang_here" in written
    with watchdog.resting("validating"):
        assert watchdog.limit_s > 1.1
        hang_here(0.4)
    with watchdog.resting("saving"):
        assert watchdog.limit_s == 0.2
    watchdog.step()
    assert watchdog.limit_s == 0.2, "of a step: what collectives allow is less than what it would be given"
    watchdog.close()
    assert (tmp_path / "stacks" / "rank_0.txt").read_text() == written


def test_a_hang_before_the_first_step_is_seen(tmp_path: Path) -> None:
    watchdog = Watchdog(tmp_path / "stacks", rest_s=0.1)
    hang_here(0.3)
    watchdog.close()
    assert "hang_here" in (tmp_path / "stacks" / "rank_0.txt").read_text()
