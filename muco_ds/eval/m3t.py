"""Precision@1 on rows in M3T's columns: which of all distinct targets answers this question about this picture?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from muco_ds.data.collator import Packer
from muco_ds.data.images import ImageError, read_size
from muco_ds.data.readers import M3TReader, RowError
from muco_ds.data.schema import Dialogue, PackedBatch, Record
from muco_ds.errors import UserError
from muco_ds.eval.retrieval import Ranking, precision_at_1, rank_candidates
from muco_ds.models.encode import encode_dialogues


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

    def rank(
        self,
        model: Callable[[PackedBatch], torch.Tensor],
        packer: Packer,
        *,
        pack_tokens: int,
        device: torch.device,
        progress: bool,
    ) -> Ranking:
        """Encode both sides, on all ranks, and rank. Collective."""
        query_QD, candidate_CD = (
            encode_dialogues(
                model,
                packer,
                side,
                pack_tokens=pack_tokens,
                device=device,
                shared=True,
                progress=name if progress else None,
            )
            for name, side in (("queries", self.queries), ("candidates", self.candidates))
        )
        return rank_candidates(query_QD, candidate_CD, torch.tensor(self.answers), top=3)

    def results(self, ranking: Ranking) -> dict[str, dict[str, float | int]]:
        return precision_at_1(ranking.correct_Q, self.kinds, len(self.candidates))


def _check_header(path: str) -> None:
    try:
        read_size(path)
    except ImageError as error:
        raise ImageError(f"picture {path}: {error}") from error
