"""The process group: start it, ask it, agree through it. All of it works in a single process without a launcher."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from muco_ds.errors import UserError

_TIMEOUT = timedelta(minutes=30)
_PATIENCE = timedelta(days=7)

_patient_group: Any = None


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    return rank() == 0


def adopt_launcher() -> None:
    """Take rank and world size from SLURM where srun is the launcher; other launchers set them themselves.

    Programs call it first: without it every task of a plain srun would be a run of its own in the same folder.

    Raises:
        UserError: srun started several tasks and nothing says where they meet.
    """
    tasks = int(os.environ.get("SLURM_NTASKS", "1"))
    if "RANK" in os.environ or "SLURM_PROCID" not in os.environ or tasks == 1:
        return
    names = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_NTASKS"}
    os.environ.update({name: os.environ[slurm] for name, slurm in names.items()})
    if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        problem = "under srun set MASTER_ADDR (the first machine of the job) and MASTER_PORT (any free port)"
        raise UserError(problem, on_every_rank=True)


def start() -> torch.device:
    """Join the process group that the launcher describes (or a group of one) and return this rank's device."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        accelerator.set_device(local_rank())
    # DeepSpeed's shared-memory op for CPUs serves inference only, takes a compiler and half a minute, and a process
    # that is killed while loading it leaves a lock file that every later start waits for, forever.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    deepspeed.init_distributed(accelerator.communication_backend_name(), timeout=_TIMEOUT, verbose=False)
    return torch.device(accelerator.current_device_name() if accelerator.device_name() != "cpu" else "cpu")


def stop() -> None:
    """Leave the process group, if there is one."""
    global _patient_group
    _patient_group = None
    if dist.is_initialized():
        dist.destroy_process_group()


def from_main(value: Any) -> Any:
    """Rank 0's value on every rank. Collective."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, src=0)
    return values[0]


def from_all(value: Any, *, patient: bool = False, group: Any = None) -> list[Any]:
    """Every rank's value, in rank order. Collective.

    Args:
        patient: wait for the slowest, however long it works.
        group: one of `patient_group`, for a thread of its own on each rank.
    """
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=_patient() if patient else group)
    return values


def patient_group() -> Any:
    """A new group of all ranks, on CPUs, in which ranks may wait longer than any collective may take. Collective."""
    return dist.new_group(backend="gloo", timeout=_PATIENCE) if dist.is_initialized() else None


def _patient() -> Any:
    global _patient_group
    if _patient_group is None:
        _patient_group = patient_group()
    return _patient_group


def agree(problem: str | None, *, patient: bool = False) -> None:
    """Raise on every rank when any rank has a problem, so that no rank waits for one that left.

    Args:
        problem: one line, or None. Collective: every rank must call it.
        patient: as in `from_all`.
    Raises:
        UserError: the problem of the lowest rank that has one.
    """
    first = next((p for p in from_all(problem, patient=patient) if p is not None), None)
    if first is not None:
        raise UserError(first, on_every_rank=True)


@contextmanager
def agreement(*, patient: bool = False) -> Iterator[None]:
    """What one rank finds wrong inside is raised on every rank. The body holds no collective; every rank must enter.

    Args:
        patient: the body may take a rank far longer than the others.
    """
    problem = None
    try:
        yield
    except UserError as error:
        problem = str(error)
    agree(problem, patient=patient)


def on_main(work: Callable[[], object]) -> None:
    """Run `work` on rank 0 while the others wait, longer than any collective may take. Collective.

    Raises:
        UserError: that of rank 0, on every rank.
    """
    with agreement(patient=True):
        if is_main():
            work()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor over the ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values
