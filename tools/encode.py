#!/usr/bin/env python3
"""Embed a file of items: texts, pictures, both, or several questions about one picture.

    python tools/encode.py --model DIR --input items.jsonl --output emb.npy

Each line of the input is one object with any keys of "text", "image" (a path or a list of them) and "instruction",
and gives one row of emb.npy: float32, unit length, in the order of the lines. A line with "questions", a list, in
place of "text" gives a row for each; the picture is then encoded once. Where lines have such, emb.npy.rows.npy says
which rows are whose: those of line i, counted from 0, are emb[rows[i]:rows[i + 1]]. Lines with the same picture near
each other share it in any case.

All lines and picture headers are read first, so that a mistake is found at once. Ended before it is done, the same
command goes on. Also under deepspeed, torchrun and srun: every rank encodes, rank 0 writes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
from pathlib import Path

from muco_ds.distributed import env
from muco_ds.errors import UserError, exit_on_user_error
from muco_ds.files import folder_facts
from muco_ds.models.folder import read_settings

DTYPES = ("fp32", "bf16", "fp16")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, help="folder written by tools/convert_ckpt.py")
    parser.add_argument("--input", required=True, type=Path, help="items, one JSON object a line")
    parser.add_argument("--output", required=True, type=Path, help=".npy file to write")
    parser.add_argument("--images", type=Path, help="folder the picture paths start from; default: that of the input")
    parser.add_argument("--dim", type=int, help="the first so many components alone, at unit length again")
    parser.add_argument("--dtype", choices=DTYPES, help="of the model; default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--device", help="default: the GPU if there is one, under a launcher each rank's own")
    parser.add_argument("--pack_tokens", type=int, help="token budget of one forward; default: by the device")
    parser.add_argument("--skip_broken", action="store_true", help="leave lines out whose picture can't be used")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it is there")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    return parser.parse_args()


def check(args: argparse.Namespace) -> None:
    """What can be said before anything is read."""
    if args.output.suffix != ".npy" or args.output.is_dir():
        raise UserError(f"--output: '{args.output}' is no name of a file of embeddings: end it in .npy")
    if args.output.exists() and not args.overwrite:
        raise UserError(f"--output: '{args.output}' exists: give --overwrite to replace it, or another name")
    if args.pack_tokens is not None and args.pack_tokens < 1:
        raise UserError(f"--pack_tokens {args.pack_tokens}: give at least 1")
    if args.device is not None and env.world_size() > 1:
        raise UserError("--device: under a launcher every rank takes its own: leave it out")
    if args.input.exists() and not args.input.is_file():
        raise UserError(f"--input: '{args.input}' is no file of lines that can be read twice: write it to one")
    read_settings(str(args.model))


def key_of(args: argparse.Namespace, digest: str, dtype: object) -> str:
    """Equal where an interrupted run may go on: the same lines, model and options, in the same precision."""
    facts = [digest, str(args.images), folder_facts(args.model), args.dim, str(dtype), args.skip_broken]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()


@exit_on_user_error()
def main() -> int:
    env.adopt_launcher()
    args = arguments()
    check(args)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    import torch  # imports take seconds; a typo in the command line should not

    from muco_ds.models.embedder import Embedder
    from muco_ds.models.encode_file import ItemFile, encode_file

    if args.device is not None and args.device.split(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"--device {args.device}: give cpu, cuda or cuda:N")
    if args.device is not None and args.device.startswith("cuda"):
        number = args.device.partition(":")[2] or "0"
        if not number.isdigit() or int(number) >= torch.cuda.device_count():
            raise UserError(f"--device {args.device}: this machine has {torch.cuda.device_count()} CUDA devices")
    device = env.start() if env.world_size() > 1 else args.device
    items = ItemFile(args.input, args.images or args.input.parent)
    found = {}

    def read() -> None:
        found["checked"] = items.check(headers=not args.skip_broken, progress=True)

    env.on_main(read)
    checked = env.from_main(found.get("checked"))
    with env.agreement():
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, None: None}[args.dtype]
        embedder = Embedder.from_pretrained(str(args.model), device=device, dtype=dtype)
        dim = embedder.check_dim(args.dim)
    report = encode_file(
        embedder,
        items,
        checked,
        args.output,
        key=key_of(args, checked.digest, next(embedder.parameters()).dtype),
        device=next(embedder.parameters()).device,
        pack_tokens=args.pack_tokens,
        dim=dim,
        skip_broken=args.skip_broken,
    )
    if env.is_main():
        if report["found"]:
            print(f"{report['found']} lines were there from an earlier run")
        if report["broken"]:
            print(f"{report['broken']} lines could not be used; their rows are zero: see {args.output}.broken.jsonl")
        print(f"{report['rows']} x {dim} written to {args.output}")
    env.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
