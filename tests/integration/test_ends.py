"""Whatever happens to one rank ends all in seconds, and is said and written down once, by the rank that knows."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from muco_ds.ends import read_ends

from programs import Demo, Programs

FAULTY = Path(__file__).with_name("faulty_train.py")
CASES = {
    # What happens to rank 1: exit statuses, who says it, and what.
    "gpu_memory": ([1, 1], 1, "CUDA out of memory"),
    "worker_killed": ([1, 1], 1, "a data loader's worker is killed by signal: Killed"),
    "killed": ([1, -signal.SIGKILL], 0, "lost another rank"),
}


@pytest.mark.parametrize("fault", CASES)
def test_what_happens_to_one_rank_ends_all_and_is_said_once(
    fault: str, demo: Demo, programs: Programs, tmp_path: Path
) -> None:
    codes, speaker, words = CASES[fault]
    started = time.monotonic()
    result = programs.run([FAULTY, *demo.train(tmp_path)[1:]], ranks=2, FAULT=fault)
    assert result.codes == codes and time.monotonic() - started < 60
    said = [[line for line in text.splitlines() if "error: " in line] for text in result.stderr]
    assert len(said[speaker]) == 1 and not said[1 - speaker], said
    assert f"error: rank {speaker}: {words}" in said[speaker][0] and "Traceback" not in result.output
    (end,) = read_ends(tmp_path / "run")
    assert (end.rank, end.status, end.step) == (speaker, 1, 2) and end.cause.startswith(words)


def test_a_second_signal_ends_a_run_that_hangs(demo: Demo, programs: Programs, tmp_path: Path) -> None:
    job = programs.start([FAULTY, *demo.train(tmp_path)[1:]], ranks=2, FAULT="hangs")
    output, deadline = job.folder / "stdout.1", time.monotonic() + 60
    while not (output.exists() and "fault at" in output.read_text()):
        assert time.monotonic() < deadline, job.kill()
        time.sleep(0.05)
    job.signal(1, signal.SIGTERM)
    time.sleep(2.5)
    job.signal(1, signal.SIGTERM)
    assert job.wait().codes == [1, 75]
    (end,) = read_ends(tmp_path / "run")
    assert (end.rank, end.status) == (1, 75) and "signal SIGTERM and then signal SIGTERM" in end.cause
