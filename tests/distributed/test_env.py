"""A half-set environment is one line with its cure; no group waits for ever, but for a rank that works."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from muco_ds.checkpoint import Checkpoints
from muco_ds.distributed import env
from muco_ds.distributed.testing import run_distributed
from muco_ds.errors import UserError

LAUNCHED = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "n0", "MASTER_PORT": "29500"}
VARIABLES = (*LAUNCHED, "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS")


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (*VARIABLES, "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"WORLD_SIZE": None}, ("no WORLD_SIZE", "`unset RANK LOCAL_RANK MASTER_ADDR MASTER_PORT`")),
        ({"MASTER_PORT": None}, ("MASTER_ADDR=n0 but no MASTER_PORT", "torchrun")),
        ({"LOCAL_RANK": None, "MASTER_ADDR": None}, ("no LOCAL_RANK and no MASTER_ADDR",)),
        ({"RANK": None}, ("WORLD_SIZE=2", "no RANK", "unset LOCAL_RANK WORLD_SIZE")),
        ({"WORLD_SIZE": "two"}, ("WORLD_SIZE='two'", "no number")),
        ({"RANK": "-1"}, ("RANK='-1'", "no number")),
        ({"RANK": "2"}, ("RANK=2", "WORLD_SIZE=2", "no such rank")),
        (dict.fromkeys(LAUNCHED) | {"OMPI_COMM_WORLD_SIZE": "2"}, ("mpirun started this", "srun")),
    ],
)
def test_a_half_set_environment(
    change: dict[str, str | None], words: tuple[str, ...], given: pytest.MonkeyPatch
) -> None:
    for name, value in (LAUNCHED | change).items():
        if value is not None:
            given.setenv(name, value)
    with pytest.raises(UserError) as caught:
        env.adopt_launcher()
    line = str(caught.value)
    assert all(word in line for word in words) and "\n" not in line, line


@pytest.mark.parametrize(
    "environment",
    [
        {},
        LAUNCHED,
        {"MASTER_ADDR": "n0", "MASTER_PORT": "29500"},
        {"WORLD_SIZE": "1"},
        {"OMPI_COMM_WORLD_SIZE": "1"},
        # A shell of an allocation: torchrun's variables count; and one task of a larger job.
        LAUNCHED | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"},
        {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"},
    ],
)
def test_a_launchers_environment_and_none_are_taken_as_they_are(
    environment: dict[str, str], given: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        given.setenv(name, value)
    env.adopt_launcher()
    assert {name: os.environ[name] for name in LAUNCHED if name in os.environ} == {
        name: value for name, value in environment.items() if name in LAUNCHED
    }


def waiting() -> float:
    """Seconds for which rank 0 waits in a group that is made as DeepSpeed makes its own."""
    env.start(timeout_s=1.0)
    group = dist.new_group(backend="gloo")
    started = time.monotonic()
    if dist.get_rank() == 0:
        with pytest.raises(RuntimeError, match="Timed out"):
            dist.barrier(group=group)
    waited = time.monotonic() - started
    dist.barrier()  # the other rank stays until then
    return waited


def test_no_group_waits_longer_than_it_is_told() -> None:
    assert run_distributed(waiting, 2, timeout_s=60.0)[0] < 10


def working(seconds: float) -> float:
    """Seconds for which ranks wait for rank 0's work, in groups whose time-out is shorter."""
    env.start(timeout_s=1.0)
    started = time.monotonic()
    env.on_main(lambda: time.sleep(seconds))
    return time.monotonic() - started


def test_work_on_one_rank_may_take_longer_than_that() -> None:
    assert all(seconds > 2.5 for seconds in run_distributed(working, 2, 2.5, timeout_s=60.0))


def losing() -> str:
    """What rank 0 gets for waiting for work of a rank that is gone without a word."""
    env.start(timeout_s=1.0)
    env.on_main(str)
    if dist.get_rank() == 1:
        # Its threads go on to answer the kernel, but it takes part in nothing any more: as behind a cut cable.
        time.sleep(3)
        return ""
    with pytest.raises(RuntimeError, match="Timed out"):
        with env.agreement(patient=True):
            pass
    return "noticed"


def test_a_rank_that_is_gone_during_such_work_is_noticed() -> None:
    assert run_distributed(losing, 2, timeout_s=60.0)[0] == "noticed"


class HeldEngine:
    """Has nothing written."""

    checkpoint_engine = None

    def save_checkpoint(self, *_: object, **__: object) -> None:
        pass


def losing_while_a_checkpoint_is_written(folder: str) -> str:
    """What rank 0 gets for waiting for a checkpoint whose other part nobody writes any more."""
    env.start(timeout_s=1.0)
    store = Checkpoints(Path(folder), keep=1)
    with env.agreement(patient=True):
        pass
    if dist.get_rank() == 1:
        store._write = lambda save: time.sleep(8)  # type: ignore[method-assign]
    store.save(HeldEngine(), 1, {}, lambda path: None)
    if dist.get_rank() == 1:
        time.sleep(6)
        return ""
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="Timed out"):
        store.finish()
    return "noticed" if time.monotonic() - started < 5 else "noticed by the other's end"


def test_a_rank_that_is_gone_while_a_checkpoint_is_written_is_noticed(tmp_path: Path) -> None:
    assert run_distributed(losing_while_a_checkpoint_is_written, 2, str(tmp_path), timeout_s=60.0)[0] == "noticed"


def writing_ends_on_one_rank(folder: str) -> float:
    """Seconds until a rank knows that the writing thread of rank 1 is out of the others' collectives."""
    env.start(timeout_s=30.0)
    store = Checkpoints(Path(folder), keep=1)
    if dist.get_rank() == 1:

        def no_memory(save: object) -> None:
            raise MemoryError

        store._write = no_memory  # type: ignore[method-assign]
    store.save(HeldEngine(), 1, {}, lambda path: None)
    started = time.monotonic()
    with pytest.raises(UserError, match="step_0000001: can't be written"):
        store.finish()
    return time.monotonic() - started


def test_a_thread_that_ends_on_one_rank_holds_no_other(tmp_path: Path) -> None:
    assert max(run_distributed(writing_ends_on_one_rank, 2, str(tmp_path), timeout_s=60.0)) < 10


def test_a_name_that_nobody_knows_is_named(given: pytest.MonkeyPatch) -> None:
    for name, value in (LAUNCHED | {"MASTER_ADDR": "no-such-machine.invalid", "RANK": "1"}).items():
        given.setenv(name, value)
    with pytest.raises(UserError, match=r"MASTER_ADDR=no-such-machine\.invalid .*--master_addr"):
        env.start(timeout_s=1.0)
