"""What is mined: the questions of a data set and the distinct targets of several, as numbers; texts are read again.

Shape suffixes: N turns of the usable rows of a data set, Q those of the data set that is mined for, R its usable rows,
C distinct targets.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from muco_ds.data.index import stable_hash, target_hash
from muco_ds.data.readers import IMAGE_MARK, M3TReader, RowError
from muco_ds.data.schema import Dialogue
from muco_ds.errors import UserError


@dataclass(frozen=True)
class Turns:
    """Every turn of a data set's usable rows, in order, and why the other rows can't be used."""

    reader: M3TReader
    row_N: np.ndarray  # int64
    place_N: np.ndarray  # int64: within the row
    query_N: np.ndarray  # int64: hash of the question's pictures, or of its text where there are none
    target_N: np.ndarray  # int64: target hash
    writable_N: np.ndarray  # bool: columns of negatives have room for one picture each
    bad_rows: dict[int, str]

    @classmethod
    def of(cls, reader: M3TReader, *, progress: bool) -> Turns:
        """Read all rows once. Raises UserError when none is usable."""
        columns: list[tuple[int, int, int, int, bool]] = []
        parts: list[np.ndarray] = []
        bad_rows: dict[int, str] = {}
        for row in tqdm(range(len(reader)), desc="reading", unit="row", disable=not progress):
            try:
                record = reader.record(row)
            except RowError as error:
                bad_rows[row] = str(error)
                continue
            pictures = "\n".join(record.query_images)
            for place, turn in enumerate(record.turns):
                # What answers another question about the picture is masked in the batch (same image) and no negative.
                asked = stable_hash(pictures or turn.questions[0].casefold())
                answer = target_hash(turn.target, record.target_images)
                columns.append((row, place, asked, answer, len(record.target_images) < 2))
            if len(columns) >= 65536:  # as tuples they take ten times the memory
                parts.append(np.array(columns, np.int64))
                columns = []
        parts.append(np.array(columns, np.int64).reshape(-1, 5))
        row_N, place_N, query_N, target_N, writable_N = np.concatenate(parts).T
        if not len(row_N):
            row, reason = next(iter(bad_rows.items()))
            raise UserError(f"{reader.files[0]}: no usable row; row {row}: {reason}")
        return cls(reader, row_N, place_N, query_N, target_N, writable_N.astype(bool), bad_rows)

    def rows(self) -> np.ndarray:
        """Rows that can be used: int64 [R]."""
        return np.unique(self.row_N)

    def queries(self, chunk: int) -> Iterator[list[Dialogue]]:
        """Each usable row's questions, first paraphrases, as one dialogue of isolated turns; `chunk` rows at a time."""
        rows_R = self.rows()
        for start in range(0, len(rows_R), chunk):
            records = [self.reader.record(row) for row in rows_R[start : start + chunk].tolist()]
            yield [Dialogue(tuple(turn.questions[0] for turn in r.turns), r.query_images) for r in records]


@dataclass(frozen=True)
class Corpus:
    """Distinct targets, by target hash, in the order in which they are first met."""

    readers: list[M3TReader]
    reader_C: np.ndarray  # int64: which of the readers
    row_C: np.ndarray
    place_C: np.ndarray
    writable_C: np.ndarray

    @classmethod
    def of(cls, sources: list[Turns]) -> tuple[Corpus, np.ndarray]:
        """The corpus of several data sets, and for each turn of the first its own target in it: int64 [Q].

        Raises:
            UserError: fewer than two targets.
        """
        hashes_N = np.concatenate([turns.target_N for turns in sources])
        _, first_C, which_N = np.unique(hashes_N, return_index=True, return_inverse=True)
        if len(first_C) < 2:
            raise UserError(
                f"{sources[0].reader.files[0]}: all targets are the same, so there is no wrong one: "
                "add a corpus of targets (--corpus) or data"
            )
        order_C = np.argsort(first_C)
        place_of_C = np.empty_like(order_C)
        place_of_C[order_C] = np.arange(len(order_C))
        first_C = first_C[order_C]
        reader_N = np.repeat(np.arange(len(sources)), [len(turns.row_N) for turns in sources])
        corpus = cls(
            [turns.reader for turns in sources],
            reader_N[first_C],
            *(
                np.concatenate([getattr(turns, name) for turns in sources])[first_C]
                for name in ("row_N", "place_N", "writable_N")
            ),
        )
        return corpus, place_of_C[which_N[: len(sources[0].row_N)]]

    def __len__(self) -> int:
        return len(self.row_C)

    def targets(self, chunk: int) -> Iterator[list[Dialogue]]:
        """The targets, `chunk` at a time."""
        for start in range(0, len(self), chunk):
            yield [self.target(i) for i in range(start, min(start + chunk, len(self)))]

    def target(self, i: int) -> Dialogue:
        """A target: its text and pictures."""
        record = self.readers[self.reader_C[i]].record(int(self.row_C[i]))
        return Dialogue((record.turns[self.place_C[i]].target,), record.target_images)

    def negative(self, i: int) -> tuple[str, str]:
        """A target as an entry of neg_text and one of neg_image_path ('' = no picture)."""
        target = self.target(i)
        text, pictures = str(target.turns[0]), [str(path) for path in target.images]
        if not pictures:
            return text, ""
        return IMAGE_MARK + text, os.path.relpath(pictures[0], self.readers[self.reader_C[i]].images)
