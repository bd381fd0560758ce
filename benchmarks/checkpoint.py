#!/usr/bin/env python3
"""How long training waits for a checkpoint: written beside it (ours), while it waits, and by DeepSpeed alone.

    python benchmarks/checkpoint.py

- background: `Checkpoints.save` as a run calls it; the seconds until it returns, and until the checkpoint is there;
- foreground: the same with `checkpoint.background: false`;
- deepspeed: `engine.save_checkpoint` and an fsync of its files, without checksums.

A ZeRO-3 engine of one process with AdamW holds linear layers of `--millions` parameters: 12 bytes each of fp32 master
weights and moments are copied and written, and on a GPU the bf16 weights too. The first save, which also takes the
memory for the copy, is reported by itself. Appends one JSON line to benchmarks/results/checkpoint.jsonl.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch

from muco_ds.checkpoint import Checkpoints
from muco_ds.distributed import env
from muco_ds.manifest import flush

from harness import percentiles, provenance, record

RESULTS = Path(__file__).parent / "results" / "checkpoint.jsonl"
WIDTH = 1024


def make_engine(millions: int, device: torch.device) -> Any:
    """Linear layers under ZeRO-3, after one step, so that AdamW has its moments."""
    layers = max(1, millions * 10**6 // WIDTH**2)
    module = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": device.type == "cuda"},
    }
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    step(engine, device)
    return engine


def step(engine: Any, device: torch.device) -> None:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    engine.backward(engine(torch.ones(8, WIDTH, device=device, dtype=dtype)).float().pow(2).mean())
    engine.step()


def ours(folder: Path, engine: Any, *, background: bool, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds until `save` returned, and until the checkpoint was there, of each save."""
    store = Checkpoints(folder, keep=1, background=background)
    waited, written = [], []
    for i in range(repeats + 1):
        start = time.perf_counter()
        store.save(engine, i, {}, lambda _: None)
        waited.append(time.perf_counter() - start)
        store.finish()
        written.append(time.perf_counter() - start)
    return waited, written


def plain(folder: Path, engine: Any, *, repeats: int) -> list[float]:
    """Seconds of DeepSpeed's own save, files flushed."""
    written = []
    for i in range(repeats + 1):
        start = time.perf_counter()
        engine.save_checkpoint(str(folder / str(i)), tag="model", save_latest=False)
        for path in folder.rglob("*"):
            flush(path)
        written.append(time.perf_counter() - start)
        shutil.rmtree(folder / str(i))
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, default=50, help="parameters")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, help="on the file system to be measured; default the system's for scratch"
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="checkpoint.", dir=args.folder))
    device = env.start()
    try:
        engine = make_engine(args.millions, device)
        waited, written = ours(folder / "background", engine, background=True, repeats=args.repeats)
        _, foreground = ours(folder / "foreground", engine, background=False, repeats=args.repeats)
        deepspeeds = plain(folder / "deepspeed", engine, repeats=args.repeats)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    line = {
        "benchmark": "checkpoint",
        "millions": args.millions,
        "waited_s": percentiles(waited[1:]),
        "written_s": percentiles(written[1:]),
        "foreground_s": percentiles(foreground[1:]),
        "deepspeed_s": percentiles(deepspeeds[1:]),
        "first_waited_s": waited[0],
        "waited_of_written": sum(waited[1:]) / sum(written[1:]),
        "foreground_of_deepspeed": sum(foreground[1:]) / sum(deepspeeds[1:]),
        **provenance(),
    }
    record(args.output, line)
    waits, writes = (sum(values[1:]) / args.repeats for values in (waited, written))
    print(
        f"training waited {line['waited_of_written']:.1%} of a write ({waits:.2f} of {writes:.2f} s; "
        f"the first {waited[0]:.2f} s); in the foreground {line['foreground_of_deepspeed']:.2f} times DeepSpeed's time"
    )
    env.stop()


if __name__ == "__main__":
    main()
