"""Precision@1 on rows in M3T's columns: which of all distinct targets answers this question about this picture?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from muco_ds.config_matryoshka import sizes_of
from muco_ds.data.images import ImageError, read_size
from muco_ds.data.readers import M3TReader, RowError
from muco_ds.data.schema import Dialogue, Record
from muco_ds.errors import UserError
from muco_ds.eval.encoder import Encoder
from muco_ds.eval.retrieval import Ranking, precision_at_1, rank_candidates
from muco_ds.eval.suite import Entry
from muco_ds.files import file_facts
from muco_ds.losses.matryoshka import prefix


@dataclass(frozen=True)
class M3TTask:
    """Queries: every turn of every record, first paraphrase, as if asked alone. Candidates: the distinct targets."""

    records: list[Record]
    queries: list[Dialogue]
    candidates: list[Dialogue]
    answers: list[int]
    kinds: list[int]

    @classmethod
    def from_records(cls, records: list[Record]) -> M3TTask:
        candidates: dict[tuple, int] = {}
        answers, kinds = [], []
        for record in records:
            for turn in record.turns:
                answers.append(candidates.setdefault((turn.target, record.target_images), len(candidates)))
                kinds.append(turn.kind)
        return cls(
            records=records,
            queries=[Dialogue(tuple(turn.questions[0] for turn in r.turns), r.query_images) for r in records],
            candidates=[Dialogue((text,), images) for text, images in candidates],
            answers=answers,
            kinds=kinds,
        )

    @classmethod
    def from_reader(cls, reader: M3TReader, limit: int | None = None) -> tuple[M3TTask, int]:
        """Task over the usable rows (of the first `limit`), and how many rows were left out.

        Raises:
            UserError: no row is usable.
        """
        records, problem, left_out = [], "", 0
        for row in range(len(reader) if limit is None else min(limit, len(reader))):
            try:
                record = reader.record(row)
                for path in (*record.query_images, *record.target_images):
                    _check_header(path)
                records.append(record)
            except (RowError, ImageError) as error:
                problem = problem or f"row {row}: {error}"
                left_out += 1
        if not records:
            raise UserError(f"{reader.files[0]}: no usable row; {problem}")
        return cls.from_records(records), left_out

    def questions(self) -> list[tuple[Record, str]]:
        """Record and text of each query, in the order of `answers`."""
        return [(record, turn.questions[0]) for record in self.records for turn in record.turns]

    def rank(self, encoder: Encoder) -> dict[int, Ranking]:
        """Encode both sides, on all ranks, and rank by the whole embedding and by its prefixes. Collective.

        Returns:
            size -> ranking, ascending, the whole embedding's last.
        """
        query_QD, candidate_CD = (
            encoder.encode(side, name) for name, side in (("queries", self.queries), ("candidates", self.candidates))
        )
        answer_Q = torch.tensor(self.answers)
        return {
            size: rank_candidates(prefix(query_QD, size), prefix(candidate_CD, size), answer_Q, top=3)
            for size in sizes_of(encoder.sizes, query_QD.shape[1])
        }

    def results(self, rankings: Mapping[int, Ranking]) -> dict[str, Entry]:
        """Those of `precision_at_1` for the whole embedding, and in each entry `precision@1@64` for a prefix of 64."""
        *smaller, whole = sorted(rankings)
        results, *others = (
            precision_at_1(rankings[size].correct_Q, self.kinds, len(self.candidates)) for size in (whole, *smaller)
        )
        for size, other in zip(smaller, others, strict=True):
            for name, entry in other.items():
                results[name][f"precision@1@{size}"] = entry["precision@1"]
        return results


class M3TSuite:
    """Suite: held-out rows in M3T's columns."""

    name = "m3t"
    datasets = ("m3t",)

    def __init__(self, reader: M3TReader, limit: int | None) -> None:
        self.reader, self.limit = reader, limit
        self.task, self.left_out = M3TTask.from_reader(reader, limit)

    def identity(self, dataset: str) -> Any:
        return [file_facts(Path(path)) for path in self.reader.files], self.reader.images, self.limit

    def score(self, dataset: str, encoder: Encoder) -> dict[str, Entry]:
        entries = self.task.results(self.task.rank(encoder))
        entries["overall"]["left_out"] = self.left_out
        files = ", ".join("{} ({} bytes)".format(*file_facts(Path(path))) for path in self.reader.files)
        part = "" if self.limit is None else f", first {self.limit} rows"
        return {name: {**entry, "version": f"own rows: {files}{part}"} for name, entry in entries.items()}

    def results(self, entries: Mapping[str, Entry]) -> dict[str, Entry]:
        return dict(entries)

    def report(self, results: Mapping[str, Entry], folder: Path) -> None:
        """Nothing: what the program prints says it all."""


def _check_header(path: str) -> None:
    try:
        read_size(path)
    except ImageError as error:
        raise ImageError(f"picture {path}: {error}") from error
