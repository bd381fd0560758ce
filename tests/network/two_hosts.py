"""Two hosts on one machine: network namespaces joined by a cable that can be pulled. One file system, as clusters have.

Needs root, and a kernel that lets it make namespaces.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
ADDRESSES = ("10.213.7.1", "10.213.7.2")
INTERFACE = "muco0"


class Process:
    """A command on a host; its output goes to a file."""

    def __init__(self, argv: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                argv, stdout=file, stderr=file, cwd=REPOSITORY, env=environment, start_new_session=True
            )

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def errors(self) -> list[str]:
        """The lines in which a rank said why it ended (over ssh each has its host before it)."""
        return [line[line.index("error: ") :] for line in self.output.splitlines() if "error: " in line]

    def wait(self, timeout_s: float) -> int:
        """Its exit status."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout_s:g} s\n{self.output[-3000:]}") from None


class TwoHosts:
    """Hosts 0 and 1."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self._names = folder, (f"{name}a", f"{name}b")

    def start(self, host: int, argv: Sequence[str | Path], log: str, **environment: str) -> Process:
        """Start a command on a host, console scripts from beside this Python first in PATH."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        stale = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        inherited = {key: value for key, value in os.environ.items() if key not in stale}
        inherited |= {"PATH": path, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        # Without it gloo takes the address of the machine's name, which other hosts need not reach.
        inherited |= {"GLOO_SOCKET_IFNAME": INTERFACE}
        command = ["ip", "netns", "exec", self._names[host], *map(str, argv)]
        return Process(command, inherited | environment, self.folder / f"{log}.{host}.log")

    def cable(self, state: str) -> None:
        """Pull the cable ("down") or plug it in ("up"): no side is told, packets go nowhere."""
        _ip("-n", self._names[1], "link", "set", INTERFACE, state)

    def up(self) -> None:
        a, b = self._names
        _ip("netns", "add", a)
        _ip("netns", "add", b)
        _ip("-n", a, "link", "add", INTERFACE, "type", "veth", "peer", "name", INTERFACE, "netns", b)
        for name, address in zip(self._names, ADDRESSES, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                _ip("-n", name, "link", "set", interface, "up")

    def down(self) -> None:
        for host, name in enumerate(self._names):
            self.lose(host)
            subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)

    def lose(self, host: int) -> None:
        """The machine is gone: SIGKILL to all that runs on it."""
        pids = subprocess.run(["ip", "netns", "pids", self._names[host]], capture_output=True, text=True).stdout
        for pid in pids.split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


def _ip(*argv: str) -> None:
    subprocess.run(["ip", *argv], check=True, capture_output=True, text=True)


def why_not() -> str | None:
    """What this machine lacks, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "no `ip` (package iproute2)"
    name = f"muco{os.getpid()}t"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return f"no network namespaces here: {tried.stderr.strip()}" if tried.returncode else None


@contextmanager
def two_hosts(folder: Path) -> Iterator[TwoHosts]:
    """Both hosts, gone afterwards with all that runs on them."""
    hosts = TwoHosts(folder, f"muco{os.getpid()}")
    try:
        hosts.up()
        yield hosts
    finally:
        hosts.down()


def wait_until_logged(run: Path, lines: int, process: Process, timeout_s: float = 120.0) -> None:
    """Until the run's metrics hold so many steps."""
    deadline = time.monotonic() + timeout_s
    path = run / "metrics.jsonl"
    while not (path.exists() and path.read_text().count("\n") >= lines):
        if time.monotonic() > deadline or process.process.poll() is not None:
            raise AssertionError(f"no {lines} steps\n{process.output[-3000:]}")
        time.sleep(0.02)
