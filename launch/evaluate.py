#!/usr/bin/env python3
"""Evaluate a model folder: `deepspeed launch/evaluate.py --model DIR --suite m3t --data PARQUET --output DIR`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from muco_ds.config_matryoshka import sizes_of
from muco_ds.data.readers import M3TReader
from muco_ds.distributed import env
from muco_ds.errors import UserError, exit_on_user_error
from muco_ds.eval.m3t import M3TTask
from muco_ds.models.embedder import Embedder


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder written by tools/convert_ckpt.py")
    parser.add_argument("--suite", choices=["m3t"], required=True, help="m3t: precision@1 per turn type")
    parser.add_argument("--data", required=True, help="parquet file, folder or glob with M3T's columns")
    parser.add_argument("--images", help="folder the image paths start from; default: `images` beside the data")
    parser.add_argument("--output", required=True, help="folder for results.json")
    parser.add_argument("--rows", type=int, help="only the first rows")
    parser.add_argument("--pack_tokens", type=int, default=16384, help="token budget of one forward")
    parser.add_argument(
        "--dims",
        type=int,
        nargs="+",
        metavar="DIM",
        help="also rank by this many leading components of the embeddings; default: the sizes that were trained",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    return parser.parse_args()


def held_out(args: argparse.Namespace) -> tuple[M3TTask, int]:
    """The task over the usable rows, and how many rows were left out."""
    images = args.images or str(Path(args.data).parent / "images")
    return M3TTask.from_reader(M3TReader(args.data, images, "--data"), limit=args.rows)


@exit_on_user_error()
def main() -> int:
    env.adopt_launcher()
    args = arguments()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    device = env.start()
    with env.agreement():
        task, left_out = held_out(args)
        embedder = Embedder.from_pretrained(args.model, device=device)
        sizes = sizes_of(args.dims or embedder.sizes, embedder.sizes[-1], "--dims")
    assert embedder.packer is not None
    rankings = task.rank(
        embedder, embedder.packer, pack_tokens=args.pack_tokens, device=device, progress=True, sizes=sizes
    )
    if env.is_main():
        results = task.results(rankings)
        output = Path(args.output)
        try:
            output.mkdir(parents=True, exist_ok=True)
            (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"--output: can't write to '{output}' ({error})") from error
        scores = ["precision@1", *(f"precision@1@{size}" for size in sizes[:-1])]
        heads = "".join(f"{score:>{len(score) + 1}}" for score in scores)
        print(f"{'':<10}{heads}{'queries':>9}{'candidates':>12}{'chance':>9}")
        for name, entry in results.items():
            values = "".join(f"{entry[score]:>{len(score) + 1}.4f}" for score in scores)
            print(f"{name:<10}{values}{entry['queries']:>9}{entry['candidates']:>12}{entry['chance']:>9.4f}")
        if left_out:
            print(f"{left_out} rows could not be used and are not counted")
        print(f"written to {output / 'results.json'}")
    env.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
