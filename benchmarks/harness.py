"""What every benchmark shares: times taken side by side, percentiles, and where a number comes from.

A line of a result file stands alone: what was run, on what, with which versions of which commit, when.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
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
        "commit": _commit(),
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


def _wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _commit() -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
