#!/usr/bin/env python3
"""Check a training and hand it to SLURM.

    python launch/slurm/submit.py RECIPE --nodes 2 [--gpus_per_node 8] [--time 24:00:00] [--partition P] [--account A]
        [--section.key value ...] [--dry_run]
    python launch/slurm/submit.py --chain launch/slurm/demo_chain.yaml [--from 3] [--dry_run]

The recipe is planned for that many ranks (tools/preflight.py) and refused where it does not fit; the resolved recipe
and the sbatch command are kept in the run's folder, under job/. A job that is preempted, fails or reaches its time
limit is requeued and goes on from its newest checkpoint (launch/slurm/train.sbatch). Submitted twice, a run waits for
itself. The stages of a chain (muco_ds/slurm/chain.py) wait for each other; where one fails the later ones are dropped,
and --from submits them again.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import runpy
import shlex
import sys
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # indexing forks; the tokenizer's threads would not survive

from muco_ds.errors import UserError, exit_on_user_error
from muco_ds.slurm.chain import Stage, jobs_of, read_chain
from muco_ds.slurm.jobs import REPOSITORY, Job, Resources, check_cluster, submit


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}: see --help")


def arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """This program's own options, and the recipe's keys."""
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="YAML recipe of a training")
    parser.add_argument("--chain", type=Path, metavar="FILE", help="YAML list of stages, in place of RECIPE")
    parser.add_argument("--from", type=int, default=1, dest="first", metavar="N", help="leave out the stages before N")
    parser.add_argument("--nodes", type=int, help="machines of a training (default: 1)")
    parser.add_argument("--gpus_per_node", type=int, help="and ranks on each (default: 8); 0: on CPUs")
    parser.add_argument("--ranks_per_node", type=int, help="where there are no GPUs")
    parser.add_argument("--cpus_per_rank", type=int, help="default: the recipe's data.workers and one more")
    parser.add_argument("--time", help="limit of a job: minutes, HH:MM:SS or D-HH:MM:SS (default: the partition's)")
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument(
        "--save_before_end", type=int, metavar="S", help="seconds before the limit to save at (default: 300)"
    )
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="WORDS", help='for sbatch: --sbatch "--qos=long"'
    )
    parser.add_argument("--max_failures", type=int, default=3, help="ends alike without a new checkpoint (default: 3)")
    parser.add_argument("--gpu_memory", type=float, default=80.0, help="of one GPU, in GiB (default: 80)")
    parser.add_argument("--no_preflight", action="store_true", help="do not plan the training here")
    parser.add_argument("--dry_run", action="store_true", help="check all but the cluster, and print the jobs")
    own, rest = parser.parse_known_args(_joined(argv))
    if own.recipe is None and own.chain is None:
        raise UserError("give a RECIPE or --chain FILE")
    if own.chain is not None and (rest or own.recipe):
        problem = f"{(rest or [own.recipe])[0]} beside --chain: a chain's recipes and their keys stand in its file"
        raise UserError(f"{problem}, as {{recipe: FILE, run.name: NAME}}")
    for name in ("max_failures", "gpu_memory"):
        if not getattr(own, name) > 0:
            raise UserError(f"--{name} {getattr(own, name)}: give more than 0")
    return own, rest


def _joined(argv: list[str]) -> list[str]:
    """`--sbatch --qos=x` as one word: argparse takes what follows for an option of its own."""
    words = list(argv)
    while "--sbatch" in words[:-1]:
        i = words.index("--sbatch")
        words[i : i + 2] = [f"--sbatch={words[i + 1]}"]
    return words


def _for_sbatch(given: list[str]) -> tuple[str, ...]:
    """The words of `--sbatch`, without those that would let two jobs write one run."""
    text = " ".join(given)
    try:
        words = tuple(shlex.split(text))
    except ValueError as error:
        raise UserError(f"--sbatch {text}: {str(error).lower()}: quote its words as for a shell") from None
    for word in words:
        if word.split("=")[0] in ("--job-name", "-J", "--dependency", "-d", "--array", "-a"):
            problem = f"--sbatch {word}: a run is kept from being written by two jobs by its job's name and dependency"
            raise UserError(f"{problem}: leave it out, and set run.name for another run")
    return words


def plan_jobs(own: argparse.Namespace, rest: list[str]) -> list[Job]:
    names = ("nodes", "gpus_per_node", "ranks_per_node", "cpus_per_rank", "time", "partition", "account")
    given = {name: value for name in (*names, "save_before_end") if (value := getattr(own, name)) is not None}
    shared: dict[str, Any] = {}
    if own.chain is not None:
        shared, stages = read_chain(own.chain)
    else:
        stages = [Stage("", "train", {"recipe": own.recipe} | _keys(rest), {})]
    resources = Resources(**(shared | given), options=_for_sbatch(own.sbatch))
    resources.check()
    jobs = jobs_of(stages, resources)
    if not 1 <= own.first <= len(jobs):
        raise UserError(f"--from {own.first}: the chain has stages 1 to {len(jobs)}")
    environment = {"MUCO_DS_REPOSITORY": str(REPOSITORY), "MAX_FAILURES": str(own.max_failures)}
    return [replace(job, environment=environment) for job in jobs[own.first - 1 :]]


def _keys(rest: list[str]) -> dict[str, str]:
    keys: dict[str, str] = {}
    words = iter(rest)
    for word in words:
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            raise UserError(f"unexpected argument {word!r} on the command line: write --section.key VALUE")
        if not equals and (value := next(words, "--")).startswith("--"):
            raise UserError(f"--{key} needs a value: write --{key} VALUE")
        keys[key] = value
    return keys


def check_plan(job: Job, gpu_memory: float) -> None:
    """Plan a training for its ranks. Raises UserError where it can't be, or does not fit."""
    from muco_ds.preflight import preflight  # imports take seconds; a typo in the command line should not

    assert job.config is not None
    ranks = job.resources.nodes * job.resources.ranks_here
    report = preflight(job.config, ranks, gpu_memory, most_steps=50, progress=True)
    print(f"{job.folder}: {report.steps} steps of {report.images} images on {ranks} ranks", end="")
    if not job.resources.gpus_per_node:
        print()
        return
    needed = report.memory.total / 2**30
    print(f", {needed:.1f} of {gpu_memory:g} GiB estimated")
    if not report.fits:
        cure = report.advice[-1] if report.advice else "more nodes"
        raise UserError(
            f"{job.folder}: does not fit {gpu_memory:g} GiB: {cure}; or look closer with tools/preflight.py"
        )


def check_options(job: Job) -> None:
    """Have the program of a stage that is no training read its options now, not when its turn comes.

    Raises:
        UserError: a value that it does not take.
    """
    program, *words = job.arguments if job.script == "tool.sbatch" else ("launch/evaluate.py", *job.arguments)
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            runpy.run_path(str(REPOSITORY / program))["arguments"](words)
    except SystemExit:
        problem = said.getvalue().strip().splitlines()[-1].partition("error: ")[2]
        raise UserError(f"{job.kind} for {job.folder}: {problem}: see python {program} --help") from None


@exit_on_user_error()
def main() -> int:
    own, rest = arguments(sys.argv[1:])
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    jobs = plan_jobs(own, rest)
    if not own.dry_run:
        for job in jobs:
            check_cluster(job.resources)
    for job in jobs:
        if job.config is None:
            check_options(job)
    for job in jobs:
        if job.config is not None and job.planned and not own.no_preflight:
            check_plan(job, own.gpu_memory)
        elif job.config is not None:
            print(
                f"{job.folder}: not planned here" + ("" if own.no_preflight else ": an earlier stage makes its input")
            )
    after: str | None = None
    submitted: list[str] = []
    for i, job in enumerate(jobs, own.first):
        base = job.folder / "job" / f"N_{job.kind}" if own.dry_run else job.write()
        command = job.command(base, after)
        if own.dry_run:
            after = f"STAGE_{i}"
            print(shlex.join(command))
            continue
        base.with_suffix(".sh").write_text(job.shell(command), encoding="utf-8")
        try:
            after = submit(command, job.environment)
        except UserError as error:
            rest_of_it = f"; jobs {', '.join(submitted)} go on: mend it and submit the rest with --from {i}"
            raise UserError(f"{error}{rest_of_it if submitted else ''}") from None
        submitted.append(after)
        print(f"job {after}: {job.kind} {job.folder}, log {base}-{after}.log")
    if submitted:
        numbers = ",".join(submitted)
        print(f"follow:  squeue --jobs {numbers}    python tools/status.py {jobs[0].folder}")
        print(f"save and requeue:  scancel --signal=USR1 {submitted[0]}    end:  scancel {numbers.replace(',', ' ')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
