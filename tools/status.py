#!/usr/bin/env python3
"""How a run does, at a glance: `python tools/status.py runs/NAME [--watch [SECONDS]] [--json]`.

Reads the run's folder alone, from any machine that sees it. Exit status: 0 running, finished, or saved after a signal;
1 failed, stalled, dead or unknown; 2 no run's folder.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from muco_ds.errors import UserError, exit_on_user_error
from muco_ds.run_status import Status, read_status, span

_ENDS = 3
_STACKS = 4
_GREEN, _YELLOW, _RED = "32", "33", "31"


def page(status: Status, colour: bool) -> str:
    """What there is to say, a fact a line."""
    code = _GREEN if status.well else _YELLOW if status.verdict == "unknown" else _RED
    verdict = f"\033[1;{code}m{status.verdict}\033[0m" if colour else status.verdict
    lines = [("", f"{status.folder}: {verdict}{f': {status.why}' if status.why else ''}")]
    lines += [(name, text) for name, text in _facts(status) if text]
    lines += [
        ("ended", f"{end.time} with {end.status} at step {end.step}: {end.cause}") for end in status.ends[-_ENDS:]
    ]
    lines += [("stack", f"rank {rank}: {' < '.join(frames)}") for rank, frames in [*status.stacks.items()][:_STACKS]]
    lines += [("warning", text) for text in status.warnings]
    return "\n".join(f"  {name:<11} {text}" if name else text for name, text in lines)


def _facts(status: Status) -> Iterator[tuple[str, str]]:
    yield "look at", status.hint
    if status.ranks:
        yield "ranks", f"{status.ranks} on {len(status.hosts)} machine(s)"
    if status.step is not None:
        share = f" of {status.steps} ({status.step / status.steps:.0%})" if status.steps else ""
        left = f", about {span(status.remaining_s)} left" if status.remaining_s is not None else ""
        yield "step", f"{status.step}{share}{left}"
    rates = [("now", status.rate_now), ("with all pauses of the last hour", status.rate_hour)]
    yield "rate", ", ".join(f"{60 * rate:.3g} steps/min {name}" for name, rate in rates if rate)
    if status.last:
        shown = ("loss", "lr", "grad_norm", "pairs_per_s", "mfu", "step_s_p50", "step_s_p90", "step_s_max")
        values = [f"{key} {status.last[key]:.4g}" for key in shown if isinstance(status.last.get(key), int | float)]
        yield "logged", f"step {status.last['step']}: {', '.join(values)}"
    if status.validation:
        scores = [f"{key} {value:.4g}" for key, value in status.validation.items() if "overall" in key and value]
        yield "validation", f"step {status.validation['step']}: {', '.join(scores[:4])}"
    if status.checkpoint and status.checkpoint_age_s is not None:
        size = (status.checkpoint_bytes or 0) / 1e9
        yield "checkpoint", f"{status.checkpoint}, {span(status.checkpoint_age_s)} old, {size:.3g} GB"
    else:
        yield "checkpoint", "none"
    if status.free_bytes is not None:
        yield "disk", f"{status.free_bytes / 1e9:.4g} GB free"
    memory = [("resident", status.resident_gib), ("on the GPU at most", status.peak_gpu_gib)]
    yield "memory", ", ".join(f"{gib:.3g} GiB {name}" for name, gib in memory if gib)
    if restarts := len(status.ends):
        yield "starts", f"{restarts} end(s) so far; the last:"


def watch(folder: Path, every_s: float) -> Status:
    """Shows the page again and again, until the run is over or Ctrl-C."""
    while True:
        status = read_status(folder)
        print(f"\033[H\033[2J{page(status, sys.stdout.isatty())}", flush=True)
        if status.verdict in ("finished", "failed"):
            return status
        try:
            time.sleep(every_s)
        except KeyboardInterrupt:
            return status


@exit_on_user_error()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the run, runs/NAME")
    parser.add_argument(
        "--watch", type=float, nargs="?", const=5.0, metavar="SECONDS", help="show it again so often (5)"
    )
    parser.add_argument("--json", action="store_true", help="one line for scripts")
    args = parser.parse_args()
    if args.watch is not None and (args.json or not args.watch > 0):
        raise UserError("--watch: give seconds above 0, and not --json, which says it once")
    if args.watch:
        status = watch(args.run, args.watch)
    else:
        status = read_status(args.run)
        print(status.as_json() if args.json else page(status, sys.stdout.isatty()))
    return 0 if status.well else 1


if __name__ == "__main__":
    sys.exit(main())
