#!/usr/bin/env python3
"""Make a checkpoint ready for another number of ranks, ahead of the run that needs it.

    python tools/reshard_ckpt.py CHECKPOINT [--workers N]

CHECKPOINT is runs/NAME/checkpoints/step_..., or runs/NAME for its newest complete one. launch/train.py does the same by
itself when it starts on another number of ranks than wrote the checkpoint, but its ranks wait meanwhile. The result
lies in CHECKPOINT/universal, serves any number of ranks, and goes when the run writes its next checkpoint.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from muco_ds.errors import UserError, exit_on_user_error


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="checkpoint folder, or the run's folder")
    parser.add_argument(
        "--workers", type=int, default=4, help="processes; each holds one rank's optimizer in memory (default: 4)"
    )
    return parser.parse_args()


@exit_on_user_error()
def main() -> int:
    args = parse_args()
    if args.workers < 1:
        raise UserError(f"--workers {args.workers}: give at least 1")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from muco_ds.checkpoint import read_meta  # imports take seconds; a typo in the command line should not
    from muco_ds.export import find_checkpoint
    from muco_ds.reshard import is_sharded, universal_form

    checkpoint = find_checkpoint(args.checkpoint)
    if not is_sharded(read_meta(checkpoint)):
        print(f"{checkpoint}: was written without ZeRO: any number of ranks loads it as it is")
        return 0
    print(universal_form(checkpoint, workers=args.workers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
