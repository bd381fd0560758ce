#!/usr/bin/env python3
"""What watching a run costs: the guards, heartbeat, meter and log of a step against the step itself.

    python tools/make_demo.py demo
    python benchmarks/overhead.py [--ranks 2] [--config launch/recipes/demo.yaml] [--section.key value ...]

Each part is called many times in a row, in turns with the Trainer's own step; shares are of that step's median. Each
rank has a thread. Results: benchmarks/results/overhead.jsonl.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from muco_ds.config_cli import parse_args
from muco_ds.data.schema import StepBatch
from muco_ds.distributed import env
from muco_ds.distributed.testing import run_distributed
from muco_ds.health import Health
from muco_ds.metrics import Meter
from muco_ds.trainer import Trainer

from harness import ROOT, percentiles, provenance, record, sample

AIM = 0.01
"""Of a step, for guards, heartbeat and logging together (the share that is wanted at most)."""
CALLS = 20
"""Of a part in a row: ranks that come to its first late do not lengthen the others."""


class Parts:
    """A step of a recipe, and what the loop does around it, each as often as it comes to be timed."""

    def __init__(self, argv: list[str], folder: Path, health: Health) -> None:
        config = parse_args([*argv, "--run.dir", str(folder), "--run.name", "run"]).config
        self.trainer = Trainer(config, env.start(), health)
        batch = self.trainer.data.steps(1)[0]
        assert isinstance(batch, StepBatch)
        self.batch, self.health, self.meter = batch, health, Meter()
        self.stats = self.trainer.train_step(batch)
        health.begin(0, 1000)

    def step(self) -> None:
        self.stats = self.trainer.train_step(self.batch)

    def lockstep(self) -> None:
        for _ in range(CALLS):
            self.trainer.lockstep.stop_before(self.batch)

    def nonfinite(self) -> None:
        """What the guard asks of DeepSpeed, which has clipped by the norm already."""
        for _ in range(CALLS):
            self.trainer.engine.was_step_applied()
            self.trainer.engine.get_global_grad_norm()

    def position(self) -> None:
        """Where the rank is, for the heartbeat, and the watchdog's limit."""
        for _ in range(CALLS):
            self.health.loading()
            self.health.edge(0.0)
            self.health.training()
            self.health.stepped(1)

    def meter_(self) -> None:
        for _ in range(CALLS):
            self.meter.add(self.batch, 0.0, 0.0)

    def log(self) -> None:
        for _ in range(CALLS):
            for _ in range(self.trainer.config.log.every):
                self.meter.add(self.batch, 0.0, 0.0)
            self.trainer._log(self.batch, self.stats, self.meter, {})

    def heartbeat(self) -> None:
        for _ in range(CALLS):
            self.health._write()


def measure(argv: list[str], folder: Path, repeats: int) -> dict[str, Any]:
    """On every rank; rank 0's is the result."""
    torch.set_num_threads(1)
    with Health(folder / "run") as health:
        parts = Parts(argv, folder, health)
        calls: dict[str, Callable[[], object]] = {
            **{"step": parts.step, "lockstep": parts.lockstep, "nonfinite": parts.nonfinite},
            **{"watchdog_and_position": parts.position, "meter": parts.meter_, "log": parts.log},
            "heartbeat": parts.heartbeat,
        }
        seconds = {name: percentiles(values) for name, values in sample(calls, repeats).items()}
    step = seconds.pop("step")
    each = {name: {p: value / CALLS for p, value in spread.items()} for name, spread in seconds.items()}
    every = parts.trainer.config.log.every
    # A heartbeat is written by another thread, every so many seconds however long a step takes.
    per = {name: step["p50"] for name in each} | {"log": every * step["p50"], "heartbeat": health.every_s}
    shares = {name: each[name]["p50"] / per[name] for name in each}
    return {
        "benchmark": "overhead",
        "ranks": env.world_size(),
        "log_every": every,
        "step_seconds": step,
        "seconds": {name: _short(spread) for name, spread in each.items()},
        "share_of_step": _short(shares),
        "total_share": float(f"{sum(shares.values()):.3g}"),
        "aim": AIM,
    }


def _short(values: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.3g}") for name, value in values.items()}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--config", default="launch/recipes/demo.yaml")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "overhead.jsonl")
    args, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as name:
        found = run_distributed(
            measure, args.ranks, ["--config", args.config, *rest], Path(name), args.repeats, timeout_s=600.0
        )[0]
    torch.set_num_threads(1)  # as the ranks
    record(args.results, {**found, **provenance()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
