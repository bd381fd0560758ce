#!/usr/bin/env python3
"""Make conversations, which coma_compress is trained on, of M3T-style rows with several questions about a picture.

    python tools/make_conversations.py --data M3T.parquet --output OUT.jsonl [--images DIR] [--overwrite]

writes a conversation for each row, in CoMa's spelling: its questions and answers in order, one of each question's
paraphrases (drawn by row and turn, the same in every run), and the picture's path as it is, from --images. Turns
without words on one side, rows whose targets are pictures and rows that can't be used are counted and left out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from muco_ds.data.conversations import conversation
from muco_ds.data.readers import M3TReader, RowError
from muco_ds.errors import UserError, exit_on_user_error
from muco_ds.files import replacing

SHOWN_BAD_ROWS = 5


def converted(reader: M3TReader, row: int) -> tuple[dict[str, Any], int]:
    """A row's conversation, and how many of its turns are not in it. Raises RowError when it can't be used."""
    record = reader.record(row)
    if record.target_images:
        raise RowError("its targets are pictures, which are no answers")
    paths = [os.path.relpath(path, reader.images) for path in record.query_images]
    made = conversation(row, record.turns, paths)
    return made, len(record.turns) - len(made["conversations"]) // 2


@exit_on_user_error()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="parquet file, folder or glob of rows with several turns")
    parser.add_argument("--images", help="folder the image paths start from; default: `images` beside the data")
    parser.add_argument("--output", required=True, type=Path, help="file of JSON lines to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it is there")
    args = parser.parse_args()
    if args.output.suffix != ".jsonl" or args.output.is_dir():
        raise UserError(f"--output: '{args.output}' is no name of a file of JSON lines: end it in .jsonl")
    if args.output.exists() and not args.overwrite:
        raise UserError(f"--output: '{args.output}' exists: give --overwrite to replace it, or another name")
    reader = M3TReader(args.data, args.images or str(Path(args.data).parent / "images"), "--data")
    turns = left_out = 0
    bad: list[str] = []
    with replacing(args.output) as path, open(path, "w", encoding="utf-8", newline="\n") as file:
        for row in tqdm(range(len(reader)), desc="converting", unit="row"):
            try:
                made, missing = converted(reader, row)
            except RowError as error:
                bad.append(f"row {row}: {error}")
                continue
            file.write(json.dumps(made, ensure_ascii=False) + "\n")
            turns, left_out = turns + len(made["conversations"]) // 2, left_out + missing
        if not turns:
            raise UserError(f"{args.data}: no usable row; {bad[0]}")
    for line in bad[:SHOWN_BAD_ROWS]:
        print(f"left out  {line}")
    if len(bad) > SHOWN_BAD_ROWS:
        print(f"          ... {len(bad) - SHOWN_BAD_ROWS} more")
    print(f"rows      {len(reader)}, left out {len(bad)}\nturns     {turns}, left out {left_out}")
    print(f"written to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
