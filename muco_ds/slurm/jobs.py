"""One job for SLURM: what it asks for, checked before it is submitted, and the sbatch command that says so."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from muco_ds.config import RunConfig, save_config
from muco_ds.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = REPOSITORY / "launch" / "slurm"

_SIGNAL_EARLY_S = 60  # SLURM looks at its jobs' remaining time once a minute
_DAYS = re.compile(r"(\d+)-(\d+)(?::(\d+))?(?::(\d+))?")
_NO_DAYS = re.compile(r"(\d+)(?::(\d+))?(?::(\d+))?")


@dataclass(frozen=True)
class Resources:
    """What a job asks for. Without GPUs, `ranks_per_node` says how many processes a machine runs.

    Args:
        time: in sbatch's forms (minutes, HH:MM:SS, D-HH:MM:SS); None: the partition's own limit.
        save_before_end: seconds before that limit at which the ranks are told to save.
        options: further words for sbatch.
    """

    nodes: int = 1
    gpus_per_node: int = 8
    ranks_per_node: int | None = None
    cpus_per_rank: int | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    save_before_end: int = 300
    options: tuple[str, ...] = ()

    @property
    def ranks_here(self) -> int:
        """Ranks on one node."""
        return self.ranks_per_node or self.gpus_per_node

    def check(self) -> None:
        """What can be said without asking SLURM. Raises UserError naming the option, its value and the cure."""
        limits = {"nodes": 1, "gpus_per_node": 0, "ranks_per_node": 1, "cpus_per_rank": 1, "save_before_end": 1}
        for name, least in limits.items():
            value = getattr(self, name)
            if value is None and name in ("ranks_per_node", "cpus_per_rank"):
                continue
            if type(value) is not int or value < least:
                raise UserError(f"{name} is {value}: give a whole number of at least {least}")
        if self.gpus_per_node == 0 and self.ranks_per_node is None:
            raise UserError("gpus_per_node is 0: give ranks_per_node, how many processes a machine without GPUs runs")
        if self.gpus_per_node and self.ranks_per_node not in (None, self.gpus_per_node):
            raise UserError(
                f"ranks_per_node is {self.ranks_per_node} but gpus_per_node is {self.gpus_per_node}: "
                "each rank has one GPU; leave ranks_per_node out"
            )
        for name in ("partition", "account"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):  # YAML reads 0123 as 83
                raise UserError(f"{name} is {value!r}: give its name, in a chain in quotes")
        if self.time is not None and not isinstance(self.time, str):  # YAML reads 24:00:00 as 86400
            raise UserError(f"time is the number {self.time}: put it in quotes, such as time: '24:00:00'")
        least_s = 2 * self.save_before_end + _SIGNAL_EARLY_S
        if self.time is not None and (seconds := seconds_of(self.time)) < least_s:
            raise UserError(
                f"time is {self.time}, {seconds} s, but ranks are told to save {self.save_before_end} s before its end "
                f"and SLURM may be a minute early: give at least {-(-least_s // 60)} minutes, or less save_before_end"
            )

    def arguments(self) -> list[str]:
        """For sbatch."""
        words = [f"--nodes={self.nodes}", f"--ntasks-per-node={self.ranks_here}"]
        if self.gpus_per_node:
            words.append(f"--gpus-per-node={self.gpus_per_node}")
        named = {"cpus-per-task": self.cpus_per_rank, "time": self.time}
        named |= {"partition": self.partition, "account": self.account}
        return [*words, *(f"--{name}={value}" for name, value in named.items() if value is not None), *self.options]


def seconds_of(time: str) -> int:
    """Seconds of a time in sbatch's forms. Raises UserError for anything else."""
    if match := _DAYS.fullmatch(time):
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    elif match := _NO_DAYS.fullmatch(time):
        parts = [int(part) for part in match.groups() if part is not None]
        days = 0
        hours, minutes, seconds = [[0, *parts, 0], [0, *parts], parts][len(parts) - 1]
    else:
        raise UserError(f"time is {time!r}: give minutes, HH:MM:SS or D-HH:MM:SS, such as 24:00:00")
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


@dataclass(frozen=True)
class Job:
    """One stage. `folder` is what it writes into, and what keeps two jobs from doing so at once.

    Args:
        kind: "train", "convert", "mine" or "evaluate".
        script: file in launch/slurm.
        arguments: of the script; a training's recipe, which is written first, is not among them.
        config: of a training.
        planned: a training's data and model are there already, so that preflight can look at them.
    """

    kind: str
    folder: Path
    script: str
    resources: Resources
    arguments: tuple[str, ...] = ()
    config: RunConfig | None = None
    planned: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)

    def write(self) -> Path:
        """Make the next number's record in the folder; returns its path without an ending: .../job/1_train.

        Raises:
            UserError: the folder can't be written.
        """
        record = self.folder / "job"
        try:
            record.mkdir(parents=True, exist_ok=True)
            numbers = [int(path.name.partition("_")[0]) for path in record.glob("[0-9]*_*.sh")]
            base = record / f"{max(numbers, default=0) + 1}_{self.kind}"
            base.with_suffix(".sh").touch(exist_ok=False)
            if self.config is not None:
                save_config(self.config, base.with_suffix(".yaml"))
        except OSError as error:
            raise UserError(f"can't write to '{record}' ({error.strerror}): set another run.dir") from error
        return base

    def command(self, base: Path, after: str | None) -> list[str]:
        """The sbatch command.

        Args:
            base: as `write` returned it.
            after: number of the job that has to end well first.
        """
        # singleton: never beside another job of this name, so that a run submitted twice goes on where the first ended.
        words = ["sbatch", "--parsable", f"--job-name={self.folder.name}", f"--comment={self.kind}"]
        words.append("--dependency=singleton" + (f",afterok:{after}" if after else ""))
        words.append("--kill-on-invalid-dep=yes")  # a stage whose predecessor failed would wait for ever
        words.append(f"--output={str(base).replace('%', '%%')}-%j.log")
        if self.kind == "train":
            words.append(f"--signal=USR1@{self.resources.save_before_end}")
        recipe = [] if self.config is None else [str(base.with_suffix(".yaml"))]
        return [*words, *self.resources.arguments(), str(SCRIPTS / self.script), *recipe, *self.arguments]

    def shell(self, command: list[str]) -> str:
        """What was submitted, as a script that submits it again."""
        environment = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in self.environment.items())
        return f"#!/usr/bin/env bash\ncd {shlex.quote(os.getcwd())} || exit\n{environment}{shlex.join(command)}\n"


def check_cluster(resources: Resources) -> None:
    """Ask SLURM whether it knows the partition and the account. Raises UserError where it says no; silence passes."""
    if shutil.which("sbatch") is None:
        raise UserError("no sbatch in PATH: submit from a machine of the cluster, or look at the jobs with --dry_run")
    partitions: dict[str, int] = {}
    for line in _answers(["sinfo", "--noheader", "--format=%R %D"]):
        name, _, nodes = line.partition(" ")
        partitions[name] = partitions.get(name, 0) + int(nodes)
    if resources.partition is not None and partitions:
        if resources.partition not in partitions:
            known = ", ".join(sorted(partitions))
            raise UserError(f"partition is {resources.partition!r}, which SLURM does not know: it has {known}")
        if (nodes_there := partitions[resources.partition]) < resources.nodes:
            raise UserError(
                f"nodes is {resources.nodes} but partition {resources.partition} has {nodes_there}: the job would wait "
                "for ever; give fewer"
            )
    elif partitions and resources.nodes > max(partitions.values()):
        raise UserError(f"nodes is {resources.nodes} but no partition has more than {max(partitions.values())}")
    who = f"user={os.environ.get('USER') or os.getuid()}"
    accounts = _answers(["sacctmgr", "--noheader", "--parsable2", "show", "associations", who, "format=account"])
    if resources.account is not None and accounts and resources.account not in accounts:
        known = ", ".join(sorted(set(accounts)))
        raise UserError(f"account is {resources.account!r}, which is not yours: you have {known}")


def _answers(command: list[str]) -> list[str]:
    """Lines of a program that may be missing, or find nobody to ask."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def submit(command: list[str], environment: Mapping[str, str]) -> str:
    """Run sbatch; returns the job's number.

    Raises:
        UserError: what sbatch says against it, in one line.
    """
    # So that `python` in the job is this one, also where its environment is not activated.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    inherited = os.environ | environment | {"PATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=inherited)
    if done.returncode != 0:
        said = "; ".join(line.removeprefix("sbatch: error: ") for line in done.stderr.splitlines() if line.strip())
        raise UserError(f"sbatch refuses the job ({said}): change the option it names")
    return done.stdout.strip().partition(";")[0]
