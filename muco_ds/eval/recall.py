"""Recall of rows that need not fit in memory. Ties count against the model.

Shape suffixes: Q queries, k nearest candidates, P pairs of a query and a right candidate, C candidates of a block, B
broken candidates, D embedding size.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from muco_ds.distributed import env
from muco_ds.models.shards import Rows
from muco_ds.search import MEMORY, Nearest

TIE = 1e-6
"""Scores of unit vectors that differ by less are equal: a matrix library gives equal candidates scores that differ by
up to 2.4e-7, by their place in a block (docs/log.md)."""


@dataclass(frozen=True)
class Answers:
    """Right candidates of queries: pairs, sorted by the query's position, every query with at least one."""

    query_P: np.ndarray  # int64
    candidate_P: np.ndarray  # int64: place among all candidates

    @property
    def per_query(self) -> np.ndarray:
        """How many each query has: int64 [Q]."""
        return np.bincount(self.query_P)

    def part(self, start: int, stop: int) -> Answers:
        """Those of queries start .. stop, which then count from 0."""
        first, end = np.searchsorted(self.query_P, [start, stop])
        return Answers(self.query_P[first:end] - start, self.candidate_P[first:end])


@dataclass(frozen=True)
class Found:
    """Results of a search for the answers."""

    better_Q: dict[int, np.ndarray]
    """Size of the embedding -> how many wrong candidates score like the best right one or better, up to the depth."""
    broken: int
    """Candidates of zeros: they could not be encoded."""


def find_answers(
    query_QD: torch.Tensor,
    candidates: Rows,
    answers: Answers,
    depth: int,
    sizes: Sequence[int],
    *,
    device: torch.device,
    memory: int = MEMORY,
    progress: str | None = None,
) -> Found:
    """Search all candidates for each query's answers; the ranks share the queries. Collective.

    Args:
        query_QD: float32, the same on every rank.
        depth: wrong candidates are counted up to here.
        sizes: leading components to search by.
    """
    bounds = np.linspace(0, len(query_QD), env.world_size() + 1).astype(int)
    start, stop = bounds[env.rank() : env.rank() + 2]
    mine = answers.part(start, stop)
    # Whatever is right and whatever is wrong, among so many are `depth` wrong ones, or all.
    deep = depth + (int(mine.per_query.max()) if stop > start else 0)
    queries = {size: _unit(query_QD[start:stop].to(device), size) for size in sizes}
    nearest = {size: Nearest(query_QP, deep, ranks=env.world_size()) for size, query_QP in queries.items()}
    broken_B = _show(candidates, nearest, device, memory, progress)
    better = {size: _better(found, mine, len(candidates), broken_B, depth) for size, found in nearest.items()}
    parts = env.from_all(better)
    return Found({size: np.concatenate([part[size] for part in parts]) for size in sizes}, len(broken_B))


def _show(
    candidates: Rows, nearest: dict[int, Nearest], device: torch.device, memory: int, progress: str | None
) -> np.ndarray:
    """Add all candidates to the searches, a block at a time while the next is read; which ones are zero: int64 [B]."""
    block = max(1, memory // (4 * candidates.width))
    starts = range(0, len(candidates), block)
    broken = []
    with (
        ThreadPoolExecutor(1) as reader,
        tqdm(total=len(candidates), desc=progress, unit="row", disable=progress is None or not env.is_main()) as bar,
    ):
        ahead = reader.submit(candidates.read, 0, min(block, len(candidates)))
        for start in starts:
            target_CD = torch.from_numpy(ahead.result())
            if start + block < len(candidates):
                ahead = reader.submit(candidates.read, start + block, min(start + 2 * block, len(candidates)))
            target_CD = target_CD.to(device).float()
            broken.append((target_CD == 0).all(1).nonzero()[:, 0] + start)
            for size, search in nearest.items():
                if len(search.query_QD):
                    search.add(_unit(target_CD, size))
            bar.update(len(target_CD))
    return torch.cat(broken).cpu().numpy()


def _better(found: Nearest, answers: Answers, candidates: int, broken_B: np.ndarray, depth: int) -> np.ndarray:
    score_Qk, index_Qk = found.score_Qk.cpu().numpy(), found.index_Qk.cpu().numpy()
    score_Qk = np.where(np.isin(index_Qk, broken_B), -np.inf, score_Qk)  # zero is more than a model may give others
    keys_P = np.sort(answers.query_P * candidates + answers.candidate_P)
    right_Qk = np.isin(np.arange(len(index_Qk))[:, None] * candidates + index_Qk, keys_P)
    best_Q = np.where(right_Qk, score_Qk, -np.inf).max(axis=1, initial=-np.inf)
    better_Q = (~right_Qk & (score_Qk >= best_Q[:, None] - TIE)).sum(axis=1)
    return np.minimum(better_Q, depth)


def _unit(emb_ND: torch.Tensor, size: int) -> torch.Tensor:
    """Leading components at unit length, float32: what is stored in half precision is not quite. Zeros stay zeros."""
    return torch.nn.functional.normalize(emb_ND[:, :size].float(), dim=-1)


def recall(better_Q: np.ndarray, k: int) -> float:
    """Share of the queries with a right candidate among the best k."""
    return float((better_Q < k).mean())


def chance(per_query_Q: np.ndarray, candidates: int, k: int) -> float:
    """The recall of k candidates drawn at random: of each query's candidates so many are right."""
    wrong_Qk = candidates - per_query_Q[:, None] - np.arange(min(k, candidates))
    return float(1 - np.prod(np.maximum(wrong_Qk, 0) / (candidates - np.arange(min(k, candidates))), axis=1).mean())
