#!/usr/bin/env python3
"""Embed files of items: texts, pictures, both, or several questions about one picture.

    python tools/encode.py --model DIR --input items.jsonl --output emb.npy

Each line of the input is one object with any keys of "text", "image" (a path or a list of them) and "instruction",
and gives one row of emb.npy: float32, unit length, in the order of the lines. A line with "questions", a list, in
place of "text" gives a row for each; the picture is then encoded once. Where lines have such, emb.npy.rows.npy says
which rows are whose: those of line i, counted from 0, are emb[rows[i]:rows[i + 1]]. Lines with the same picture near
each other share it in any case.

The input may also be parquet with columns of these names (pictures as paths, or stored as the datasets library does),
a folder of such files or a glob. An --output without .npy is a folder of shards, in npy or parquet.

All lines and picture headers are read first, so that a mistake is found at once. Ended before it is done, the same
command goes on. Also under deepspeed, torchrun and srun: every rank encodes and writes shards of its own, in a folder
that all machines see. What could not be used is listed in ...broken.jsonl and counted in ...report.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import re
import sys
from pathlib import Path

from muco_ds.distributed import env
from muco_ds.errors import UserError, exit_on_user_error
from muco_ds.models.recognise import Recognised, recognise
from muco_ds.versions import check_versions

OURS = re.compile(r"\d{5}(\.lines|\.broken)?\.npy$|\d{5}\.parquet$|(shards|report)\.json$|broken\.jsonl$")
"""Names of the files in a folder that this program writes."""

DTYPES = ("fp32", "bf16", "fp16")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, help="folder of a model, converted or released")
    parser.add_argument("--input", required=True, help="file, folder or glob: JSON lines or parquet")
    parser.add_argument("--output", required=True, type=Path, help=".npy file to write, or a folder")
    parser.add_argument("--format", choices=["npy", "parquet"], default="npy", help="of the shards in a folder")
    parser.add_argument("--images", type=Path, help="folder the picture paths start from; default: that of the input")
    parser.add_argument("--dim", type=int, help="the first so many components alone, at unit length again")
    parser.add_argument("--dtype", choices=DTYPES, help="of the model; default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--device", help="default: the GPU if there is one, under a launcher each rank's own")
    parser.add_argument("--pack_tokens", type=int, help="token budget of one forward; default: by the device")
    parser.add_argument("--skip_broken", action="store_true", help="leave lines out whose picture can't be used")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it is there")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    return parser.parse_args()


def contents(folder: Path) -> list[str]:
    """Names in a folder, if it is one."""
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def check(args: argparse.Namespace) -> Recognised:
    """The model, and what can be said before anything is read."""
    if args.output.suffix == ".npy":
        if args.output.is_dir():
            raise UserError(f"--output: '{args.output}' is a folder: give another name")
        if args.format != "npy":
            raise UserError(f"--format {args.format}: is for a folder: end --output in no .npy")
    elif args.output.suffix or args.output.is_file():
        raise UserError(f"--output: '{args.output}': end it in .npy, or give a folder without a dot in its name")
    elif args.output.resolve() == Path.cwd() or not args.output.name:
        raise UserError(f"--output: '{args.output}' can't be replaced as a whole: name a folder in it")
    elif strangers := [name for name in contents(args.output) if not OURS.match(name)]:
        raise UserError(f"--output: '{args.output}' holds other files ('{strangers[0]}'): give another name")
    if args.output.exists() and not args.overwrite and (args.output.is_file() or contents(args.output)):
        raise UserError(f"--output: '{args.output}' exists: give --overwrite to replace it, or another name")
    if args.pack_tokens is not None and args.pack_tokens < 1:
        raise UserError(f"--pack_tokens {args.pack_tokens}: give at least 1")
    if args.device is not None and env.world_size() > 1:
        raise UserError("--device: under a launcher every rank takes its own: leave it out")
    if os.path.exists(args.input) and not (os.path.isfile(args.input) or os.path.isdir(args.input)):
        raise UserError(f"--input: '{args.input}' is no file of lines that can be read twice: write it to one")
    return recognise(str(args.model))


def key_of(args: argparse.Namespace, model: Recognised, digest: str, dtype: object) -> str:
    """Equal where an interrupted run may go on: the same lines, model and options, in the same precision."""
    facts = [digest, model.facts(), args.dim, str(dtype), args.skip_broken]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()


@exit_on_user_error()
def main() -> int:
    env.adopt_launcher()
    args = arguments()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    check_versions()
    model = check(args)
    import torch  # imports take seconds; a typo in the command line should not

    from muco_ds.models.device import device_of
    from muco_ds.models.embedder import Embedder
    from muco_ds.models.encode_file import Output, encode_file
    from muco_ds.models.item_files import ItemFiles

    device = env.start() if env.world_size() > 1 else device_of(args.device)
    items = None

    def read() -> None:
        nonlocal items
        items = ItemFiles(args.input, args.images, args.output)
        items.check(headers=not args.skip_broken, progress=True)

    env.on_main(read)
    items = env.from_main(items)
    assert items is not None
    with env.agreement():
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, None: None}[args.dtype]
        embedder = Embedder.from_pretrained(str(args.model), device=device, dtype=dtype)
        dim = embedder.check_dim(args.dim)
    output = Output(args.output, args.format)
    report = encode_file(
        embedder,
        items,
        output,
        key=key_of(args, model, items.digest, next(embedder.parameters()).dtype),
        device=next(embedder.parameters()).device,
        pack_tokens=args.pack_tokens,
        dim=dim,
        skip_broken=args.skip_broken,
    )
    if env.is_main():
        if report["broken"]:
            print(f"{report['broken']} lines could not be used; their rows are zero: see {output.broken}")
        print(f"{report['rows']} x {dim} written to {args.output}")
    env.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
