#!/usr/bin/env python3
"""Called by the job scripts beside it.

    after.py folder --config RECIPE [--section.key value ...]      prints the run's folder
    after.py decide --folder DIR --status N [--limit 3]            after srun ended with status N

`decide` prints one line that says how the job ended and exits with 75 where it is to be requeued, else with the status
that the job ends with.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from muco_ds.errors import UserError, exit_on_user_error
from muco_ds.slurm.requeue import FINISHED, SAVED, reason_to_stop, record


def folder(argv: list[str]) -> int:
    from muco_ds.config_cli import parse_args  # takes half a second, which `decide` may not have

    run = parse_args(argv).config.run
    print(Path(run.dir) / run.name)
    return 0


def decide(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="after.py decide")
    parser.add_argument("--folder", type=Path, required=True, help="of the run, or of the evaluation")
    parser.add_argument("--status", type=int, required=True, help="of srun")
    parser.add_argument("--limit", type=int, default=3, help="so many ends alike without progress end the job")
    args = parser.parse_args(argv)
    if args.limit < 1:
        raise UserError(f"MAX_FAILURES={args.limit}: give at least 1")
    job, restart = os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    history = record(args.folder, job, restart, args.status)
    end = history[-1]
    told = f"status {end.status}, srun {args.status}, saved: {end.progress}"
    head = f"\n== job {job}, restart {restart}: {end.cause} ({told})"  # a progress bar may have left its line open
    if end.status == FINISHED:
        print(head)
        return 0
    if (reason := reason_to_stop(history, args.limit)) is None:
        print(f"{head}: requeueing")
        return SAVED
    print(f"{head}: not requeued: {reason}. Mend it and submit again: {args.folder} goes on from what is saved")
    # 75 would ask for a requeue.
    return 1 if end.status == SAVED else end.status


@exit_on_user_error()
def main() -> int:
    commands = {"folder": folder, "decide": decide}
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        raise UserError("after.py is called by the job scripts: after.py folder|decide ...")
    return commands[sys.argv[1]](sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
