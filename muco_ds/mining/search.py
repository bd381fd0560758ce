"""Each query's nearest wrong targets, by exact search in bounded memory, without likely false negatives.

Positive-aware threshold: a candidate nearly as near as the query's own target is likely right as well, and is dropped
(NV-Retriever, arXiv 2407.15831, TopK-PercPos).

Shape suffixes: Q queries of a block, k candidates of a query, R rows of the data, C targets, D embedding size,
M (row, candidate) pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from tqdm import tqdm

from muco_ds.data.stages.base import ragged
from muco_ds.mining.vectors import Vectors
from muco_ds.search import MEMORY, Nearest

_MAX_QUERIES = 16384  # their candidates are held several times over


@dataclass(frozen=True)
class Rule:
    """Which candidates become negatives.

    Args:
        negatives: at most so many of a row.
        max_share: a candidate's score is below this share of the own target's. Below a negative score it is as far
            away: score < own - (1 - max_share) * |own|.
        skip: so many of each query's nearest wrong targets are left out.
        depth: so many of each query's nearest targets are looked at.
    """

    negatives: int
    max_share: float = 0.95
    skip: int = 0
    depth: int = 100


@dataclass(frozen=True)
class Asked:
    """Queries and what is known of them; a row's queries follow each other."""

    row_Q: np.ndarray  # int64, ascending: which row, 0 .. R - 1
    query_Q: np.ndarray  # int64: equal for queries about one picture, or of equal text: none's target is wrong
    answer_Q: np.ndarray  # int64: own target
    usable_Q: np.ndarray  # bool
    usable_C: np.ndarray  # bool: may become a negative

    @property
    def rows(self) -> int:
        return int(self.row_Q[-1]) + 1


@dataclass
class Mined:
    """Negatives of each row, nearest first, -1 = none: int64 [R, negatives]. Counts are of pairs (query, target)."""

    negatives_Rn: np.ndarray
    looked_at: int = 0
    right: int = 0  # targets of the row, or of a query that counts as equal
    skipped: int = 0
    too_near: int = 0
    positive_sum: float = 0.0
    queries: int = 0
    negative_sum: float = 0.0

    def filled(self) -> np.ndarray:
        """How many negatives each row got: int64 [R]."""
        return (self.negatives_Rn >= 0).sum(axis=1)


def mine(
    queries: Vectors,
    corpus: Vectors,
    asked: Asked,
    rule: Rule,
    *,
    device: torch.device,
    memory: int = MEMORY,
    progress: bool = False,
) -> Mined:
    """Negatives of every row. `memory`: bytes of queries, and of targets, that are in memory at a time."""
    mined = Mined(np.full((asked.rows, rule.negatives), -1, np.int64))
    known = _Known.of(asked, len(corpus))
    width = max(1, memory // (4 * queries.width))
    bounds = _blocks(asked.row_Q, min(width, _MAX_QUERIES))
    with tqdm(total=len(asked.row_Q), desc="searching", unit="query", disable=not progress) as bar:
        for start, stop in pairwise(bounds):
            answer_Q = asked.answer_Q[start:stop]
            found = nearest(queries.read(start, stop), corpus, answer_Q, rule.depth, shard=width, device=device)
            _choose(found, slice(start, stop), asked, known, rule, mined)
            bar.update(stop - start)
    return mined


@dataclass(frozen=True)
class Found:
    """Nearest targets of queries, best first, and the score of each one's own target."""

    score_Qk: np.ndarray
    index_Qk: np.ndarray
    own_Q: np.ndarray


def nearest(
    query_QD: np.ndarray, corpus: Vectors, answer_Q: np.ndarray, depth: int, *, shard: int, device: torch.device
) -> Found:
    """Exact search by inner product, `shard` targets at a time; equal scores in the corpus' order."""
    found = Nearest(torch.from_numpy(query_QD).to(device), depth)
    own_Q = np.empty(len(query_QD), np.float32)
    for start in range(0, len(corpus), shard):
        target_CD = corpus.read(start, min(start + shard, len(corpus)))
        own = np.flatnonzero((answer_Q >= start) & (answer_Q < start + len(target_CD)))
        for part in np.array_split(own, -(-len(own) // 1024) or 1):
            own_Q[part] = np.einsum("qd,qd->q", query_QD[part], target_CD[answer_Q[part] - start])
        found.add(torch.from_numpy(target_CD).to(device))
    return Found(found.score_Qk.cpu().numpy(), found.index_Qk.cpu().numpy(), own_Q)


@dataclass(frozen=True)
class _Known:
    """Right targets, as sorted keys `owner * C + target`, of each row and of each distinct query."""

    targets: int
    row_Q: np.ndarray
    group_Q: np.ndarray
    of_rows: np.ndarray
    of_queries: np.ndarray

    @classmethod
    def of(cls, asked: Asked, targets: int) -> _Known:
        group_Q = np.unique(asked.query_Q, return_inverse=True)[1]
        keys = (np.unique(owner_Q * targets + asked.answer_Q) for owner_Q in (asked.row_Q, group_Q))
        return cls(targets, asked.row_Q, group_Q, *keys)

    def right(self, block: slice, index_Qk: np.ndarray) -> np.ndarray:
        """Whether each candidate is a target of the query's row, or of a query that counts as equal: bool [Q, k]."""
        owners = (self.row_Q[block], self.of_rows), (self.group_Q[block], self.of_queries)
        found = [_member(owner_Q[:, None] * self.targets + index_Qk, keys) for owner_Q, keys in owners]
        return found[0] | found[1]

    def right_for_row(self, row_M: np.ndarray, index_M: np.ndarray) -> np.ndarray:
        """Whether each candidate is a target of a query that counts as equal to one of the row's: bool [M]."""
        first_M = np.searchsorted(self.row_Q, row_M)
        owner, _, query = ragged(first_M, np.searchsorted(self.row_Q, row_M, side="right") - first_M)
        right = _member(self.group_Q[query] * self.targets + index_M[owner], self.of_queries)
        return np.bincount(owner[right], minlength=len(row_M)) > 0


def _choose(found: Found, block: slice, asked: Asked, known: _Known, rule: Rule, mined: Mined) -> None:
    """Put the negatives of a block's rows into `mined`, and count."""
    row_Q, usable_Q = asked.row_Q[block], asked.usable_Q[block]
    candidate_Qk = usable_Q[:, None] & asked.usable_C[found.index_Qk]
    right_Qk = candidate_Qk & known.right(block, found.index_Qk)
    wrong_Qk = candidate_Qk & ~right_Qk
    skipped_Qk = wrong_Qk & (np.cumsum(wrong_Qk, axis=1) <= rule.skip)
    with np.errstate(invalid="ignore"):  # no limit (inf) of a score of zero is none either
        limit_Q = found.own_Q - (1 - rule.max_share) * np.abs(found.own_Q)
    near_Qk = wrong_Qk & ~skipped_Qk & (found.score_Qk >= limit_Q[:, None])
    mined.looked_at += int(candidate_Qk.sum())
    mined.right += int(right_Qk.sum())
    mined.skipped += int(skipped_Qk.sum())
    mined.too_near += int(near_Qk.sum())
    mined.queries += int(usable_Q.sum())
    mined.positive_sum += float(found.own_Q[usable_Q].sum(dtype=np.float64))

    at_Q, at_k = np.nonzero(candidate_Qk)
    row_M, index_M, score_M = row_Q[at_Q], found.index_Qk[at_Q, at_k], found.score_Qk[at_Q, at_k]
    # A negative serves all turns of its row: one left out for a turn is left out for the row.
    out_M = (right_Qk | skipped_Qk | near_Qk)[at_Q, at_k]
    order_M = np.lexsort((-score_M, ~out_M, index_M, row_M))
    row_M, index_M, score_M, out_M = (values[order_M] for values in (row_M, index_M, score_M, out_M))
    first_M = np.diff(row_M * known.targets + index_M, prepend=-1) != 0
    kept_M = first_M & ~out_M
    kept_M[kept_M] = ~known.right_for_row(row_M[kept_M], index_M[kept_M])
    row_M, index_M, score_M = row_M[kept_M], index_M[kept_M], score_M[kept_M]
    order_M = np.lexsort((index_M, -score_M, row_M))
    row_M, index_M, score_M = row_M[order_M], index_M[order_M], score_M[order_M]
    lane_M = np.arange(len(row_M)) - np.searchsorted(row_M, row_M)
    taken_M = lane_M < rule.negatives
    mined.negatives_Rn[row_M[taken_M], lane_M[taken_M]] = index_M[taken_M]
    mined.negative_sum += float(score_M[taken_M].sum(dtype=np.float64))


def _blocks(row_Q: np.ndarray, size: int) -> list[int]:
    """Bounds of blocks of about `size` queries that leave each row's together."""
    first_R = np.flatnonzero(np.diff(row_Q, prepend=-1))
    starts = np.searchsorted(first_R, np.arange(0, len(row_Q), size))
    return [*np.unique(first_R[starts[starts < len(first_R)]]).tolist(), len(row_Q)]


def _member(values: np.ndarray, sorted_keys: np.ndarray) -> np.ndarray:
    place = np.searchsorted(sorted_keys, values)
    return sorted_keys[np.minimum(place, len(sorted_keys) - 1)] == values
