"""Exact search in blocks: equal to brute force, ties against the model, memory of one block."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from muco_ds.eval.encoder import InMemory
from muco_ds.eval.recall import Answers, chance, find_answers, recall
from muco_ds.search import Nearest, best_by_topk

CPU = torch.device("cpu")


def unit_rows(rng: np.random.Generator, rows: int, width: int) -> np.ndarray:
    rows_ND = rng.standard_normal((rows, width)).astype(np.float32)
    return rows_ND / np.linalg.norm(rows_ND, axis=1, keepdims=True)


def drawn_answers(rng: np.random.Generator, queries: int, candidates: int) -> Answers:
    """One to four of each query."""
    right = [rng.choice(candidates, rng.integers(1, 5), replace=False) for _ in range(queries)]
    owner = [np.full(len(of_query), q) for q, of_query in enumerate(right)]
    return Answers(np.concatenate(owner), np.concatenate(right))


@dataclass
class Asked:
    """Rows that remember how many were read at once."""

    array_ND: np.ndarray
    sizes: list[int] = field(default_factory=list)

    @property
    def width(self) -> int:
        return self.array_ND.shape[1]

    def __len__(self) -> int:
        return len(self.array_ND)

    def read(self, start: int, stop: int) -> np.ndarray:
        self.sizes.append(stop - start)
        return self.array_ND[start:stop]


@pytest.mark.parametrize("block", [7, 64, 1000])
@pytest.mark.parametrize("depth", [1, 10, 500])
def test_nearest_in_blocks_equals_brute_force(block: int, depth: int) -> None:
    rng = np.random.default_rng(0)
    query_QD, target_CD = unit_rows(rng, 33, 16), unit_rows(rng, 300, 16)
    found = Nearest(torch.from_numpy(query_QD), depth)
    for start in range(0, 300, block):
        found.add(torch.from_numpy(target_CD[start : start + block]))
    score_QC = query_QD.astype(np.float64) @ target_CD.T.astype(np.float64)
    order_QC = np.argsort(-score_QC, axis=1)[:, :depth]
    assert (found.index_Qk.numpy() == order_QC).all()
    assert np.abs(found.score_Qk.numpy() - np.take_along_axis(score_QC, order_QC, 1)).max() < 1e-6


def test_equal_scores_stand_in_the_candidates_order() -> None:
    target_CD = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    found = Nearest(torch.tensor([[1.0, 0.0]]), 4)
    for part in (target_CD[:3], target_CD[3:]):
        found.add(part)
    assert found.index_Qk.tolist() == [[1, 3, 0, 2]]


def test_what_a_gpu_does_equals_what_a_cpu_does() -> None:
    rng = np.random.default_rng(1)
    query_QD, target_CD = (torch.from_numpy(unit_rows(rng, rows, 8)) for rows in (21, 50))
    score_Qk, index_Qk = best_by_topk(query_QD, target_CD, 6, memory=4 * 50 * 4)  # four queries at a time
    found = Nearest(query_QD, 6)
    found.add(target_CD)
    assert torch.equal(index_Qk, found.index_Qk) and torch.allclose(score_Qk, found.score_Qk, atol=1e-6)


def test_a_search_leaves_the_number_of_threads_as_it_was() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        Nearest(torch.ones(1, 2), 1).add(torch.ones(3, 2))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("size", [32, 12])
@pytest.mark.parametrize("memory", [4 * 32 * 9, 2**20])
def test_answers_are_found_as_by_brute_force(memory: int, size: int) -> None:
    rng = np.random.default_rng(2)
    query_QD, rows = unit_rows(rng, 40, 32), InMemory(unit_rows(rng, 200, 32).astype(np.float16))
    answers = drawn_answers(rng, 40, 200)
    found = find_answers(torch.from_numpy(query_QD), rows, answers, 50, [size], device=CPU, memory=memory)
    target_CD = rows.array_ND[:, :size].astype(np.float64)
    target_CD /= np.linalg.norm(target_CD, axis=1, keepdims=True)
    for q in range(40):
        right = answers.candidate_P[answers.query_P == q]
        score_C = target_CD @ query_QD[q, :size] / np.linalg.norm(query_QD[q, :size])
        wrong_C = np.delete(score_C, right)
        assert found.better_Q[size][q] == min(50, int((wrong_C > score_C[right].max()).sum()))
    assert found.broken == 0 and 0 < recall(found.better_Q[size], 5) < recall(found.better_Q[size], 50) < 1


def test_one_block_of_candidates_is_read_at_a_time() -> None:
    rng = np.random.default_rng(3)
    rows = Asked(unit_rows(rng, 100, 8))
    answers = drawn_answers(rng, 5, 100)
    find_answers(torch.from_numpy(unit_rows(rng, 5, 8)), rows, answers, 3, [8], device=CPU, memory=4 * 8 * 30)
    assert rows.sizes == [30, 30, 30, 10]


@pytest.mark.parametrize("width", [64, 96, 1536])
@pytest.mark.parametrize("candidates", [7, 1001, 4099])
def test_embeddings_that_collapsed_score_zero(width: int, candidates: int) -> None:
    """A matrix library may give equal candidates scores that differ in the last bit."""
    rng = np.random.default_rng(4)
    point_D = unit_rows(rng, 1, width)
    query_QD = np.repeat(point_D, 37, 0) + 0.01 * unit_rows(rng, 37, width)
    answers = Answers(np.arange(37), rng.integers(0, candidates, 37))
    rows = InMemory(np.repeat(point_D, candidates, 0))
    found = find_answers(torch.from_numpy(query_QD), rows, answers, 5, [width], device=CPU)
    assert (found.better_Q[width] == 5).all()


def test_scores_that_differ_by_rounding_are_equal() -> None:
    target_CD = np.array([[1, 0], [1, -2.5e-7], [1, -1e-3]], np.float32)
    found = find_answers(
        torch.tensor([[0.6, 0.8]]), InMemory(target_CD), Answers(*np.array([[0], [0]])), 3, [2], device=CPU
    )
    assert found.better_Q[2].tolist() == [1]


def test_rows_of_zeros_are_counted_and_never_found() -> None:
    target_CD = np.array([[0, 0], [-1, 0], [1, 0], [0, 0]], np.float16)
    answers = Answers(np.array([0, 1]), np.array([1, 2]))
    found = find_answers(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), InMemory(target_CD), answers, 3, [2], device=CPU)
    assert found.broken == 2 and found.better_Q[2].tolist() == [1, 0]
    right_is_broken = Answers(np.array([0]), np.array([0]))
    found = find_answers(torch.tensor([[1.0, 0.0]]), InMemory(target_CD[:2]), right_is_broken, 1, [2], device=CPU)
    assert found.better_Q[2].tolist() == [1]


def test_chance_is_that_of_drawn_candidates() -> None:
    assert chance(np.array([1, 1]), 10, 5) == pytest.approx(0.5)
    assert chance(np.array([2]), 4, 2) == pytest.approx(1 - (2 / 4) * (1 / 3))
    assert chance(np.array([1, 3]), 3, 5) == 1.0
