"""Where faults are tried: a run that was never disturbed, runs that are, and what to say of each fault."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from programs import Demo, Programs, free_port, losses, metrics

STEPS, RANKS, EVERY = 40, 2, 3
# The constant schedule, because a cosine's end is run.max_steps; a learned temperature, because its state must go on.
OVERRIDES: dict[str, object] = {
    **{"run.max_steps": STEPS, "checkpoint.every": EVERY, "checkpoint.keep": 3, "optim.schedule": "constant"},
    **{"temperature.schedule": "learned", "temperature.lr": 0.05},
}


@dataclass(frozen=True)
class Outcome:
    """A line of the campaign's table.

    Args:
        fault: what was done to the run.
        tries: how often.
        happened: what the run did.
        lost: what the disturbed run lacks in the end; steps that were taken twice cost time alone.
        noticed: seconds from the fault to the end of every process, the longest; None: nothing to notice.
    """

    fault: str
    tries: int
    happened: str
    lost: str
    noticed: float | None = None


class Arena:
    """One demo, one undisturbed run of it, and a seed."""

    def __init__(self, demo: Demo, programs: Programs, folder: Path, seed: int) -> None:
        self.demo, self.programs, self.folder = demo, programs, folder
        self.rng = random.Random(seed)
        self._count = 0
        self.undisturbed = self.new("undisturbed")
        programs.run(demo.train(self.undisturbed, OVERRIDES), ranks=RANKS, timeout=300).check()
        self.losses = losses(self.undisturbed)
        assert len(self.losses) == STEPS

    def new(self, name: str) -> Path:
        """A folder for a run."""
        self._count += 1
        path = self.folder / f"{self._count:03d}_{name}"
        path.mkdir(parents=True)
        return path

    def argv(self, out: Path, overrides: Mapping[str, object] | None = None) -> list[str]:
        return self.demo.train(out, {**OVERRIDES, **(overrides or {})})

    def finish(self, out: Path, overrides: Mapping[str, object] | None = None) -> str:
        """Run to the end and compare every loss with the undisturbed run's, bit for bit; returns the output."""
        output = self.programs.run(self.argv(out, overrides), ranks=RANKS, timeout=300).check().output
        self.compare(out)
        return output

    def compare(self, out: Path) -> None:
        assert losses(out) == self.losses, f"{out}: other losses than those of the undisturbed run"

    def launched(self, out: Path, overrides: Mapping[str, object] | None = None) -> AbstractContextManager[Launched]:
        """The run under DeepSpeed's launcher, from its third new step on."""
        return launched(self.programs, out, self.argv(out, overrides), first_steps=3)


@dataclass
class Launched:
    """A run under a launcher."""

    process: subprocess.Popen
    out: Path
    log: Path

    def pid(self, rank: int) -> int:
        return json.loads((self.out / "run" / "health" / f"rank_{rank:04d}.json").read_text())["pid"]

    def ended(self, within: float) -> tuple[float, list[str]]:
        """Seconds until every process is gone, and the `error:` lines."""
        start = time.monotonic()
        try:
            self.process.wait(within)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still there after {within:g} s: {self.log.read_text()[-3000:]}") from None
        wait_for(lambda: not alive(self.process.pid), within)
        return time.monotonic() - start, [ln for ln in self.log.read_text().splitlines() if ln.startswith("error: ")]


@contextmanager
def launched(programs: Programs, out: Path, argv: Sequence[str], *, first_steps: int) -> Iterator[Launched]:
    """A training under DeepSpeed's launcher, as a user starts it, once it has got some steps further; killed at the
    end."""
    out.mkdir(parents=True, exist_ok=True)
    wanted = last_step(out) + first_steps
    path, log = f"{Path(sys.executable).parent}:{os.environ['PATH']}", out / "launcher.log"
    deepspeed = shutil.which("deepspeed", path=path)
    assert deepspeed is not None
    with open(log, "w") as file:
        process = subprocess.Popen(
            [deepspeed, "--num_gpus", str(RANKS), "--master_port", str(free_port()), *argv],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=programs.environment | {"PATH": path},
            start_new_session=True,
        )
    try:
        wait_for(lambda: last_step(out) >= wanted or process.poll() is not None, 180)
        assert process.poll() is None, log.read_text()[-3000:]
        yield Launched(process, out, log)
    finally:
        for number in (signal.SIGCONT, signal.SIGKILL):
            kill_group(process.pid, number)
        process.wait()


def wait_for(condition: Callable[[], bool], seconds: float, every: float = 0.01) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"nothing came of it within {seconds:g} s"
        time.sleep(every)


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def kill_group(group: int, number: signal.Signals = signal.SIGKILL) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)


def steps_logged(out: Path) -> int:
    path = out / "run" / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def last_checkpoint(out: Path) -> int:
    """The step of the newest checkpoint, 0 without one."""
    found = [int(path.name[5:]) for path in (out / "run" / "checkpoints").glob("step_*") if path.suffix != ".tmp"]
    return max(found, default=0)


def last_step(out: Path) -> int:
    lines = metrics(out) if steps_logged(out) else []
    return max((line["step"] for line in lines), default=0)
