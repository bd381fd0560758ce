"""One data set of MMEB: its distinct queries and candidates, and which belong to each row.

Shape suffixes: Q queries, C candidates, R rows, B rows of a block, U candidates of a block, K of one row, N of one row
that score alike, D embedding size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from muco_ds.data.readers import RowError
from muco_ds.data.schema import Dialogue
from muco_ds.errors import UserError
from muco_ds.eval.mmeb_datasets import DATASETS
from muco_ds.eval.mmeb_files import MMEBFile, Pictures
from muco_ds.eval.mmeb_text import Composed, Wording, candidates_of, query_of

_ROWS_AT_ONCE = 16
"""Rows scored at a time: all of their candidates' embeddings are held once more."""

_NEAR = 1e-5
"""Scores of unit-length embeddings that are this near may have been rounded past each other."""


@dataclass(frozen=True)
class RankedRow:
    """A query and its candidates, each once and the right one first, by their places in the task."""

    name: str
    query: int
    candidates_K: np.ndarray  # int64


@dataclass(frozen=True)
class MMEBTask:
    """One data set: every distinct query and candidate once, and the rows that they belong to.

    `problem`: why the first of the rows that are left out is.
    """

    queries: list[Dialogue]
    candidates: list[Dialogue]
    rows: list[RankedRow]
    left_out: int = 0
    problem: str = ""

    @classmethod
    def from_file(cls, file: MMEBFile, pictures: Pictures, wording: Wording, limit: int | None) -> MMEBTask:
        """The usable rows (of the first `limit`).

        Raises:
            UserError: a file that can't be read, no usable row.
        """
        builder = _Builder(functools.cache(pictures.path), wording)
        rows, problem, left_out = [], "", 0
        dataset = DATASETS[file.name]
        for name, row in file.rows(limit):
            try:
                if isinstance(row, RowError):
                    raise row
                query = query_of(row, dataset, file.publication)
                rows.append(builder.row(name, query, list(candidates_of(row, dataset, file.publication))))
            except RowError as error:
                problem = problem or f"{name}: {error}"
                left_out += 1
        if not rows:
            raise UserError(f"no usable row; {problem}" if problem else f"{file.files[0]}: holds no rows")
        return cls(list(builder.queries), builder.candidates, rows, left_out, problem)

    def without(self, queries: Mapping[int, str], candidates: Mapping[int, str]) -> MMEBTask:
        """Without the rows of these queries and candidates (place -> why they can't be used).

        A row goes with any of its candidates: without a wrong one it would be easier than it is.

        Raises:
            UserError: no row is left.
        """
        rows, problem = [], self.problem
        broken = np.array(sorted(candidates), np.int64)
        for row in self.rows:
            bad = row.candidates_K[np.isin(row.candidates_K, broken)]
            if row.query not in queries and not len(bad):
                rows.append(row)
            else:
                problem = problem or f"{row.name}: {queries.get(row.query) or candidates[int(bad[0])]}"
        if not rows:
            raise UserError(f"no usable row; {problem}", on_every_rank=True)
        return replace(self, rows=rows, left_out=self.left_out + len(self.rows) - len(rows), problem=problem)

    def correct(self, query_QD: torch.Tensor, candidate_CD: torch.Tensor) -> torch.Tensor:
        """Bool [R]: whether the right candidate of each row beats all others, by inner product in float32."""
        correct_R = torch.zeros(len(self.rows), dtype=torch.bool)
        for start in range(0, len(self.rows), _ROWS_AT_ONCE):
            rows = self.rows[start : start + _ROWS_AT_ONCE]
            own_U, place = np.unique(np.concatenate([row.candidates_K for row in rows]), return_inverse=True)
            own_UD = candidate_CD[torch.from_numpy(own_U)].float()
            asked_BD = query_QD[[row.query for row in rows]].float()
            score_BU = asked_BD @ own_UD.T
            places = np.split(place, np.cumsum([len(row.candidates_K) for row in rows])[:-1])
            for i, place_K in enumerate(map(torch.from_numpy, places)):
                correct_R[start + i] = _first_wins(score_BU[i, place_K], place_K, own_UD, asked_BD[i])
        return correct_R


def _first_wins(score_K: torch.Tensor, place_K: torch.Tensor, own_UD: torch.Tensor, query_D: torch.Tensor) -> bool:
    """Whether the first score is the highest; where others are near, by products that round equal rows equally.

    A matrix product does not, and of a model that makes all embeddings equal some answers would then be right.
    """
    if bool((score_K[1:] > score_K[0] + _NEAR).any()):
        return False
    near_K = ~(score_K < score_K[0] - _NEAR)  # and NaN, which must not win
    score_N = (own_UD[place_K[near_K]] * query_D).sum(1)
    return bool((score_N[0] > score_N[1:]).all()) and not bool(score_N[0].isnan())


@dataclass
class _Builder:
    """Rows -> places of their queries and candidates, each distinct one kept once."""

    locate: Callable[[str], str]
    wording: Wording
    queries: dict[Dialogue, int] = field(default_factory=dict)
    candidates: list[Dialogue] = field(default_factory=list)
    places: dict[Hashable, int] = field(default_factory=dict)
    known: dict[Composed, int] = field(default_factory=dict)

    def row(self, name: str, query: Composed, candidates: list[Composed]) -> RankedRow:
        """Raises RowError before anything is kept."""
        asked = self._dialogue(query)
        if not asked.images and not asked.turns[0]:
            raise RowError("the query has neither text nor picture")
        # A thousand rows may list the same thousand candidates.
        fresh = {composed: self._dialogue(composed) for composed in candidates if composed not in self.known}
        for composed, dialogue in fresh.items():
            self.known[composed] = self._place(self.wording.key(composed, dialogue), dialogue)
        places = dict.fromkeys(self.known[composed] for composed in candidates)
        return RankedRow(name, self.queries.setdefault(asked, len(self.queries)), np.array([*places], np.int64))

    def _dialogue(self, composed: Composed) -> Dialogue:
        images = (self.locate(composed.image),) if composed.image else ()
        return Dialogue((self.wording.turn(composed),), images)

    def _place(self, key: Hashable, dialogue: Dialogue) -> int:
        if key not in self.places:
            self.places[key] = len(self.candidates)
            self.candidates.append(dialogue)
        return self.places[key]
