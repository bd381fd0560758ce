"""Grouped SDPA against the dense twin, forward and gradients; nothing of one dialogue reaches another."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from muco_ds.data.segments import SegmentBuilder, SegmentPlan, causal, isolated
from muco_ds.models.attention import segment_attention

HEADS, KV_HEADS, DIM = 4, 2, 8


def random_plan(seed: int, dialogues: int = 6) -> SegmentPlan:
    """Ragged causal and isolated dialogues, 1-row segments among them."""
    rng = np.random.default_rng(seed)
    builder = SegmentBuilder()
    for _ in range(dialogues):
        if rng.random() < 0.4:
            builder.add(causal(int(rng.integers(1, 40))))
        else:
            builder.add(isolated(int(rng.integers(1, 40)), rng.integers(1, 20, int(rng.integers(1, 5))).tolist()))
    builder.add(causal(1))
    return builder.build()


def inputs(plan: SegmentPlan, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = int(plan.cu_q_S1[-1])
    shapes = ((rows, HEADS, DIM), (rows, KV_HEADS, DIM), (rows, KV_HEADS, DIM))
    return [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("seed", range(8))
def test_grouped_sdpa_equals_the_dense_twin(seed: int) -> None:
    plan = random_plan(seed)
    q, k, v = inputs(plan, seed)
    weight = torch.randn(q.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(99))
    results = []
    for backend in ("sdpa", "dense"):
        out = segment_attention(q, k, v, plan, scale=0.3, backend=backend)
        results.append((out, *torch.autograd.grad((out * weight).sum(), (q, k, v))))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_each_segment_equals_causal_attention_by_itself() -> None:
    """An oracle that does not use `dense_mask`: every isolated turn after its prefix, as one causal sequence."""
    prefix, turns = 5, [3, 1, 20]
    builder = SegmentBuilder()
    builder.add(causal(4))
    builder.add(isolated(prefix, turns))
    plan = builder.build()
    q, k, v = inputs(plan, 0)
    out = segment_attention(q, k, v, plan, scale=0.3, backend="sdpa")
    start = 4 + prefix
    for length in turns:
        rows = torch.tensor([*range(4, 4 + prefix), *range(start, start + length)])
        heads = [x[rows].repeat_interleave(HEADS // x.shape[1], 1).transpose(0, 1) for x in (q, k, v)]
        alone = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True, scale=0.3).transpose(0, 1)
        torch.testing.assert_close(out[rows[prefix:]], alone[prefix:], rtol=1e-12, atol=1e-12)
        start += length


@pytest.mark.parametrize("seed", range(4))
def test_no_leak_even_of_nan(seed: int) -> None:
    """Padding and masks keep dialogues apart: NaN in one leaves the outputs of the others bit-equal."""
    plan = random_plan(seed)
    q, k, v = (x.detach() for x in inputs(plan, seed))
    before = segment_attention(q, k, v, plan, scale=0.3, backend="sdpa")
    mask = plan.dense_mask()
    cu = plan.cu_q_S1.tolist()
    for segment in range(len(cu) - 1):
        k_bad, v_bad = k.clone(), v.clone()
        k_bad[cu[segment] : cu[segment + 1]] = float("nan")
        v_bad[cu[segment] : cu[segment + 1]] = float("nan")
        after = segment_attention(q, k_bad, v_bad, plan, scale=0.3, backend="sdpa")
        sees = mask[:, cu[segment] : cu[segment + 1]].any(1)
        reaches_segment = torch.zeros_like(sees)
        for s in range(len(cu) - 1):  # NaN keys spoil a whole segment that lists them, masked rows included
            reaches_segment[cu[s] : cu[s + 1]] = sees[cu[s] : cu[s + 1]].any()
        assert torch.equal(after[~reaches_segment], before[~reaches_segment])
        assert after[sees].isnan().all()


def test_groups_are_made_once_per_plan() -> None:
    plan = random_plan(0)
    q, k, v = inputs(plan, 0)
    segment_attention(q, k, v, plan, scale=1.0, backend="sdpa")
    groups = plan.cache["sdpa"]
    segment_attention(q, k, v, plan, scale=1.0, backend="sdpa")
    assert plan.cache["sdpa"] is groups


def test_auto_takes_sdpa_on_a_cpu() -> None:
    plan = random_plan(1)
    q, k, v = inputs(plan, 1)
    auto, sdpa = (segment_attention(q, k, v, plan, scale=1.0, backend=backend) for backend in ("auto", "sdpa"))
    assert torch.equal(auto, sdpa)
