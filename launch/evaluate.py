#!/usr/bin/env python3
"""Evaluate a model folder: `deepspeed launch/evaluate.py --model DIR --suite m3t --data PARQUET --output DIR`.

Ended before it is done, the same command goes on: each finished data set is kept in the output folder.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from muco_ds.config_matryoshka import sizes_of
from muco_ds.distributed import env
from muco_ds.errors import UserError, exit_on_user_error
from muco_ds.eval.encoder import Encoder, Store
from muco_ds.eval.evaluation import evaluate, prepare_output
from muco_ds.eval.mbeir import POOLS
from muco_ds.eval.mmeb_text import CONVENTIONS
from muco_ds.eval.suite import label, scores_of
from muco_ds.eval.suites import SUITES, SuiteOptions, open_suite
from muco_ds.models.embedder import Embedder
from muco_ds.models.recognise import recognise
from muco_ds.versions import check_versions


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a model, converted or released")
    kinds = "; ".join(f"{name}: {description}" for name, description in SUITES.items())
    parser.add_argument("--suite", choices=list(SUITES), required=True, help=kinds)
    parser.add_argument("--data", required=True, help="m3t: parquet file, folder or glob; else the benchmark's folder")
    parser.add_argument("--images", help="folder the image paths start from; default: by the suite, beside the data")
    parser.add_argument("--output", required=True, type=Path, help="folder for results.json")
    parser.add_argument("--datasets", nargs="+", metavar="NAME", help="only these of the suite's data sets")
    parser.add_argument("--rows", type=int, help="only the first rows of each data set")
    parser.add_argument("--convention", choices=CONVENTIONS, help="mmeb: how texts are composed; default: muco")
    parser.add_argument("--pool", choices=POOLS, help="mbeir: candidates of each data set's own pool, of all, or both")
    parser.add_argument("--seed", type=int, help="mbeir: of the prompts that are drawn; default 2023")
    parser.add_argument("--pack_tokens", type=int, help="token budget of one forward; default: by the device")
    parser.add_argument(
        "--dims",
        type=int,
        nargs="+",
        metavar="DIM",
        help="also rank by this many leading components of the embeddings; default: the sizes that were trained",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    return parser.parse_args(argv)


@exit_on_user_error()
def main() -> int:
    env.adopt_launcher()
    args = arguments()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    check_versions()
    if args.pack_tokens is not None and args.pack_tokens < 1:
        raise UserError(f"--pack_tokens {args.pack_tokens}: give at least 1", on_every_rank=True)
    device = env.start()
    with env.agreement():
        if env.is_main():
            prepare_output(args.output, args.suite)
        options = SuiteOptions(
            args.suite, args.data, args.images, args.datasets, args.rows, args.convention, args.pool, args.seed
        )
        suite = open_suite(options)
        embedder = Embedder.from_pretrained(args.model, device=device)
        sizes = sizes_of(args.dims or embedder.sizes, embedder.sizes[-1], "--dims")
        model = [recognise(args.model).facts(), str(next(embedder.parameters()).dtype)]
    assert embedder.packer is not None
    store = Store(args.output / "embeddings", model, embedder.sizes[-1])
    encoder = Encoder(embedder, embedder.packer, device, args.pack_tokens, sizes, progress=True, store=store)
    results, problems = evaluate(suite, encoder, args.output, model)
    if env.is_main():
        scores = list(scores_of(results["overall"]))
        width = max(len(label(name, entry)) for name, entry in results.items())
        heads = "".join(f"{score:>{len(score) + 1}}" for score in scores)
        print(f"{'':<{width}}{heads}{'queries':>9}{'candidates':>12}{'chance':>9}")
        for name, entry in results.items():
            values = "".join(f"{entry[score]:>{len(score) + 1}.4f}" for score in scores)
            counts = f"{entry['queries']:>9}{entry['candidates']:>12}{entry['chance']:>9.4f}"
            print(f"{label(name, entry):<{width}}{values}{counts}")
        if left_out := sum(entry.get("left_out", 0) for entry in results.values()):
            print(f"{left_out} rows could not be used and are not counted")
        print(f"written to {args.output / 'results.json'}")
    if problems:
        more = f"; and {len(problems) - 1} more data sets" if len(problems) > 1 else ""
        raise UserError(f"{problems[0]}{more}: not scored", on_every_rank=True)
    env.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
