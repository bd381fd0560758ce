#!/usr/bin/env python3
"""Cross-entropy over a vocabulary: speed beside the dense form, and memory.

    python benchmarks/linear_cross_entropy.py

- speed: forward and backward of N rows against V words beside the dense form (``F.cross_entropy`` of all logits), with
  the table learning and frozen; the aim is a ratio <= 1.2. On a CPU in float32 at widths of 128 and 1,536, on CUDA in
  bfloat16 at 2,048 beside dense logits in bfloat16.
- memory: 32,768 tokens against 152,064 words, the table frozen: growth of the peak memory beside the dense float32
  logits' bytes. On a CPU at a width of 64, on CUDA in bfloat16 at 2,048.

Appends one JSON line per measurement to benchmarks/results/linear_cross_entropy.jsonl.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from muco_ds.losses import linear_cross_entropy

from harness import percentiles, provenance, record, sample

RESULTS = Path(__file__).parent / "results" / "linear_cross_entropy.jsonl"
VOCABULARY = 152_064  # Qwen2.5-VL-7B's table; 3B's has 151,936 rows
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def make_batch(n_rows: int, n_vocabulary: int, dim: int, device: str, table_learns: bool) -> Batch:
    """States, table and labels; logits of standard deviation 4."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    state_ND = torch.randn(n_rows, dim, generator=generator, device=device).to(dtype)
    weight_VD = torch.randn(n_vocabulary, dim, generator=generator, device=device).mul_(4 / dim**0.5).to(dtype)
    label_N = torch.randint(0, n_vocabulary, (n_rows,), generator=generator, device=device)
    return state_ND.requires_grad_(), weight_VD.requires_grad_(table_learns), label_N


def dense(state_ND: torch.Tensor, weight_VD: torch.Tensor, label_N: torch.Tensor) -> torch.Tensor:
    """What the stock models do: logits in the model's type, softmax in float32."""
    return F.cross_entropy((state_ND @ weight_VD.T).float(), label_N, reduction="sum")


def step(loss: Callable[..., torch.Tensor], batch: Batch) -> Callable[[], None]:
    """Forward and backward, as a call without arguments."""

    def run() -> None:
        batch[0].grad = batch[1].grad = None
        loss(*batch).backward()

    return run


def form(device: str) -> str:
    """Which form ``linear_cross_entropy`` takes."""
    return "liger" if device == "cuda" and importlib.util.find_spec("liger_kernel") else "chunked"


def shape(batch: Batch) -> dict[str, Any]:
    (n_rows, dim), dtype = batch[0].shape, str(batch[0].dtype).removeprefix("torch.")
    return {"rows": n_rows, "vocabulary": len(batch[1]), "dim": dim, "dtype": dtype}


def speed(n_rows: int, n_vocabulary: int, dim: int, device: str, table_learns: bool, repeats: int) -> dict[str, Any]:
    batch = make_batch(n_rows, n_vocabulary, dim, device, table_learns)
    seconds = sample({"linear": step(linear_cross_entropy, batch), "dense": step(dense, batch)}, repeats)
    ratios = [linear / other for linear, other in zip(seconds["linear"], seconds["dense"], strict=True)]
    return {
        "benchmark": "linear_cross_entropy/speed",
        "form": form(device),
        "shape": shape(batch),
        "table": "learns" if table_learns else "frozen",
        "repeats": repeats,
        "seconds": {name: percentiles(values) for name, values in seconds.items()},
        "linear_over_dense": percentiles(ratios),
        "aim": "p50 <= 1.2",
    }


def peak_bytes() -> int:
    """The most memory so far: of the device, or the process's resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


def grow(n_rows: int, n_vocabulary: int, dim: int, device: str, threads: int, queue: multiprocessing.Queue) -> None:
    torch.set_num_threads(threads)
    step(linear_cross_entropy, make_batch(8, 128, dim, device, False))()  # libraries are there before the count begins
    batch = make_batch(n_rows, n_vocabulary, dim, device, False)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = peak_bytes()
    seconds = sample({"linear": step(linear_cross_entropy, batch)}, repeats=1, warmup=0)["linear"][0]
    queue.put((peak_bytes() - before, seconds))


def memory(n_rows: int, n_vocabulary: int, dim: int, device: str) -> dict[str, Any]:
    # In a process of its own: a peak is never lowered again.
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=grow, args=(n_rows, n_vocabulary, dim, device, torch.get_num_threads(), queue))
    process.start()
    growth, seconds = queue.get()
    process.join()
    logits = 4 * n_rows * n_vocabulary
    return {
        "benchmark": "linear_cross_entropy/memory",
        "form": form(device),
        "shape": {"rows": n_rows, "vocabulary": n_vocabulary, "dim": dim},
        "table": "frozen",
        "repeats": 1,
        "seconds": round(seconds, 2),
        "peak_growth_bytes": growth,
        "of_which_gradient": n_rows * dim * (2 if device == "cuda" else 4),
        "dense_logits_bytes": logits,
        "share_of_dense_logits": round(growth / logits, 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=["speed", "memory"], help="default: both")
    parser.add_argument("--rows", type=int, help="rows of each measurement (default: as above)")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    wanted = args.only or ["speed", "memory"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if "speed" in wanted:
        for dim in (2048,) if device == "cuda" else (128, 1536):
            for table_learns in (True, False):
                rows = args.rows or (8192 if device == "cuda" else 440)
                found = speed(rows, args.vocabulary, dim, device, table_learns, args.repeats)
                record(args.results, found | provenance())
    if "memory" in wanted:
        dim = 2048 if device == "cuda" else 64
        record(args.results, memory(args.rows or 32_768, args.vocabulary, dim, device) | provenance())


if __name__ == "__main__":
    main()
