"""launch/train.py with a fault: FAULT happens on rank 1 in the step that starts with AFTER steps taken (default 2)."""

from __future__ import annotations

import os
import runpy
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch

from muco_ds.data.loader import StepDataset
from muco_ds.data.schema import StepBatch
from muco_ds.errors import UserError
from muco_ds.trainer import Trainer

FAULT, AFTER = os.environ["FAULT"], int(os.environ.get("AFTER", "2"))
train_step, item = Trainer.train_step, StepDataset.__getitem__


def gpu_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of ...")


def host_memory() -> None:
    torch.empty(2**50, dtype=torch.uint8)


def bug() -> None:
    raise KeyError("a bug of ours")


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hangs() -> None:
    time.sleep(3600)


def worker_killed() -> None:
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    time.sleep(60)  # torch's handler ends the sleep


FAULTS: dict[str, Callable[[], None]] = {
    f.__name__: f for f in (gpu_memory, host_memory, bug, killed, hangs, worker_killed)
}


def faulty_step(self: Trainer, batch: StepBatch) -> dict[str, torch.Tensor]:
    if batch.step == AFTER and FAULT in FAULTS:
        print(f"fault at {time.time():.1f}", flush=True)
        FAULTS[FAULT]()
    return train_step(self, batch)


def faulty_item(self: StepDataset, step: int) -> StepBatch | UserError:
    if step == AFTER and FAULT == "data":
        raise ValueError("a bug of the collator")
    return item(self, step)


if os.environ.get("RANK") == "1":
    Trainer.train_step = faulty_step  # type: ignore[method-assign]
    StepDataset.__getitem__ = faulty_item  # type: ignore[method-assign]
runpy.run_path(str(Path(__file__).parents[2] / "launch" / "train.py"), run_name="__main__")
