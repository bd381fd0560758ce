"""Precision@1 on rows in M3T's columns: which of all distinct targets answers this question about this picture?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from muco_ds.config_matryoshka import sizes_of
from muco_ds.data.collator import Packer
from muco_ds.data.images import ImageError, read_size
from muco_ds.data.readers import M3TReader, RowError
from muco_ds.data.schema import Dialogue, PackedBatch, Record
from muco_ds.errors import UserError
from muco_ds.eval.retrieval import Ranking, precision_at_1, rank_candidates
from muco_ds.losses.matryoshka import prefix
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
        sizes: Sequence[int] = (),
    ) -> dict[int, Ranking]:
        """Encode both sides, on all ranks, and rank by the whole embedding and by its prefixes of `sizes`. Collective.

        Returns:
            size -> ranking, ascending, the whole embedding's last.
        """
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
        answer_Q = torch.tensor(self.answers)
        return {
            size: rank_candidates(prefix(query_QD, size), prefix(candidate_CD, size), answer_Q, top=3)
            for size in sizes_of(sizes, query_QD.shape[1])
        }

    def results(self, rankings: Mapping[int, Ranking]) -> dict[str, dict[str, float | int]]:
        """Those of `precision_at_1` for the whole embedding, and in each entry `precision@1@64` for a prefix of 64."""
        *smaller, whole = sorted(rankings)
        results, *others = (
            precision_at_1(rankings[size].correct_Q, self.kinds, len(self.candidates)) for size in (whole, *smaller)
        )
        for size, other in zip(smaller, others, strict=True):
            for name, entry in other.items():
                results[name][f"precision@1@{size}"] = entry["precision@1"]
        return results


def _check_header(path: str) -> None:
    try:
        read_size(path)
    except ImageError as error:
        raise ImageError(f"picture {path}: {error}") from error
