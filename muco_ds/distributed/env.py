"""The process group: start it, ask it, agree through it. All of it works in a single process without a launcher."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from muco_ds.distributed.helper import Helper
from muco_ds.errors import UserError

TIMEOUT_S = 1800.0
_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_OTHER_LAUNCHERS = {"OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec", "MV2_COMM_WORLD_SIZE": "mpirun"}
_BACKGROUND = timedelta(days=7)
_LIFE_S = 0.2
"""Between two signs of life of ranks that wait for one that works."""

_patient: tuple[Any, Helper] | None = None
"""A group for signs of life, and who sends them."""


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
        UserError: srun started several tasks and nothing says where they meet, or what a launcher would have set is
            there in part, or is not what a launcher sets.
    """
    # Of an interactive step in a larger job SLURM_NTASKS is the job's.
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS", "1")
    if "RANK" not in os.environ and "SLURM_PROCID" in os.environ and tasks != "1":
        ids = {"RANK": os.environ["SLURM_PROCID"], "LOCAL_RANK": os.environ["SLURM_LOCALID"]}
        os.environ.update(ids, WORLD_SIZE=tasks)
        if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
            problem = "under srun set MASTER_ADDR (the first machine of the job) and MASTER_PORT (any free port)"
            raise UserError(problem, on_every_rank=True)
    if (half_set := _half_set()) is not None:
        raise UserError(half_set)


def _half_set() -> str | None:
    """What is wrong with the launcher's variables, or None."""
    given = {name: os.environ[name] for name in _LAUNCHED if name in os.environ}
    listed = ", ".join(f"{name}={value}" for name, value in given.items())
    cure = f"start with deepspeed, torchrun or srun, or `unset {' '.join(given)}` for a single process"
    if "RANK" not in given:
        for name, launcher in _OTHER_LAUNCHERS.items():
            if os.environ.get(name, "1") != "1":
                return f"{launcher} started this ({name}={os.environ[name]}), but {cure.split(',', 1)[0]} or srun"
        return f"{listed} but no RANK in the environment: {cure}" if given.get("WORLD_SIZE", "1") != "1" else None
    if missing := [name for name in _LAUNCHED if name not in given]:
        return f"{listed} but no {' and no '.join(missing)} in the environment: {cure}"
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):
        if not given[name].isdecimal():
            return f"{name}='{given[name]}' in the environment is no number: {cure}"
    if not int(given["RANK"]) < int(given["WORLD_SIZE"]):
        return f"{listed}: there is no such rank: {cure}"
    return None


def start(timeout_s: float = TIMEOUT_S) -> torch.device:
    """Join the process group that the launcher describes (or a group of one) and return this rank's device.

    Args:
        timeout_s: for which a rank waits for another, here and in any collective of any group.
    Raises:
        UserError: the ranks do not find each other, or this one has no GPU.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        if local_rank() >= (devices := accelerator.device_count()):
            raise UserError(
                f"rank {rank()} is process {local_rank() + 1} on a machine of which it sees {devices} GPUs: start as "
                "many as there are (CUDA_VISIBLE_DEVICES, --num_gpus, --nproc_per_node, --ntasks-per-node)"
            )
        accelerator.set_device(local_rank())
    # DeepSpeed's shared-memory op for CPUs serves inference only, takes a compiler and half a minute, and a process
    # that is killed while loading it leaves a lock file that every later start waits for, forever.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    timeout = timedelta(seconds=timeout_s)
    # DeepSpeed makes groups of its own, for which it can't be told a time-out: 30 minutes, with NCCL 10.
    distributed_c10d.default_pg_timeout = timeout
    distributed_c10d.default_pg_nccl_timeout = timeout
    with nullcontext() if dist.is_initialized() else _meeting():
        deepspeed.init_distributed(accelerator.communication_backend_name(), timeout=timeout, verbose=False)
    return torch.device(accelerator.current_device_name() if accelerator.device_name() != "cpu" else "cpu")


@contextmanager
def _meeting() -> Iterator[None]:
    """Ranks that do not meet: where, and what to look at."""
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    try:
        socket.getaddrinfo(address, port)
    except OSError as error:
        problem = f"MASTER_ADDR={address} ({error.strerror}): give the first machine by a name or address that all of"
        raise UserError(f"{problem} them can resolve (deepspeed and torchrun: --master_addr)") from error
    try:
        yield
    except RuntimeError as error:  # DistNetworkError, DistStoreError, and gloo's, which are plain
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"the {world_size()} ranks did not meet at MASTER_ADDR={address}, MASTER_PORT={port} ({said}): are all of "
            "them started, can the machines reach each other, is the port free, and does GLOO_SOCKET_IFNAME (with GPUs "
            "NCCL_SOCKET_IFNAME too) name the network between them?"
        ) from error


def stop() -> None:
    """Leave the process group, if there is one."""
    global _patient
    _patient = None
    if dist.is_initialized():
        dist.destroy_process_group()


def from_main(value: Any) -> Any:
    """Rank 0's value on every rank. Collective."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, src=0)
    return values[0]


def from_all(value: Any, *, group: Any = None) -> list[Any]:
    """Every rank's value, in rank order. Collective.

    Args:
        group: that of `background_group`, for the threads that it was made for.
    """
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=group)
    return values


def background_group() -> Any:
    """A new group of all ranks, on CPUs, for a thread of each; None without a process group. Collective.

    Its ranks may wait for each other for as long as they work: that one is gone shows in what the main threads do.
    """
    return dist.new_group(backend="gloo", timeout=_BACKGROUND) if dist.is_initialized() else None


def agree(problem: str | None) -> None:
    """Raise on every rank when any rank has a problem, so that no rank waits for one that left.

    Args:
        problem: one line, or None. Collective: every rank must call it.
    Raises:
        UserError: the problem of the lowest rank that has one.
    """
    first = next((p for p in from_all(problem) if p is not None), None)
    if first is not None:
        raise UserError(first, on_every_rank=True)


@contextmanager
def agreement(*, patient: bool = False) -> Iterator[threading.Event]:
    """What one rank finds wrong inside is raised on every rank. The body holds no collective; every rank must enter.

    Args:
        patient: the body may take a rank far longer than the others, and than any collective may take.
    Yields: what is set once another rank is gone or found something wrong, for a patient body that waits for that
        rank: it must end, then this raises.
    """
    problem, signs = None, _Signs()
    with _patience(signs) if patient and world_size() > 1 else nullcontext():
        try:
            yield signs.lost
        except UserError as error:
            problem, signs.wrong = str(error), True
    agree(problem)


@dataclass
class _Signs:
    """What ranks that wait for each other tell: that they are done, and whether something is wrong."""

    done: threading.Event = field(default_factory=threading.Event)
    wrong: bool = False
    lost: threading.Event = field(default_factory=threading.Event)


@contextmanager
def _patience(signs: _Signs) -> Iterator[None]:
    """At the end wait for the slowest rank. Until then all tell each other that they live: who works long is waited
    for, who is gone is noticed within the time-out. Collective."""
    global _patient
    if _patient is None:
        _patient = dist.new_group(backend="gloo"), Helper("signs of life")
    group, helper = _patient
    helper.begin(lambda: _tell_of_life(signs, group))
    yield  # an error that is not the user's ends this process, and thereby the exchange
    signs.done.set()
    helper.wait()
    if helper.error is not None:
        raise helper.error


def _tell_of_life(signs: _Signs, group: Any) -> None:
    """Exchanges until every rank is done."""
    pause_s = 0.01
    try:
        done = 0
        while done < world_size():
            signs.done.wait(pause_s)
            pause_s = min(2 * pause_s, _LIFE_S)
            over = signs.done.is_set()
            everyone = torch.tensor([over, over and signs.wrong], dtype=torch.int64)
            dist.all_reduce(everyone, group=group)
            done, wrong = everyone.tolist()
            if wrong:
                signs.lost.set()
    except Exception:
        signs.lost.set()
        raise


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


def rows_of_ranks(values_V: torch.Tensor) -> torch.Tensor:
    """Every rank's values, float32 [ranks, V] in rank order, on the device of this rank's."""
    if not dist.is_initialized():
        return values_V[None]
    rows = [torch.empty_like(values_V) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, values_V)
    return torch.stack(rows)
