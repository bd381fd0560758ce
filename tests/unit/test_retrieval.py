"""Ranking: ties are misses, blocks change nothing, entries per kind of turn."""

from __future__ import annotations

import pytest
import torch

from muco_ds.eval import retrieval
from muco_ds.eval.retrieval import precision_at_1, rank_candidates


def unit(rows: int, dim: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, dim, generator=generator), dim=-1)


def test_a_collapsed_model_scores_zero() -> None:
    point = torch.ones(5, 8) / 8**0.5
    ranking = rank_candidates(point, point[:3], torch.tensor([0, 1, 2, 0, 1]))
    assert not ranking.correct_Q.any()


def test_a_tie_at_the_top_is_a_miss_and_one_below_it_is_not() -> None:
    candidates = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, -1.0], [0.0, -1.0]])
    queries = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    ranking = rank_candidates(queries, candidates, torch.tensor([0, 1, 2]))
    assert ranking.correct_Q.tolist() == [False, False, True]


def test_nan_is_a_miss() -> None:
    ranking = rank_candidates(torch.full((2, 3), float("nan")), unit(4, 3, 0), torch.tensor([0, 1]))
    assert not ranking.correct_Q.any()


def test_hand_computed_ranking() -> None:
    candidates = torch.eye(3)
    queries = torch.tensor([[0.9, 0.1, 0.3], [0.5, 0.4, 0.1], [0.1, 0.2, 0.7], [0.3, 0.8, 0.5]])
    ranking = rank_candidates(queries, candidates, torch.tensor([0, 1, 2, 2]), top=2)
    assert ranking.correct_Q.tolist() == [True, False, True, False]
    assert ranking.top_index_Qk.tolist() == [[0, 2], [0, 1], [2, 1], [1, 2]]
    torch.testing.assert_close(ranking.top_score_Qk, torch.tensor([[0.9, 0.3], [0.5, 0.4], [0.7, 0.2], [0.8, 0.5]]))


def test_fewer_candidates_than_asked_for() -> None:
    ranking = rank_candidates(unit(3, 4, 1), unit(1, 4, 2), torch.zeros(3, dtype=torch.long), top=3)
    assert ranking.correct_Q.all() and ranking.top_index_Qk.shape == (3, 1)


@pytest.mark.parametrize("block", [1, 7, 23, 24])
def test_blocks_equal_brute_force(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "BLOCK", block)
    query_QD, candidate_CD = unit(23, 4, 3), unit(11, 4, 4)
    candidate_CD[5] = candidate_CD[2]  # a duplicate: never first alone
    answer_Q = torch.arange(23) % 11
    ranking = rank_candidates(query_QD, candidate_CD, answer_Q, top=3)
    for q in range(23):
        scores = [float(query_QD[q] @ candidate_CD[c]) for c in range(11)]
        answer = int(answer_Q[q])
        others = [score for c, score in enumerate(scores) if c != answer]
        assert bool(ranking.correct_Q[q]) == (scores[answer] > max(others) + 1e-7)
        best = sorted(scores, reverse=True)[:3]
        assert ranking.top_score_Qk[q].tolist() == pytest.approx(best, abs=1e-6)
        assert [scores[c] for c in ranking.top_index_Qk[q].tolist()] == pytest.approx(best, abs=1e-6)
    assert ranking.correct_Q.any() and not ranking.correct_Q.all()


def test_half_precision_embeddings_are_scored_in_fp32() -> None:
    # In bf16 both scores round to 1.0, a tie; in fp32 the answer is ahead.
    candidates = torch.tensor([[1.0, 0.0], [0.998, 0.0625]]).bfloat16()
    queries = torch.tensor([[1.0, 0.03125]]).bfloat16()
    score = queries.float() @ candidates.float().T
    answer = int(score.argmax())
    assert score[0, 0] != score[0, 1]
    assert rank_candidates(queries, candidates, torch.tensor([answer])).correct_Q.all()


def test_entries_per_kind_of_turn() -> None:
    correct_Q = torch.tensor([True, False, True, True, False])
    results = precision_at_1(correct_Q, [0, 2, 0, 2, 2], candidates=8)
    assert results == {
        "overall": {"precision@1": pytest.approx(0.6), "queries": 5, "candidates": 8, "chance": 0.125},
        "turn_0": {"precision@1": 1.0, "queries": 2, "candidates": 8, "chance": 0.125},
        "turn_2": {"precision@1": pytest.approx(1 / 3), "queries": 3, "candidates": 8, "chance": 0.125},
    }
