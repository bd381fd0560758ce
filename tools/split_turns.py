#!/usr/bin/env python3
"""Make single pairs, which fine-tuning takes, of rows with several turns.

    python tools/split_turns.py --data M3T.parquet --output PAIRS.parquet [--images DIR]

writes a pair for each turn of each row, with one of the question's paraphrases, the row's pictures and its
qry_sentence, in the columns of MMEB-train; negatives are left out (tools/mine_negatives.py finds some). Rows that can't
be used are counted and left out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from muco_ds.data.readers import IMAGE_MARK, M3TReader, RowError, caption_of
from muco_ds.errors import UserError, exit_on_user_error
from muco_ds.files import replacing

COLUMNS = ("qry", "qry_image_path", "qry_sentence", "pos_text", "pos_image_path", "pos_sentence")
SCHEMA = pa.schema([(name, pa.string()) for name in COLUMNS])
SHOWN_BAD_ROWS = 5


def pairs_of(reader: M3TReader, row: int, data: dict[str, Any]) -> Iterator[dict[str, str]]:
    """The pairs of a row. Raises RowError when it can't be used."""
    record = reader.record(row)
    query_path, target_path = _path(data, "qry_image_path"), _path(data, "pos_image_path")
    for place, turn in enumerate(record.turns):
        question = turn.questions[(row + place) % len(turn.questions)]
        yield {
            "qry": IMAGE_MARK * bool(query_path) + question,
            "qry_image_path": query_path,
            "qry_sentence": caption_of(data.get("qry_sentence")),
            "pos_text": IMAGE_MARK * bool(target_path) + turn.target,
            "pos_image_path": target_path,
            "pos_sentence": "",
        }


def _path(data: dict[str, Any], column: str) -> str:
    value = data.get(column) or ""
    paths = [value] if isinstance(value, str) else [path for path in value if path]
    if len(paths) > 1:
        raise RowError(f"{column} holds {len(paths)} pictures: a pair has one on each side")
    return paths[0] if paths else ""


@exit_on_user_error()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="parquet file, folder or glob of rows with several turns")
    parser.add_argument("--images", help="folder the image paths start from; default: `images` beside the data")
    parser.add_argument("--output", required=True, type=Path, help="parquet file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it is there")
    args = parser.parse_args()
    if args.output.exists() and not args.overwrite:
        raise UserError(f"--output: '{args.output}' exists: give --overwrite to replace it, or another name")
    reader = M3TReader(args.data, args.images or str(Path(args.data).parent / "images"), "--data")
    row = written = 0
    bad: list[str] = []
    bar = tqdm(total=len(reader), desc="splitting", unit="row")
    with replacing(args.output) as path, bar, pq.ParquetWriter(path, SCHEMA, write_page_checksum=True) as writer:
        for table in reader.tables():
            pairs: list[dict[str, str]] = []
            for data in table.to_pylist():
                try:
                    pairs += pairs_of(reader, row, data)
                except RowError as error:
                    bad.append(f"row {row}: {error}")
                row += 1
            writer.write_table(pa.Table.from_pylist(pairs, schema=SCHEMA))
            written += len(pairs)
            bar.update(len(table))
        if not written:
            raise UserError(f"{args.data}: no usable row; {bad[0]}")
    for line in bad[:SHOWN_BAD_ROWS]:
        print(f"left out  {line}")
    print(f"rows      {row}, left out {len(bad)}\npairs     {written}\nwritten to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
