"""Rows with their negatives as columns, in a file that appears whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from muco_ds.data.readers import M3TReader
from muco_ds.errors import UserError

_LIST = pa.list_(pa.string())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; what is there takes `path`'s place if the body succeeds, else it is removed.

    Raises:
        UserError: the folder can't be written.
    """
    work = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        yield work
        with open(work, "rb") as file:
            os.fsync(file.fileno())
        os.replace(work, path)
    except OSError as error:
        raise UserError(f"can't write '{path}' ({error.strerror or error})") from error
    finally:
        work.unlink(missing_ok=True)


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
            writer = writer or pq.ParquetWriter(path, table.schema)
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()
