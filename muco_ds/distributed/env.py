"""The process group: start it, ask it, agree through it. All of it works in a single process without a launcher."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist

from muco_ds.errors import UserError

_TIMEOUT = timedelta(minutes=30)


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    return rank() == 0


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
    deepspeed.init_distributed(accelerator.communication_backend_name(), timeout=_TIMEOUT, verbose=False)
    return torch.device(accelerator.current_device_name() if accelerator.device_name() != "cpu" else "cpu")


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def agree(problem: str | None) -> None:
    """Raise on every rank when any rank has a problem, so that no rank waits for one that left.

    Args:
        problem: one line, or None. Collective: every rank must call it.
    Raises:
        UserError: the problem of the lowest rank that has one.
    """
    problems: list[str | None] = [problem]
    if dist.is_initialized():
        problems = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
    first = next((p for p in problems if p is not None), None)
    if first is not None:
        raise UserError(first)


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor over the ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values
