"""Exact search on a GPU: what a CPU finds, broken candidates and blocks included. Matrix products must be full fp32."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from muco_ds.eval.encoder import InMemory
from muco_ds.eval.recall import Answers, find_answers
from muco_ds.search import Nearest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

QUERIES, CANDIDATES, WIDTH = 500, 20_000, 256


def unit_rows(rows: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, WIDTH, generator=generator), dim=-1)


def test_nearest_equals_brute_force_in_double() -> None:
    query_QD, target_CD = unit_rows(QUERIES, 0), unit_rows(CANDIDATES, 1)
    found = Nearest(query_QD.cuda(), 20)
    for block in target_CD.split(7_000):
        found.add(block.cuda())
    want = (query_QD.double() @ target_CD.double().T).topk(21, dim=1)
    assert (found.score_Qk.cpu() - want.values[:, :20]).abs().max() < 1e-6
    # Places may change where neighbours are nearer than fp32 tells apart.
    clear_Qk = (want.values[:, :-1] - want.values[:, 1:]) > 1e-6
    clear_Qk = clear_Qk & torch.cat([torch.ones(QUERIES, 1, dtype=torch.bool), clear_Qk[:, :-1]], dim=1)
    assert torch.equal(found.index_Qk.cpu()[clear_Qk], want.indices[:, :20][clear_Qk])


def test_answers_are_found_as_on_a_cpu() -> None:
    query_QD, target_CD = unit_rows(QUERIES, 2), unit_rows(CANDIDATES, 3).half()
    target_CD[::100] = 0  # could not be encoded
    answers = Answers(np.arange(QUERIES), np.arange(QUERIES) * 7)
    cpu, gpu = (
        find_answers(query_QD, InMemory(target_CD.numpy()), answers, 50, [64, WIDTH], device=torch.device(device))
        for device in ("cpu", "cuda")
    )
    assert cpu.broken == gpu.broken == CANDIDATES // 100
    for size in (64, WIDTH):
        assert (cpu.better_Q[size] == gpu.better_Q[size]).mean() > 0.99
