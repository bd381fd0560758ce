"""Several data sets as one: their rows one after the other, their length indices put together on disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np

from muco_ds.data import draws
from muco_ds.data.index import Index, Part, TableWriter, load_index, publish_index, seen_index, writing_index
from muco_ds.data.readers import SourceReader
from muco_ds.data.schema import Record

_CHUNK = 2**20


class JoinedReader:
    """Readers as one; row numbers go on from one to the next."""

    def __init__(self, readers: Sequence[SourceReader]) -> None:
        self.readers = list(readers)
        self._ends = list(accumulate(map(len, readers)))

    def __len__(self) -> int:
        return self._ends[-1]

    def record(self, row: int) -> Record:
        """The row as a Record. Raises RowError when it can't be used."""
        which = bisect_right(self._ends, row)
        start = self._ends[which - 1] if which else 0
        return replace(self.readers[which].record(row - start), row=row)


def join_indices(
    parts: Sequence[Index], readers: Sequence[SourceReader], folder: str | None, *, builder: bool
) -> Index:
    """One index over several data sets, written once like theirs and memory-mapped: millions of rows cost no memory.

    Args:
        folder: where indices live; default beside the index of the first data set.
        builder: as in `open_index`.
    Raises:
        UserError: the folder can't be written, or what was built is not seen here.
    """
    # By identity, not by folder: a part that was built anew holds other rows under the same name.
    name = hashlib.sha256("\n".join(part.identity for part in parts).encode()).hexdigest()[:20]
    path = (Path(folder) if folder else parts[0].folder.parent) / f"joined_{name}"
    if builder and not (path / "meta.json").exists():
        with writing_index(path):
            _write(parts, readers, path)
            _remove_outdated(path)
    index = load_index(seen_index(path))
    assert len(index) == sum(map(len, parts)), (index.folder, len(index))
    samples = accumulate(map(len, parts))
    first_rows = [0, *accumulate(map(len, readers))]
    named = tuple(Part(reader.key, end, row) for reader, end, row in zip(readers, samples, first_rows, strict=False))
    return replace(index, parts=named)


def _write(parts: Sequence[Index], readers: Sequence[SourceReader], path: Path) -> None:
    work = path.with_name(f"{path.name}.tmp{os.getpid()}")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    first_row = 0
    with TableWriter(work) as writer:
        for which, (part, reader) in enumerate(zip(parts, readers, strict=True)):
            writer.begin_part()
            for name, table in part.tables().items():
                for values in _chunks(table):
                    if name == "samples":
                        values["row"] += first_row
                        # A row without a picture is known by its number, which rows of other data sets have too.
                        alone = values["query_images"] == 0
                        renamed = draws.draw_u64(0, which, values["image_id"][alone], draws.MIXTURE)
                        values["image_id"][alone] = (renamed >> np.uint64(1)).astype(np.int64)
                    writer.append(name, values)
            first_row += len(reader)
    publish_index(
        work,
        path,
        files=[file for reader in readers for file in reader.files],
        rows=first_row,
        usable=sum(map(len, parts)),
        bad_rows=sum(part.bad_rows for part in parts),
        uncaptioned=sum(part.uncaptioned for part in parts),
        parts=[str(part.folder) for part in parts],
    )


def _remove_outdated(path: Path) -> None:
    """Remove joins of the same parts as they were before they were built anew."""
    mine = json.loads((path / "meta.json").read_text())["parts"]
    for other in path.parent.glob("joined_*/meta.json"):
        if other.parent != path and json.loads(other.read_text()).get("parts") == mine:
            shutil.rmtree(other.parent, ignore_errors=True)


def _chunks(values: np.ndarray) -> Iterator[np.ndarray]:
    for start, stop in pairwise([*range(0, len(values), _CHUNK), len(values)]):
        yield np.array(values[start:stop])
