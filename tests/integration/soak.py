#!/usr/bin/env python3
"""Train the demo for thousands of steps and show that nothing grows: `python tests/integration/soak.py --steps 3000`.

The demo's own recipe, but for the batch: 8 pictures a step. Validation and checkpoints are on. Of each rank and of its
loader's workers, resident memory and open files are looked at every second. Exit status 1 where, along a line
through the second half, memory grows by more than 8 MiB, files by one, or steps become a tenth slower.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

from fault_arena import RANKS, last_step, launched  # noqa: E402
from programs import TRAIN, Demo, Programs, metrics  # noqa: E402

_SETTLED = 0.5  # of the samples: caches fill and allocators grow to their size before
_GROWTH_MIB, _SLOWER = 8.0, 0.10
MIB = 2**20


@dataclass
class Samples:
    """Of one rank, over time."""

    step: list[int] = field(default_factory=list)
    rank: list[int] = field(default_factory=list)
    workers: list[int] = field(default_factory=list)
    files: list[int] = field(default_factory=list)

    def add(self, step: int, pid: int) -> None:
        rank = psutil.Process(pid)
        workers = rank.children(recursive=True)
        own = [process.memory_info().rss for process in (rank, *workers)]
        files = rank.num_fds()
        self.step.append(step)
        self.rank.append(own[0])
        self.workers.append(sum(own[1:]))
        self.files.append(files)


def growth(step: Sequence[int], values: Sequence[float]) -> float:
    """What a straight line through the settled samples gains from its beginning to its end."""
    x, y = (np.array(part[int(_SETTLED * len(part)) :], float) for part in (step, values))
    return float(np.polyfit(x, y, 1)[0] * (x[-1] - x[0]))


def soak(out: Path, demo: Demo, programs: Programs, steps: int) -> list[Samples]:
    """Run it, and look at it once a second."""
    overrides = {
        **{"run.dir": out, "run.name": "run", "run.max_steps": steps, "model.path": demo.model, "batch.images": 8},
        **{"data.train": demo.data / "train.parquet", "data.val": demo.data / "test.parquet"},
        **{"data.images": demo.data / "images", "checkpoint.every": 100, "validation.every": 250},
    }
    argv = [TRAIN, "--config", str(REPOSITORY / "launch" / "recipes" / "demo.yaml")]
    argv += [str(part) for key, value in overrides.items() for part in (f"--{key}", value)]
    samples = [Samples() for _ in range(RANKS)]
    with launched(programs, out, argv, first_steps=1) as run:
        pids = [run.pid(rank) for rank in range(RANKS)]
        while run.process.poll() is None:
            for rank, pid in enumerate(pids):
                try:
                    samples[rank].add(last_step(out), pid)
                except psutil.Error:  # it ends
                    continue
            time.sleep(1)
        assert run.process.returncode == 0, run.log.read_text()[-3000:]
    return samples


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--output", type=Path, help="samples and rates as JSON")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak."))
    try:
        demo = Demo.build(folder / "demo", scenes=600, test_scenes=90)
        programs = Programs(folder / "jobs")
        samples = soak(folder / "run", demo, programs, args.steps)
        programs.close()
        lines = metrics(folder / "run")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    flat = True
    for rank, found in enumerate(samples):
        own, workers, files = (growth(found.step, values) for values in (found.rank, found.workers, found.files))
        flat &= max(own, workers) / MIB < _GROWTH_MIB and files < 1
        print(
            f"rank {rank}: {len(found.step)} samples; over the settled part its memory grew by {own / MIB:+.1f} of "
            f"{np.median(found.rank) / MIB:.0f} MiB, its loader's by {workers / MIB:+.1f} of "
            f"{np.median(found.workers) / MIB:.0f}, its open files by {files:+.2f} of {np.median(found.files):.0f}"
        )
    steps, rates = [line["step"] for line in lines], [line["pairs_per_s"] for line in lines]
    faster = growth(steps, rates) / float(np.median(rates))
    flat &= faster > -_SLOWER
    print(f"{steps[-1]} steps, median {np.median(rates):.0f} pairs/s, over the settled part {faster:+.1%}")
    if args.output is not None:
        ranks = [asdict(found) for found in samples]
        args.output.write_text(json.dumps({"ranks": ranks, "step": steps, "pairs_per_s": rates}))
    print("flat" if flat else "NOT FLAT")
    return 0 if flat else 1


if __name__ == "__main__":
    sys.exit(main())
