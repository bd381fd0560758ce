"""Files that a program writes: whole or not at all, and others beside them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from muco_ds.errors import UserError


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


def beside(path: Path, ending: str) -> Path:
    """The file that goes by the name of `path` and a further ending: `out.parquet.report.json`."""
    return path.with_name(f"{path.name}.{ending}")


def file_facts(path: Path) -> tuple[str, int, int]:
    """Name, size and time of a file: equal while it is the same. Raises UserError where it is not there."""
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"'{path}' can't be read ({error.strerror})") from error
    return path.name, stat.st_size, stat.st_mtime_ns
