"""Runs the project's programs for tests, in forks of a warm server or as a user does, with a hard time limit."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from muco_ds.manifest import MANIFEST, flushed

REPOSITORY = Path(__file__).resolve().parents[2]
TRAIN = str(REPOSITORY / "launch" / "train.py")
EVALUATE = str(REPOSITORY / "launch" / "evaluate.py")
TIMEOUT_S = 90.0
NO_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_SIZE")


@dataclass(frozen=True)
class Result:
    """How a program ended: exit status and outputs of every rank (of the launcher, where one was used)."""

    codes: list[int]
    stdout: list[str]
    stderr: list[str]

    @property
    def output(self) -> str:
        """Everything that was written, for messages and searches."""
        return "\n".join([*self.stdout, *self.stderr])

    def check(self) -> Result:
        """Itself, if every rank ended well."""
        assert not any(self.codes), f"exit status {self.codes}\n{self.output[-6000:]}"
        return self


class Job:
    """A program that runs in forks of the server."""

    def __init__(self, pid: int, folder: Path, ranks: int) -> None:
        self.pid, self.folder, self.ranks = pid, folder, ranks

    def wait(self, timeout: float = TIMEOUT_S) -> Result:
        """Its result; after `timeout` seconds every process is killed and the test fails."""
        status = self.folder / "status.json"
        deadline = time.monotonic() + timeout
        while not status.exists():
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"still running after {timeout:g} s\n{self._result([]).output[-6000:]}")
            time.sleep(0.05)
        return self._result(json.loads(status.read_text()))

    def kill(self) -> None:
        """SIGKILL to all of its processes at once; returns when they are gone."""
        while True:
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                return
            time.sleep(0.02)

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to one rank alone."""
        os.kill(int((self.folder / f"pid.{rank}").read_text()), number)

    def _result(self, codes: list[int]) -> Result:
        stdout, stderr = (
            [(self.folder / f"{name}.{rank}").read_text(errors="replace") for rank in range(self.ranks)]
            for name in ("stdout", "stderr")
        )
        return Result(codes, stdout, stderr)


class Programs:
    """Starts programs; `close` ends the server."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        folder.mkdir(parents=True)
        hidden = (*NO_LAUNCHER, "PYTEST_CURRENT_TEST")  # by which libraries take a program for a test of theirs
        environment = {key: value for key, value in os.environ.items() if key not in hidden}
        environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)}
        self.environment = environment
        with open(folder / "server.log", "w") as log:
            self._server = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("program_server.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )
        if self._answer() != "ready":
            raise AssertionError((folder / "server.log").read_text()[-6000:])

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(60)

    def start(self, argv: Sequence[str | Path], *, ranks: int | None = None, cwd: Path = REPOSITORY, **env: str) -> Job:
        """Start a Python program on `ranks` processes, or without a launcher's variables on one."""
        self._count += 1
        folder = self._folder / f"job{self._count:03d}"
        folder.mkdir()
        if ranks:
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "LOCAL_SIZE": str(ranks)}
        request = {"argv": [str(a) for a in argv], "ranks": ranks, "env": env, "cwd": str(cwd), "folder": str(folder)}
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return Job(int(self._answer()), folder, ranks or 1)

    def run(self, argv: Sequence[str | Path], *, timeout: float = TIMEOUT_S, **options: Any) -> Result:
        """`start` and wait."""
        return self.start(argv, **options).wait(timeout)

    def launch(self, command: Sequence[str | Path], *, timeout: float = 2 * TIMEOUT_S, **options: Any) -> Result:
        """Run a command line as a user does, console scripts from beside this Python first in PATH.

        One at a time on this machine, whatever the number of test processes: launchers take a fixed port.
        """
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        options = {"cwd": REPOSITORY, "env": self.environment | {"PATH": path}, **options}
        argv = [shutil.which(str(command[0]), path=path) or str(command[0]), *map(str, command[1:])]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with (
            one_at_a_time(Path(tempfile.gettempdir()) / f"muco_ds_launch.{os.getuid()}.lock"),
            subprocess.Popen(argv, **pipes, start_new_session=True, **options) as process,
        ):
            try:
                stdout, stderr = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                stdout, stderr = process.communicate()
                raise AssertionError(f"still running after {timeout:g} s\n{stdout[-3000:]}{stderr[-3000:]}") from None
        return Result([process.returncode], [stdout], [stderr])

    def _answer(self) -> str:
        assert self._server.stdout is not None
        return self._server.stdout.readline().strip()


def refusal(result: Result) -> str:
    """The `error: ...` line of a program that a UserError ended: said once, status 2 everywhere, and no traceback."""
    assert result.codes == [2] * len(result.codes), f"exit status {result.codes}\n{result.output[-3000:]}"
    lines = [line for stream in result.stderr for line in stream.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in result.output, result.output[-3000:]
    return lines[0]


@dataclass(frozen=True)
class Demo:
    """A small demo's folder and the recipe that fits it."""

    folder: Path

    @classmethod
    def build(cls, folder: Path, *, scenes: int = 64, test_scenes: int = 6) -> Demo:
        from muco_ds.models.demo_model import build_demo

        build_demo(folder, scenes=scenes, test_scenes=test_scenes, seed=0)
        demo = cls(folder)
        demo.write_recipe()
        return demo

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"

    def write_recipe(self) -> None:
        """Four short fp32 steps without validation; tests override what they are about."""
        recipe: dict[str, Any] = {
            "run": {"name": "run", "max_steps": 4, "precision": "fp32"},
            "model": {"path": str(self.model), "freeze_vision": False, "activation_checkpointing": {"text": 0.0}},
            "task": {"query_history": 0.5, "target_history": 0.5},
            "data": {
                **{"train": str(self.data / "train.parquet"), "images": str(self.data / "images")},
                **{"val": str(self.data / "test.parquet"), "min_pixels": 3136, "max_pixels": 7056, "workers": 1},
            },
            "batch": {"images": 8, "pack_tokens": 4096},
            "optim": {"lr": 1.0e-4, "warmup_steps": 2, "schedule": "cosine", "eps": 1.0e-6},
            "checkpoint": {"every": 100, "keep": 2},
            "log": {"every": 1},
            "deepspeed": "ds_configs/zero3.json",
        }
        self.recipe.write_text(yaml.safe_dump(recipe, sort_keys=False))

    def train(self, out: Path, overrides: Mapping[str, object] | None = None) -> list[str]:
        """Command line of a training run in `out`/run; `overrides`: dotted key -> value."""
        argv = [TRAIN, "--config", str(self.recipe), "--run.dir", str(out)]
        for key, value in (overrides or {}).items():
            argv += [f"--{key}", str(value)]
        return argv


def metrics(out: Path) -> list[dict[str, Any]]:
    """Lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> dict[int, float]:
    """Step -> loss of a run; every step is there once."""
    values = {line["step"]: line["loss"] for line in metrics(out)}
    assert len(values) == len(metrics(out)), "a step was logged twice"
    return values


def vouch(folder: Path, file: Path) -> None:
    """Have the manifest of a sealed folder say of a file what it holds now."""
    manifest, entry = folder / MANIFEST, flushed(file)
    content = json.loads(manifest.read_text())
    name = str(file.relative_to(folder))
    content["files"][name], content["digests"][name] = entry.size, entry.digest
    manifest.write_text(json.dumps(content))


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Wait until no other process is inside."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
