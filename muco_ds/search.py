"""Exact nearest neighbours by inner product, of candidates that are shown in blocks: one block's scores at a time.

faiss on a CPU, where it is the fastest (docs/log.md); a matrix product and topk on a GPU.

Shape suffixes: Q queries, C candidates of a block, k kept candidates, D embedding size.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

from muco_ds.errors import UserError

MEMORY = 256 * 2**20
"""Bytes of a block of candidates in float32, and of a block of scores on a GPU."""


_MATRIX_QUERIES = 8


def load_faiss() -> ModuleType:
    """The search library of a CPU. Raises UserError where it is not installed."""
    try:
        import faiss
    except ImportError as error:
        raise UserError(f"searching on a CPU needs faiss ({error}): pip install faiss-cpu") from error
    # Below its own bound, some 450 queries, it multiplies vector by vector: five times slower (docs/log.md).
    faiss.cvar.distance_compute_blas_threshold = _MATRIX_QUERIES
    return faiss


class Nearest:
    """Each query's best candidates of those added so far, best first, equal scores in the candidates' order.

    Of candidates that score like the last one kept, which of them are kept is not defined.

    Args:
        query_QD: float32, on the device that is to search.
        depth: how many candidates to keep.
        ranks: how many search at the same time on this machine's cores.
    """

    def __init__(self, query_QD: torch.Tensor, depth: int, *, ranks: int = 1) -> None:
        self.query_QD, self.depth, self.seen = query_QD, depth, 0
        self.score_Qk = query_QD.new_empty(len(query_QD), 0)  # float32
        self.index_Qk = query_QD.new_empty(len(query_QD), 0, dtype=torch.int64)
        self._faiss = None if query_QD.is_cuda else load_faiss()
        # Launchers give each rank one thread, whether or not the others have work.
        self._threads = max(1, len(os.sched_getaffinity(0)) // ranks)

    def add(self, target_CD: torch.Tensor) -> None:
        """Look at the candidates that follow: float32, on the queries' device."""
        k = min(self.depth, len(target_CD))
        if self._faiss is not None:
            with _threads(self._faiss, self._threads):
                metric = self._faiss.METRIC_INNER_PRODUCT
                found = self._faiss.knn(self.query_QD.numpy(), target_CD.numpy(), k, metric=metric)
            score_Qk, index_Qk = map(torch.from_numpy, found)
        else:
            score_Qk, index_Qk = best_by_topk(self.query_QD, target_CD, k)
        index_Qk, order_Qk = index_Qk.sort(dim=1)
        score_Qk = torch.cat([self.score_Qk, score_Qk.gather(1, order_Qk)], dim=1)
        index_Qk = torch.cat([self.index_Qk, index_Qk + self.seen], dim=1)
        score_Qk, order_Qk = score_Qk.sort(dim=1, descending=True, stable=True)
        self.score_Qk = score_Qk[:, : self.depth]
        self.index_Qk = index_Qk.gather(1, order_Qk[:, : self.depth])
        self.seen += len(target_CD)


def best_by_topk(
    query_QD: torch.Tensor, target_CD: torch.Tensor, k: int, memory: int = MEMORY
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and indices of each query's k best candidates, [Q, k]; at most `memory` bytes of scores at a time."""
    size = max(1, memory // (4 * len(target_CD)))
    found = [(query_BD @ target_CD.T).topk(k, dim=1) for query_BD in query_QD.split(size)]
    return torch.cat([best.values for best in found]), torch.cat([best.indices for best in found])


@contextmanager
def _threads(faiss: ModuleType, count: int) -> Iterator[None]:
    """faiss with so many threads; its number is also that of torch, whose it must not stay."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
