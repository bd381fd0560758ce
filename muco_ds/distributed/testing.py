"""``run_distributed``: a function on several gloo ranks, for tests that run anywhere."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """Runs ``fn(*args)`` on ``world_size`` fresh processes joined by gloo; returns the results in rank order.

    ``fn`` must be a top-level function of an importable module, and its arguments and results must pickle (tensors
    may). It runs single-threaded, in an initialised process group (``torch.distributed.get_rank()``), with RANK,
    LOCAL_RANK and WORLD_SIZE in the environment.

    Raises RuntimeError with the rank and its traceback as soon as one rank fails, TimeoutError naming the unfinished
    ranks after ``timeout_s`` seconds; no process survives either way.
    """
    # Not fork: it would copy a parent whose autograd threads are already running. The server imports torch once, with
    # no thread started, and each rank is a fork of the server: 0.1 s instead of 2 s of imports per rank.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    # Plain pickle copies tensors; multiprocessing's own would share them with a process that may be gone.
    payload = pickle.dumps((dict(os.environ), fn, args))
    processes: list[BaseProcess] = []
    readers: dict[Connection, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(world_size):
                reader, writer = context.Pipe(duplex=False)
                store = os.path.join(folder, "store")
                process: BaseProcess = context.Process(
                    target=_rank_main, args=(rank, world_size, store, payload, writer, timeout_s)
                )
                process.start()
                writer.close()  # so that the death of the child is an end of file here
                processes.append(process)
                readers[reader] = rank
            return _collect(readers, processes, timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.join()
            for reader in readers:
                reader.close()


def _collect(readers: dict[Connection, int], processes: list[BaseProcess], timeout_s: float) -> list[Any]:
    deadline = time.monotonic() + timeout_s
    waiting = dict(readers)
    results: dict[int, Any] = {}
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {sorted(waiting.values())} of {len(processes)} not done after {timeout_s:g} s")
        for reader in ready:
            assert isinstance(reader, Connection)
            rank = waiting.pop(reader)
            try:
                failure, result = pickle.loads(reader.recv_bytes())
            except EOFError:
                processes[rank].join()
                failure = f"died without a result, exit code {processes[rank].exitcode}"
            if failure is not None:
                raise RuntimeError(f"rank {rank} of {len(processes)}: {failure}")
            results[rank] = result
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    return [results[rank] for rank in range(len(processes))]


def _rank_main(rank: int, world_size: int, store: str, payload: bytes, writer: Connection, timeout_s: float) -> None:
    torch.set_num_threads(1)
    try:
        environment, fn, args = pickle.loads(payload)
        os.environ.clear()  # the server's environment is as old as its first use
        os.environ |= environment | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
        result = fn(*args)
        dist.barrier()  # a rank that leaves early would break the connections of one that still computes
        dist.destroy_process_group()
        writer.send_bytes(pickle.dumps((None, result)))
    except BaseException:  # sys.exit in fn is a failure too
        writer.send_bytes(pickle.dumps((traceback.format_exc(), None)))
        raise
