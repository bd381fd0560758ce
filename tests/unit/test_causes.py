"""An exception becomes one line with its cure; what follows from another rank's end is told from its cause."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed import DistBackendError, DistNetworkError, DistStoreError

from muco_ds.causes import cause_of
from muco_ds.ends import read_ends, record_end

GLOO = (
    "[/pytorch/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:12693: Connection reset by peer. "
    "This is typically caused by a remote worker hanging or bugs in the application. Check the logs."
)
GLOO_SILENT = "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 9000ms for recv"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore"),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory\nMore"),
    ],
)
def test_memory_of_a_gpu(error: Exception) -> None:
    cause = cause_of(error)
    assert cause.known and not cause.consequence
    assert "lower batch.pack_tokens" in cause.line and "--tune" in cause.line and "More" not in cause.line


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("unable to mmap 8736 bytes from file <filename not specified>: Cannot allocate memory (12)"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        MemoryError(),
    ],
)
def test_memory_of_the_host(error: Exception) -> None:
    cause = cause_of(error)
    assert cause.known and not cause.consequence
    assert "more host memory" in cause.line and "lower data.workers" in cause.line


def test_a_real_allocation_that_fails() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert "more host memory" in cause_of(caught.value).line


def test_no_more_threads() -> None:
    cause = cause_of(RuntimeError("can't start new thread"))
    assert cause.known and not cause.consequence and "ulimit -u" in cause.line


@pytest.mark.parametrize("end", ["is killed by signal: Killed. ", "is killed by signal: Bus error. "])
def test_a_loader_worker(end: str) -> None:
    cause = cause_of(RuntimeError(f"DataLoader worker (pid 812) {end}It is possible that"))
    assert cause.known and not cause.consequence
    assert end.strip(" .") in cause.line and "lower data.workers" in cause.line


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError(GLOO), "lost another rank (Read error [127.0.0.1]:12693: Connection reset by peer)"),
        (DistBackendError("NCCL error in: x.cpp:2, remote process exited"), "lost another rank (NCCL error"),
        (DistNetworkError("The client socket has timed out after 9000ms"), "within run.timeout_s"),
        (DistStoreError("wait timeout after 9000ms, keys: /x"), "within run.timeout_s"),
        (RuntimeError(GLOO_SILENT), "within run.timeout_s (Timed out waiting 9000ms for recv)"),
    ],
)
def test_collectives(error: Exception, words: str) -> None:
    cause = cause_of(error)
    assert cause.known and cause.consequence and words in cause.line and "\n" not in cause.line


def test_disk_full() -> None:
    cause = cause_of(OSError(errno.ENOSPC, "No space left on device", "/runs/x"))
    assert cause.known and "/runs/x" in cause.line and "free space" in cause.line


def test_anything_else_is_a_bug_whose_traceback_is_wanted() -> None:
    cause = cause_of(ValueError("first\nsecond"))
    assert cause.line == "ValueError: first" and not cause.known
    worker = ValueError("Caught ValueError in DataLoader worker process 0.\nTraceback:\n  x\nValueError: bad row\n")
    assert cause_of(worker).line == "ValueError: bad row"


PROGRAM = """
import sys, muco_ds.errors
from pathlib import Path
from muco_ds.ends import RunEnd
muco_ds.errors._GRACE_S = float(sys.argv[3])
with muco_ds.errors.exit_on_user_error(RunEnd(Path(sys.argv[1]))):
    if sys.argv[2] == "neighbour":
        from muco_ds.ends import record_end
        import os
        mine, os.environ["RANK"] = os.environ["RANK"], "5"
        record_end(Path(sys.argv[1]), 1, "KeyError: 'x'")
        os.environ["RANK"] = mine
    if sys.argv[2] == "bug":
        raise KeyError("x")
    raise RuntimeError("gloo: Connection closed by peer")
"""


def end_of(folder: Path, what: str, grace_s: float = 0.0, **rank: str) -> subprocess.CompletedProcess[str]:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE")
    environment = {key: value for key, value in os.environ.items() if key not in names} | rank
    argv = [sys.executable, "-c", PROGRAM, str(folder), what, str(grace_s)]
    return subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=30)


FIRST_OF_4 = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "8", "LOCAL_SIZE": "4"}


def test_the_rank_with_the_bug_says_it_with_its_traceback_and_records_it(tmp_path: Path) -> None:
    done = end_of(tmp_path, "bug", **{**FIRST_OF_4, "RANK": "3", "LOCAL_RANK": "3"})
    assert (
        done.returncode == 1 and "Traceback" in done.stderr and done.stderr.endswith("error: rank 3: KeyError: 'x'\n")
    )
    assert [(end.rank, end.cause) for end in read_ends(tmp_path)] == [(3, "KeyError: 'x'")]


def test_a_rank_that_lost_another_speaks_only_where_nobody_did(tmp_path: Path) -> None:
    record_end(tmp_path, 1, "of an earlier start")
    done = end_of(tmp_path, "alone", 0.2, **FIRST_OF_4)
    assert done.returncode == 1 and "Traceback" not in done.stderr and done.stderr.count("\n") == 2
    assert done.stderr.startswith("\nerror: rank 0: lost another rank (gloo: Connection closed by peer)")
    assert len(read_ends(tmp_path)) == 2


def test_a_rank_that_lost_another_repeats_the_cause_once_a_machine(tmp_path: Path) -> None:
    done = end_of(tmp_path, "neighbour", 20.0, **FIRST_OF_4)
    assert done.returncode == 1 and "rank 5 said: KeyError: 'x'" in done.stderr and done.stderr.count("\n") == 1
    done = end_of(tmp_path, "neighbour", 20.0, **{**FIRST_OF_4, "RANK": "1", "LOCAL_RANK": "1"})
    assert done.returncode == 1 and done.stderr == ""
    done = end_of(tmp_path, "neighbour", 20.0, **{**FIRST_OF_4, "RANK": "4"})
    assert done.returncode == 1 and done.stderr == "", "rank 5 is on the same machine and has said it there"
    assert [end.rank for end in read_ends(tmp_path)] == [5, 5, 5]


def test_a_single_process_raises_as_ever_and_records_it(tmp_path: Path) -> None:
    done = end_of(tmp_path, "bug")
    assert done.returncode == 1 and done.stderr.rstrip().endswith("KeyError: 'x'")
    assert [end.cause for end in read_ends(tmp_path)] == ["KeyError: 'x'"]
