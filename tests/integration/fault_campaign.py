#!/usr/bin/env python3
"""Break runs on purpose, and show that nothing is lost: `python tests/integration/fault_campaign.py --seed 0`.

Prints a table of faults as Markdown; exit status 1 where one was not survived. Takes about half an hour on two cores;
the folder must have room for a few hundred megabytes. Small disks need root.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

from fault_arena import Arena, Outcome  # noqa: E402
from fault_clock import set_back  # noqa: E402
from fault_kills import kills  # noqa: E402
from fault_pictures import pictures  # noqa: E402
from fault_ranks import killed, killed_worker, out_of_memory, stopped  # noqa: E402
from fault_storage import (  # noqa: E402
    altered_checkpoints,
    altered_rows,
    can_mount,
    filled_while_writing,
    read_only,
    short_of_space,
)
from programs import Demo, Programs  # noqa: E402

Fault = Callable[[], Outcome | list[Outcome]]


def faults(arena: Arena, args: argparse.Namespace) -> dict[str, Fault]:
    """All of them by name, in the order they are tried."""
    some = max(2, args.kills // 10)
    disks: dict[str, Fault] = {
        "space": lambda: short_of_space(arena),
        "filled": lambda: filled_while_writing(arena, max(1, some // 2)),
        "read_only": lambda: read_only(arena),
    }
    return {
        "pictures": lambda: pictures(arena),
        "clock": lambda: set_back(arena),
        "stopped": lambda: resumed(arena, stopped),
        "memory": lambda: resumed(arena, out_of_memory),
        "killed_rank": lambda: resumed(arena, killed),
        "killed_worker": lambda: resumed(arena, killed_worker),
        **(disks if can_mount(arena.folder) else dict.fromkeys(disks, no_disks)),
        "altered_checkpoints": lambda: altered_checkpoints(arena, some),
        "altered_rows": lambda: altered_rows(arena, some),
        "kills": lambda: kills(arena, args.kills),
    }


def resumed(arena: Arena, fault: Callable[[Arena, Path], Outcome]) -> Outcome:
    """A run that is disturbed once, and finished."""
    out = arena.new(fault.__name__)
    outcome = fault(arena, out)
    arena.finish(out)
    return outcome


def no_disks() -> Outcome:
    return Outcome("a small disk", 0, "NOT TRIED: mounting one needs root", "?")


def campaign(arena: Arena, args: argparse.Namespace) -> tuple[list[Outcome], bool]:
    """What came of each fault, and whether all were survived."""
    outcomes, survived = [], True
    chosen = faults(arena, args)
    for name in args.only or chosen:
        start = time.monotonic()
        try:
            outcome = chosen[name]()
            outcomes += outcome if isinstance(outcome, list) else [outcome]
        except Exception as error:
            traceback.print_exc()
            outcomes.append(Outcome(name, 1, f"NOT SURVIVED: {str(error).splitlines()[0][:200]}", "?"))
            survived = False
        print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return outcomes, survived


def table(outcomes: Sequence[Outcome]) -> str:
    lines = ["| fault | tries | what happened | lost | noticed after |", "|---|---|---|---|---|"]
    for o in outcomes:
        noticed = "" if o.noticed is None else f"{o.noticed:.0f} s"
        lines.append(f"| {o.fault} | {o.tries} | {o.happened} | {o.lost} | {noticed} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=100, help="times that a run is killed; other faults in proportion")
    parser.add_argument("--only", nargs="*", help="these faults alone")
    parser.add_argument("--folder", type=Path, help="scratch folder; default one that is removed")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="faults."))
    try:
        demo = Demo.build(folder / "demo")
        programs = Programs(folder / "jobs")
        try:
            outcomes, survived = campaign(Arena(demo, programs, folder / "runs", args.seed), args)
            print(table(outcomes))
        finally:
            programs.close()
    finally:
        if args.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    return 0 if survived else 1


if __name__ == "__main__":
    sys.exit(main())
