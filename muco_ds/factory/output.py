"""Finished rows as the file that training reads, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from muco_ds.files import replacing

_ROWS_AT_ONCE = 1000

SUFFIX = {"m3t": ".parquet", "conversations": ".jsonl"}


def write_m3t(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """Rows in M3T's columns as parquet, those too that it leaves empty (its own loader looks for them)."""
    from muco_ds.data.readers import IMAGE_MARK, M3T_SCHEMA  # seconds, which asking an endpoint need not wait for

    remaining = (
        {
            "qry": [[IMAGE_MARK + text for text in wordings] for wordings in row["questions"]],
            "qry_sentence": row["caption"],
            "qry_image_path": row["image"],
            "pos_text": row["answers"],
            "pos_sentence": [""] * len(row["answers"]),
            "pos_image_path": "",
            "neg_text": [""] * len(row["answers"]),
        }
        for row in rows
    )
    with replacing(path) as work, pq.ParquetWriter(work, M3T_SCHEMA, write_page_checksum=True) as writer:
        while some := list(islice(remaining, _ROWS_AT_ONCE)):
            writer.write_table(pa.Table.from_pylist(some, schema=M3T_SCHEMA))


def write_jsonl(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """One JSON line a row."""
    with replacing(path) as work, open(work, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_json(data: dict[str, Any], path: Path) -> None:
    with replacing(path) as work:
        work.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


WRITE = {"m3t": write_m3t, "conversations": write_jsonl}
