#!/usr/bin/env python3
"""Make miniature benchmarks of your own rows, in the layouts of MMEB and M-BEIR, to try an evaluation with.

    python tools/make_miniatures.py --data demo/data/test.parquet --output demo/benchmarks

reads rows in M3T's columns and writes OUTPUT/mmeb and OUTPUT/mbeir: the files and folders of the publications, with
some of their data sets. The scores say nothing about the benchmarks.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from muco_ds.data.miniatures import write_miniatures
from muco_ds.data.readers import M3TReader, RowError
from muco_ds.errors import UserError, exit_on_user_error


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="parquet file, folder or glob with M3T's columns")
    parser.add_argument("--images", help="folder the image paths start from; default: `images` beside the data")
    parser.add_argument("--output", required=True, type=Path, help="new folder")
    parser.add_argument("--rows", type=int, help="only the first rows")
    return parser.parse_args()


@exit_on_user_error()
def main() -> int:
    args = arguments()
    if args.output.exists() and not (args.output.is_dir() and not any(args.output.iterdir())):
        raise UserError(f"--output: '{args.output}' is no empty folder: give another name")
    if args.rows is not None and args.rows < 1:
        raise UserError(f"--rows {args.rows}: give at least 1")
    reader = M3TReader(args.data, args.images or str(Path(args.data).parent / "images"), "--data")
    records, left_out = [], 0
    for row in range(len(reader))[: args.rows]:
        try:
            records.append(reader.record(row))
        except RowError:
            left_out += 1
    if not any(record.query_images for record in records):
        raise UserError(f"--data: no row of '{args.data}' is usable and has a picture")
    try:
        write_miniatures(records, args.output)
    except OSError as error:
        raise UserError(f"--output: can't write '{args.output}' ({error})") from error
    print(f"{args.output}: mmeb and mbeir written of {len(records)} rows, {left_out} left out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
