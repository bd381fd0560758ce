"""A run over two hosts by every launcher but SLURM's: it trains, notices a pulled cable, and goes on where it was.

Two minutes and more: not among the tests of each change. `python -m pytest tests/network`
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from muco_ds.ends import read_ends

from programs import Demo, losses
from two_hosts import ADDRESSES, REPOSITORY, Process, TwoHosts, two_hosts, wait_until_logged, why_not

MISSING = why_not()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=MISSING or "")

STEPS, PORT, TIMEOUT_S, START_S = 8, 29617, 8.0, 150.0
ENDS_S = TIMEOUT_S + 20.0
"""From a pulled cable to the end of both launchers: the time-out, the grace for a better cause, the launchers."""
SSHD = shutil.which("sshd") or "/usr/sbin/sshd"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    return Demo.build(tmp_path_factory.mktemp("demo"))


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[TwoHosts]:
    with two_hosts(tmp_path) as both:
        (tmp_path / "hostfile").write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
        yield both


def train(demo: Demo, out: Path, **more: object) -> list[str]:
    overrides = {
        "run.max_steps": STEPS,
        "run.timeout_s": TIMEOUT_S,
        "checkpoint.every": 1,
        "optim.schedule": "constant",
    }
    return demo.train(out, overrides | {f"run.{key}": value for key, value in more.items()})


@pytest.fixture(scope="module")
def uninterrupted(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of two ranks on one machine, nothing in the way."""
    out = tmp_path_factory.mktemp("uninterrupted")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(PORT + 1)]
    subprocess.run([*command, *train(demo, out)], cwd=REPOSITORY, env=environment, check=True, capture_output=True)
    return losses(out)


def start_both(hosts: TwoHosts, argv: list[str], log: str) -> list[Process]:
    """The same command on each machine, which alone says which of the two it is."""
    launcher = ["deepspeed", "--no_ssh", "--hostfile", hosts.folder / "hostfile", "--master_addr", ADDRESSES[0]]
    launcher += ["--master_port", PORT, "--log_level", "error"]
    return [hosts.start(host, [*launcher, "--node_rank", host, *argv], log) for host in (0, 1)]


def test_a_pulled_cable_ends_both_sides_and_the_run_goes_on(
    demo: Demo, hosts: TwoHosts, tmp_path: Path, uninterrupted: dict[int, float]
) -> None:
    both = start_both(hosts, train(demo, tmp_path), "first")
    wait_until_logged(tmp_path / "run", 3, both[0], START_S)
    hosts.cable("down")
    pulled = time.monotonic()
    for rank, process in enumerate(both):
        assert process.wait(ENDS_S - (time.monotonic() - pulled)) == 1
        (line,) = process.errors()
        assert line.startswith(f"error: rank {rank}: heard nothing of another rank within run.timeout_s"), line
        assert "Traceback" not in process.output
        print(f"host {rank} ended {time.monotonic() - pulled:.1f} s after the cable was pulled: {line}")
    assert "heard nothing" in read_ends(tmp_path / "run")[0].cause

    hosts.cable("up")
    for process in start_both(hosts, train(demo, tmp_path), "second"):
        assert process.wait(START_S) == 0, process.output[-3000:]
    assert losses(tmp_path) == uninterrupted
    assert read_ends(tmp_path / "run")[-1].cause == "finished"


@pytest.fixture
def ssh(hosts: TwoHosts, tmp_path: Path) -> dict[str, str]:
    """A server on each host, and what makes pdsh's ssh reach it."""
    if not os.path.exists(SSHD) or shutil.which("pdsh") is None:
        pytest.skip("needs openssh-server and pdsh")
    Path("/run/sshd").mkdir(exist_ok=True)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key"], check=True)
    known = ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"]
    for host, address in enumerate(ADDRESSES):
        options = {"ListenAddress": address, "HostKey": tmp_path / "key", "StrictModes": "no", "UsePAM": "no"}
        options |= {"AuthorizedKeysFile": tmp_path / "key.pub", "PidFile": "none", "PermitRootLogin": "yes"}
        argv = [part for key, value in options.items() for part in ("-o", f"{key}={value}")]
        server = hosts.start(host, [SSHD, "-D", "-e", "-f", "/dev/null", *argv], "sshd")
        for _ in range(100):
            if "Server listening" in server.output:
                break
            time.sleep(0.1)
        else:
            raise AssertionError(server.output)
    # Over ssh the variables of this shell are not there: the launcher takes them from this file.
    (tmp_path / "environment").write_text("GLOO_SOCKET_IFNAME=muco0\nOMP_NUM_THREADS=1\nHF_HUB_OFFLINE=1\n")
    arguments = " ".join(["-i", str(tmp_path / "key"), *known])
    return {"DS_ENV_FILE": str(tmp_path / "environment"), "PDSH_SSH_ARGS_APPEND": arguments}


def over_ssh(hosts: TwoHosts, ssh: dict[str, str], argv: list[str], log: str) -> Process:
    launcher = ["deepspeed", "--hostfile", hosts.folder / "hostfile", "--no_ssh_check", "--master_addr", ADDRESSES[0]]
    return hosts.start(0, [*launcher, "--master_port", PORT, "--log_level", "error", *argv], log, **ssh)


def test_over_ssh_from_one_machine(
    demo: Demo, hosts: TwoHosts, ssh: dict[str, str], tmp_path: Path, uninterrupted: dict[int, float]
) -> None:
    process = over_ssh(hosts, ssh, train(demo, tmp_path), "ssh")
    assert process.wait(START_S) == 0, process.output[-3000:]
    assert losses(tmp_path) == uninterrupted


def test_a_machine_that_cannot_be_reached_is_one_line(demo: Demo, hosts: TwoHosts, tmp_path: Path) -> None:
    hosts.cable("down")
    started = time.monotonic()
    launcher = ["deepspeed", "--no_ssh", "--hostfile", tmp_path / "hostfile", "--master_addr", ADDRESSES[0]]
    launcher += ["--master_port", PORT, "--log_level", "error", "--node_rank", "1"]
    process = hosts.start(1, [*launcher, *train(demo, tmp_path)], "alone")
    assert process.wait(START_S) == 2
    (line,) = process.errors()
    assert f"did not meet at MASTER_ADDR={ADDRESSES[0]}" in line and "reach each other" in line, line
    assert "Traceback" not in process.output
    print(f"ended {time.monotonic() - started:.1f} s after the start: {line}")


def test_elastic_goes_on_with_the_ranks_that_are_left(demo: Demo, hosts: TwoHosts, tmp_path: Path) -> None:
    elastic = ["torchrun", "--nnodes", "1:2", "--nproc_per_node", "1", "--max_restarts", "3", "--rdzv_backend", "c10d"]
    elastic += ["--rdzv_endpoint", f"{ADDRESSES[0]}:{PORT}", "--rdzv_id", "run"]
    steps = 12
    agents = [
        hosts.start(
            host,
            # Which machine has the store: torchrun compares names, which these two share.
            [
                *(*elastic, "--rdzv_conf", f"is_host={host == 0},last_call_timeout=5", "--local_addr", address),
                *train(demo, tmp_path, max_steps=steps),
            ],
            "elastic",
        )
        for host, address in enumerate(ADDRESSES)
    ]
    wait_until_logged(tmp_path / "run", 3, agents[0], START_S)
    hosts.lose(1)
    killed = time.monotonic()
    assert agents[0].wait(2 * START_S) == 0, agents[0].output[-3000:]
    print(f"ended {time.monotonic() - killed:.1f} s after the other machine was gone")
    assert "on 1 ranks" in agents[0].output and "resumed from" in agents[0].output
    assert list(losses(tmp_path)) == list(range(1, steps + 1))
    assert "lost another rank" in read_ends(tmp_path / "run")[0].cause
