#!/usr/bin/env python3
"""Find hard negatives with a trained model and write them as columns that training reads.

    python tools/mine_negatives.py --model DIR --data PARQUET --output MINED.parquet [--negatives 4] [--corpus PARQUET]

MINED has the data's rows and columns with neg_text and neg_image_path set anew: for each row, the wrong targets nearest
to its question (its questions, where it has several turns), among the distinct targets of the data and of --corpus. A
candidate that scores --max_share of the own target's score or more is likely right as well and is left out.
MINED.parquet.json says how it was made and what came of it. Also under deepspeed, torchrun and srun: every rank
encodes, rank 0 searches.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from muco_ds.distributed import env
from muco_ds.errors import UserError, exit_on_user_error
from muco_ds.mining.search import Rule
from muco_ds.models.recognise import recognise
from muco_ds.versions import check_versions

SHOWN_BAD_ROWS = 5


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder written by tools/convert_ckpt.py")
    parser.add_argument("--data", required=True, help="parquet file, folder or glob of M3T rows or of pairs")
    parser.add_argument("--images", help="folder the image paths start from; default: `images` beside the data")
    parser.add_argument("--corpus", help="more targets to search: rows in the same columns, pictures in --images")
    parser.add_argument("--output", required=True, type=Path, help="parquet file to write")
    parser.add_argument("--negatives", type=int, default=4, help="at most so many of a row (default 4)")
    parser.add_argument("--max_share", type=float, default=0.95, help="of the own target's score (default 0.95)")
    parser.add_argument("--skip", type=int, default=0, help="leave out so many nearest wrong targets (default 0)")
    parser.add_argument("--depth", type=int, default=100, help="look at so many nearest targets (default 100)")
    parser.add_argument("--pack_tokens", type=int, default=16384, help="token budget of one forward")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it is there")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> Rule:
    """What can be said before anything is read."""
    if args.negatives < 1 or args.skip < 0:
        raise UserError(f"--negatives {args.negatives}, --skip {args.skip}: give at least 1 and at least 0")
    if args.depth < args.negatives + args.skip + 1:
        at_least = args.negatives + args.skip + 1
        raise UserError(f"--depth {args.depth}: give at least {at_least}, for --negatives, --skip and the own target")
    if not args.max_share >= 0:
        raise UserError(f"--max_share {args.max_share}: give a number of at least 0, or inf for no limit")
    if args.output.suffix != ".parquet" or args.output.is_dir():
        raise UserError(f"--output: '{args.output}' is no name of a parquet file: end it in .parquet")
    if args.output.exists() and not args.overwrite:
        raise UserError(f"--output: '{args.output}' exists: give --overwrite to replace it, or another name")
    recognise(args.model)
    return Rule(args.negatives, args.max_share, args.skip, args.depth)


def show(report: dict[str, Any], args: argparse.Namespace) -> None:
    found, rows, bad = report["candidates"], report["rows"], report["bad_rows"]
    near = f"{found['too_near']} at {args.max_share:g} of the own target's score or above"
    print(f"targets     {report['targets']['distinct']} distinct")
    print(f"candidates  {found['looked_at']}: {found['right']} right, {found['skipped']} skipped, {near}")
    print(f"rows        {rows['full']} with {args.negatives} negatives, {rows['fewer']} fewer, {rows['none']} none")
    if bad:
        print(f"bad rows    {len(bad)}, carried along without negatives:")
        for entry in bad[:SHOWN_BAD_ROWS]:
            print(f"  row {entry['row']}: {entry['reason']}")
        if len(bad) > SHOWN_BAD_ROWS:
            print(f"  ... {len(bad) - SHOWN_BAD_ROWS} more: all of them in {args.output}.json")
    mean = report["mean_score"]
    print(f"mean score  own target {mean['own_target']:.4f}, negatives {mean['negative']:.4f}")
    print(f"written to {args.output}")


@exit_on_user_error()
def main() -> int:
    env.adopt_launcher()
    args = arguments()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    check_versions()
    rule = check(args)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the work folder goes away
    from muco_ds.data.readers import M3TReader  # imports take seconds; a typo in the command line should not
    from muco_ds.mining.mine import Task, mine_negatives
    from muco_ds.models.embedder import Embedder
    from muco_ds.search import load_faiss

    device = env.start()
    with env.agreement():
        if device.type == "cpu":
            load_faiss()  # now, and not after hours of encoding
        images = args.images or str(Path(args.data).parent / "images")
        reader = M3TReader(args.data, images, "--data")
        others = [M3TReader(args.corpus, images, "--corpus")] if args.corpus else []
        task = Task.of(reader, others, args.output, progress=env.is_main())
        embedder = Embedder.from_pretrained(args.model, device=device)
    assert embedder.packer is not None
    report = mine_negatives(
        embedder,
        embedder.packer,
        task,
        rule,
        provenance={"model": args.model, "settings": vars(recognise(args.model).settings), "data": args.data}
        | {"images": images, "corpus": args.corpus},
        pack_tokens=args.pack_tokens,
        device=device,
        progress=True,
    )
    if env.is_main():
        show(report, args)
    env.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
