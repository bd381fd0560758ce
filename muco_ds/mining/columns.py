"""Rows with their negatives as columns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from muco_ds.data.readers import M3TReader

_LIST = pa.list_(pa.string())


def write_rows(reader: M3TReader, negatives_of: Callable[[int], list[tuple[str, str]]], path: Path) -> None:
    """All rows and columns of a data set, with neg_text and neg_image_path set anew: a list each, '' = none."""
    writer, row = None, 0
    try:
        for table in reader.tables():
            found = [negatives_of(row + i) for i in range(len(table))]
            row += len(table)
            for place, name in enumerate(("neg_text", "neg_image_path")):
                values = pa.array([[negative[place] for negative in negatives] for negatives in found], _LIST)
                at = table.schema.get_field_index(name)
                table = table.append_column(name, values) if at < 0 else table.set_column(at, name, values)
            writer = writer or pq.ParquetWriter(path, table.schema, write_page_checksum=True)
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()
