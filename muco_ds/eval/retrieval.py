"""Retrieval scores. Ties count against the model: an embedding that collapsed to one point must score zero.

Shape suffixes: Q queries, C candidates, D embedding size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

BLOCK = 1024  # queries scored at a time


@dataclass(frozen=True)
class Ranking:
    """Per query: whether its answer beats every other candidate, and its best candidates with their scores."""

    correct_Q: torch.Tensor  # bool
    top_index_Qk: torch.Tensor
    top_score_Qk: torch.Tensor


def rank_candidates(
    query_QD: torch.Tensor, candidate_CD: torch.Tensor, answer_Q: torch.Tensor, top: int = 1
) -> Ranking:
    """Rank all candidates for each query by inner product in fp32.

    Args:
        answer_Q: int64, index of the one right candidate.
        top: how many best candidates to return.
    """
    correct, indices, scores = [], [], []
    for start in range(0, len(query_QD), BLOCK):
        block = slice(start, start + BLOCK)
        score = query_QD[block].float() @ candidate_CD.float().T
        answer = answer_Q[block, None]
        right = score.gather(1, answer)
        others = score.scatter(1, answer, float("-inf"))
        correct.append((right > others.max(1, keepdim=True).values)[:, 0])
        best = score.topk(min(top, score.shape[1]), dim=1)
        indices.append(best.indices)
        scores.append(best.values)
    return Ranking(torch.cat(correct), torch.cat(indices), torch.cat(scores))


def precision_at_1(correct_Q: torch.Tensor, kinds: Sequence[int], candidates: int) -> dict[str, dict[str, float | int]]:
    """`overall` and one entry per kind of turn, each with precision@1, queries, candidates and chance."""
    kind_Q = torch.tensor(kinds)

    def entry(hits: torch.Tensor) -> dict[str, float | int]:
        return {
            "precision@1": float(hits.float().mean()),
            "queries": len(hits),
            "candidates": candidates,
            "chance": 1.0 / candidates,
        }

    by_kind = {f"turn_{kind}": entry(correct_Q[kind_Q == kind]) for kind in sorted(set(kinds))}
    return {"overall": entry(correct_Q), **by_kind}
