"""One try of `muco_ds.tune`, a program: `python -m muco_ds.tune_try CONFIG PACKS OUT`.

A few steps of the real Trainer on one device, all of them the fullest step of PACKS packs among some of the run. Writes
OUT/measured.json: median seconds, bytes at most, the step's load and FLOPs, the device; or null when memory was short.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from muco_ds.config_cli import load_config
from muco_ds.data.plan import spread_steps
from muco_ds.distributed import env
from muco_ds.errors import UserError, exit_on_user_error
from muco_ds.metrics import peak_memory_gib
from muco_ds.preflight import look_at
from muco_ds.trainer import Trainer

WARM_UP, STEPS, LOOKED_AT = 1, 3, 50


def measure(config_path: str, packs: int) -> dict[str, Any]:
    device = env.start()
    before = peak_memory_gib(device)  # of a process on a CPU its imports are most
    trainer = Trainer(load_config(config_path), device)
    plan = trainer.data.plan
    steps = [plan.step(number) for number in spread_steps(trainer.max_steps, LOOKED_AT)]
    # With the planned number of packs if any has it; a single rank's share is less even than a whole batch.
    fullest = max(steps, key=lambda step: (-abs(len(step.packs[0]) - packs), step.tokens))
    batch = trainer.data.steps(trainer.max_steps)[fullest.step]
    if isinstance(batch, UserError):
        raise batch
    batch = batch.pin_memory() if device.type == "cuda" else batch  # as the loader does
    seconds = []
    for _ in range(WARM_UP + STEPS):
        start = time.perf_counter()
        trainer.train_step(batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    peak = (peak_memory_gib(device) - before) * 2**30
    if device.type == "cuda":
        peak = torch.cuda.max_memory_reserved(device)
    return {
        "seconds": statistics.median(seconds[WARM_UP:]),
        "peak": int(peak),
        "load": asdict(look_at(plan, fullest).load),
        "flops": fullest.flops,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
    }


@exit_on_user_error()
def main() -> int:
    config_path, packs, out = sys.argv[1:]
    try:
        found: dict[str, Any] | None = measure(config_path, int(packs))
    except RuntimeError as error:  # torch's own, and cuBLAS or NCCL that could not allocate
        if not isinstance(error, torch.cuda.OutOfMemoryError) and not re.search(
            "out of memory|ALLOC_FAILED|can't allocate memory", str(error)
        ):
            raise
        found = None
    (Path(out) / "measured.json").write_text(json.dumps(found), encoding="utf-8")
    env.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
