"""Precision@1 on held-out rows in M3T's columns: which of all distinct targets answers this question about this picture?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from muco_ds.data.collator import Packer
from muco_ds.data.readers import M3TReader
from muco_ds.data.schema import Dialogue, PackedBatch, Record
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
    def from_reader(cls, reader: M3TReader, rows: list[int]) -> M3TTask:
        return cls.from_records([reader.record(row) for row in rows])

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
                model, packer, side, pack_tokens=pack_tokens, device=device, progress=name if progress else None
            )
            for name, side in (("queries", self.queries), ("candidates", self.candidates))
        )
        return rank_candidates(query_QD, candidate_CD, torch.tensor(self.answers), top=3)

    def results(self, ranking: Ranking) -> dict[str, dict[str, float | int]]:
        return precision_at_1(ranking.correct_Q, self.kinds, len(self.candidates))
