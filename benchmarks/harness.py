"""What every benchmark shares: times taken side by side, their split, memory, percentiles, where a number comes from.

A line of a result file stands alone: what was run, on what, with which versions of which commit, when.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from functools import wraps
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "transformers", "deepspeed", "numpy", "liger-kernel")


def sample(fns: dict[str, Callable[[], object]], repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each call, ``repeats`` per function, taken in turn so that a drift of the machine meets all alike.

    The order turns by one at every round. Work on a GPU is waited for before and after each call.
    """
    names = list(fns)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warmup, repeats):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            _wait_for_gpu()
            started = time.perf_counter()
            fns[name]()
            _wait_for_gpu()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


class Phases:
    """Seconds of the phases of a run that is slowed down for it: the device is waited for wherever a phase begins or
    ends, so this is never done to a run that is timed. A phase inside another does not count towards the outer one.
    Without a GPU they are seconds on a processor (of all threads), which other programs don't lengthen.

    Used as a context: what was wrapped is as before behind it. `seconds`: by phase, with the rest under "other".
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._stack = ["other"]
        self._undo = ExitStack()

    def __enter__(self) -> Phases:
        self._switch_at = _now()
        return self

    def __exit__(self, *_: object) -> None:
        self._switch()
        self._undo.close()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._begin(name)
        try:
            yield
        finally:
            self._end()

    def wrap(self, owner: Any, attribute: str, name: str) -> None:
        """Every call of a function or method, by its owner and its name, becomes a phase."""
        stock, own = getattr(owner, attribute), attribute in vars(owner)

        @wraps(stock)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return stock(*args, **kwargs)

        setattr(owner, attribute, timed)
        self._undo.callback(lambda: setattr(owner, attribute, stock) if own else delattr(owner, attribute))

    def watch(self, module: torch.nn.Module, name: str) -> None:
        """The forward of a module becomes a phase."""
        before = module.register_forward_pre_hook(lambda *_: self._begin(name), prepend=True)
        after = module.register_forward_hook(lambda *_: self._end())
        self._undo.callback(before.remove)
        self._undo.callback(after.remove)

    def _begin(self, name: str) -> None:
        self._switch()
        self._stack.append(name)

    def _end(self) -> None:
        self._switch()
        self._stack.pop()

    def _switch(self) -> None:
        now = _now()
        self.seconds[self._stack[-1]] += now - self._switch_at
        self._switch_at = now


def peak_growth(work: Callable[[], object]) -> int | None:
    """Bytes by which the memory in use grows at most during `work`: allocated on a GPU, resident in a CPU process.

    None on a CPU without Linux's /proc and glibc, where a peak can't be put back to what is in use now.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - held
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier work has freed must not be taken for free a second time
        Path("/proc/self/clear_refs").write_text("5")
        held = _status("VmRSS")
    except (OSError, KeyError):
        return None
    work()
    return _status("VmHWM") - held


def _status(field: str) -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[field].split()[0]) * 1024


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80 by linear interpolation, four significant digits."""
    at = torch.quantile(torch.tensor(values, dtype=torch.float64), torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    return {name: float(f"{value:.4g}") for name, value in zip(("p20", "p50", "p80"), at.tolist(), strict=True)}


def provenance() -> dict[str, Any]:
    """Command, device, threads, versions, commit ("+" where tracked files differ from it) and UTC date."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    script = Path(sys.argv[0]).resolve()
    name = str(script.relative_to(ROOT)) if script.is_relative_to(ROOT) else script.name
    return {
        "command": shlex.join(["python", name, *sys.argv[1:]]),
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "versions": versions,
        "commit": COMMIT,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def device_name() -> str:
    """The GPU, or else the processor."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    models = (
        [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.exists() else []
    )
    return f"{models[0].split(':', 1)[1].strip()}, {len(models)} cores" if models else platform.machine()


def record(path: str | Path, entry: dict[str, Any]) -> None:
    """Appends ``entry`` as one JSON line and prints it."""
    line = json.dumps(entry)
    print(line, flush=True)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")


def _now() -> float:
    if not torch.cuda.is_available():
        return time.process_time()
    _wait_for_gpu()
    return time.perf_counter()


def _wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _commit() -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")


COMMIT = _commit()  # of the code that runs, whatever is committed while it does
