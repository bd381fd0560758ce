#!/usr/bin/env python3
"""What the device can do at best, measured: the rate of bare matrix products, and the bandwidth of a plain copy.

    python benchmarks/ceilings.py

The other benchmarks take these beside their own times, in the same rounds. Appends one JSON line to
benchmarks/results/ceilings.jsonl.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness import percentiles, provenance, record, sample

RESULTS = Path(__file__).parent / "results" / "ceilings.jsonl"


@dataclass(frozen=True)
class Work:
    """`run` does `amount` of it, in FLOPs or bytes."""

    run: Callable[[], object]
    amount: float

    def rate(self, seconds: list[float]) -> float:
        """Amount a second, by the median."""
        return self.amount / percentiles(seconds)["p50"]


def matmul(device: torch.device) -> Work:
    """Square products as large as the device likes them: bfloat16 on a GPU, else float32. FLOPs."""
    on_gpu = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if on_gpu else (1024, torch.float32)
    a, b = torch.randn(2, size, size, device=device, dtype=dtype).unbind()
    count = 20

    def run() -> None:
        for _ in range(count):
            torch.matmul(a, b)

    run()
    return Work(run, count * 2.0 * size**3)


def copy(device: torch.device) -> Work:
    """Copies far beyond any cache. Bytes, read and written."""
    size, count = (2**30, 10) if device.type == "cuda" else (2**27, 2)
    source, target = torch.ones(2, size, dtype=torch.uint8, device=device).unbind()

    def run() -> None:
        for _ in range(count):
            target.copy_(source)

    run()
    return Work(run, 2.0 * count * size)


def measure(device: torch.device, repeats: int) -> dict[str, Any]:
    works = {"matmul": matmul(device), "copy": copy(device)}
    seconds = sample({name: work.run for name, work in works.items()}, repeats)
    return {
        "benchmark": "ceilings",
        "dtype": "bfloat16" if device.type == "cuda" else "float32",
        "repeats": repeats,
        "matmul_tflops": percentiles([works["matmul"].amount / s / 1e12 for s in seconds["matmul"]]),
        "copy_gb_per_s": percentiles([works["copy"].amount / s / 1e9 for s in seconds["copy"]]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record(args.results, measure(device, args.repeats) | provenance())


if __name__ == "__main__":
    main()
