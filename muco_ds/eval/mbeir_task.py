"""Queries of a cell of M-BEIR: under their instructions, with their right candidates among those that are searched.

Shape suffixes: Q queries, P pairs of a query and a right candidate, C all candidates of a pool.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from muco_ds.data.draws import INSTRUCTION, POSITIVE, draw_u64
from muco_ds.data.schema import Dialogue
from muco_ds.distributed import env
from muco_ds.errors import UserError
from muco_ds.eval.mbeir_files import PoolFile, Query, Relevance, formatted
from muco_ds.eval.recall import Answers

log = logging.getLogger(__name__)

Instructions = Mapping[tuple[int, str, str], Sequence[str]]


@dataclass(frozen=True)
class Queries:
    """Source: a dialogue of one turn for each query."""

    all: list[Dialogue]
    names: list[str]

    @property
    def rows(self) -> int:
        return len(self.all)

    def __len__(self) -> int:
        return len(self.all)

    def name(self, line: int) -> str:
        return self.names[line]

    def dialogues(self, start: int, stop: int) -> list[Dialogue]:
        return self.all[start:stop]

    @property
    def key(self) -> str:
        """Equal where the dialogues are."""
        return hashlib.blake2b(repr(self.all).encode(), digest_size=16).hexdigest()


def instructed(asked: Asked, pools: Sequence[PoolFile], prompts: Instructions, seed: int) -> Queries:
    """Each query behind one of the prompts for its data set, its modality and that of its candidate.

    Both the prompt and the right candidate whose modality counts are drawn by (seed, query), so that neither the order
    nor the number of queries matters.

    Args:
        pools: the first one that has a candidate tells its modality.
    Raises:
        UserError: there is no prompt for a query.
    """
    numbers_Q = np.array([query.number for query in asked.queries])
    prompt_Q, positive_Q = (draw_u64(seed, 0, numbers_Q, purpose) for purpose in (INSTRUCTION, POSITIVE))
    dialogues = []
    for query, prompt, positive in zip(asked.queries, prompt_Q.tolist(), positive_Q.tolist(), strict=True):
        places = _places(query.positives, pools) or _places(asked.right[query.number], pools)
        pool, row = places[positive % len(places)]
        candidate = pool.modality(row)
        choice = prompts.get((query.dataset, query.modality, candidate))
        if not choice:
            raise UserError(
                f"{query.where}: query_instructions.tsv has no prompt for data set {query.dataset}, query modality "
                f"'{query.modality}', candidate modality '{candidate}'"
            )
        text = formatted(f"{formatted(choice[prompt % len(choice)])} {query.text or ''}")
        dialogues.append(Dialogue((text,), query.images))
    return Queries(dialogues, [query.where for query in asked.queries])


def _places(numbers: Sequence[int], pools: Sequence[PoolFile]) -> list[tuple[PoolFile, int]]:
    found = [[(pool, row) for pool in pools if (row := pool.find(number)) is not None] for number in numbers]
    return [places[0] for places in found if places]


@dataclass(frozen=True)
class Asked:
    """Queries with a right candidate in a pool, the numbers of their right candidates there, and what was left out."""

    queries: list[Query]
    right: dict[int, list[int]]
    left_out: int
    absent: int  # right candidates that the pool has not

    @classmethod
    def of(cls, queries: list[Query], relevance: Relevance, number_C: np.ndarray, pool: Path, *, part: bool) -> Asked:
        """Put together what the files say.

        Args:
            number_C: of the candidates of `pool`.
            part: `queries` are not all of the file, the qrels have others too.
        Raises:
            UserError: nothing is left.
        """
        right: dict[int, list[int]] = {query.number: [] for query in queries}
        known_P = np.isin(relevance.query_P, list(right))
        absent_P = known_P & ~np.isin(relevance.candidate_P, number_C)
        if not part:
            _warn(relevance, ~known_P, "the query file has no such query")
        _warn(relevance, absent_P, f"{pool} has no such candidate")
        for i in np.flatnonzero(known_P & ~absent_P).tolist():
            right[int(relevance.query_P[i])].append(int(relevance.candidate_P[i]))
        kept = [query for query in queries if right[query.number]]
        if not kept:
            raise UserError(f"{relevance.path}: no query has a right candidate in {pool}: download both again")
        return cls(kept, right, len(queries) - len(kept), int(absent_P.sum()))

    def answers(self, number_C: np.ndarray, usable_Q: np.ndarray) -> Answers:
        """Places of the right candidates among `number_C`, of usable queries, which count from 0. Copies are right too.

        Args:
            usable_Q: bool, of `queries`.
        """
        order_C = np.argsort(number_C, kind="stable")
        sorted_C = number_C[order_C]
        query_P, candidate_P = [], []
        kept = [query for query, usable in zip(self.queries, usable_Q.tolist(), strict=True) if usable]
        for q, query in enumerate(kept):
            numbers = np.unique(self.right[query.number])
            first, end = (np.searchsorted(sorted_C, numbers, side=side) for side in ("left", "right"))
            for a, b in zip(first.tolist(), end.tolist(), strict=True):
                query_P += [q] * (b - a)
                candidate_P += order_C[a:b].tolist()
        return Answers(np.array(query_P, np.int64), np.array(candidate_P, np.int64))


def _warn(relevance: Relevance, bad_P: np.ndarray, problem: str) -> None:
    if bad_P.any() and env.is_main():
        more = f"; {int(bad_P.sum()) - 1} more such lines" if bad_P.sum() > 1 else ""
        log.warning("%s: line %d: %s%s", relevance.path, relevance.line_P[np.argmax(bad_P)], problem, more)
