"""Grouped SDPA against the dense twin, forward and gradients; nothing of one dialogue reaches another."""

from __future__ import annotations

import sys
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from muco_ds.data.segments import SegmentBuilder, SegmentPlan, causal, isolated, separate
from muco_ds.models.attention import flash_function, segment_attention

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


def inputs(plan: SegmentPlan, seed: int, keys: int | None = None) -> list[torch.Tensor]:
    """q, k and v; `keys`: rows of k and v, default: as many as of q."""
    generator = torch.Generator().manual_seed(seed)
    rows = int(plan.cu_q_S1[-1])
    keys = rows if keys is None else keys
    shapes = ((rows, HEADS, DIM), (keys, KV_HEADS, DIM), (keys, KV_HEADS, DIM))
    return [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]


def random_plans(seed: int) -> dict[str, tuple[SegmentPlan, int]]:
    """Of each kind one, and the key rows it is about."""
    plan = random_plan(seed)
    rows = int(plan.cu_q_S1[-1])
    rng = np.random.default_rng(seed)
    pictures = separate(rng.choice([1, 4, 9, 16, 40], 9))
    return {
        "text": (plan, rows),
        "read rows": (plan.of_rows(np.concatenate([rng.permutation(rows)[:9], np.arange(rows // 2, rows)])), rows),
        "pictures": (pictures, int(pictures.cu_q_S1[-1])),
    }


@pytest.mark.parametrize("kind", ["text", "read rows", "pictures"])
@pytest.mark.parametrize("seed", range(4))
def test_grouped_sdpa_equals_the_dense_twin(seed: int, kind: str) -> None:
    plan, keys = random_plans(seed)[kind]
    q, k, v = inputs(plan, seed, keys)
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


def test_keys_of_the_first_segment_alone() -> None:
    """In their places, and yet not all there are."""
    builder = SegmentBuilder()
    for length in (5, 4):
        builder.add(causal(length))
    plan = builder.build().of_rows(np.array([4]))
    q, k, v = inputs(plan, 0, keys=9)
    found, expected = (segment_attention(q, k, v, plan, scale=0.3, backend=backend) for backend in ("sdpa", "dense"))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lengths", [(3, 2), (2, 3), (5,), (4, 4), (20, 3, 2)])
def test_padding_behind_the_last_row_is_cut_off(lengths: tuple[int, ...]) -> None:
    builder = SegmentBuilder()
    for length in lengths:
        builder.add(causal(length))
    plan = builder.build()
    q, k, v = inputs(plan, 0)
    found, expected = (segment_attention(q, k, v, plan, scale=0.3, backend=backend) for backend in ("sdpa", "dense"))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


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


def test_the_flash_attention_for_the_gpu_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three on Hopper, four behind it, two elsewhere; version 4 alone leaves a `flash_attn` without a function."""

    def installed(*names: str) -> dict[int, str | None]:
        flash_function.cache_clear()
        for name in ("flash_attn", "flash_attn_interface", "flash_attn.cute"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        for name in names:
            module = ModuleType(name)
            monkeypatch.setitem(sys.modules, name, module)
            module.flash_attn_varlen_func = lambda name=name: name  # type: ignore[attr-defined]
        if "flash_attn.cute" in names and "flash_attn" not in names:
            monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
        found = {capability: flash_function(capability) for capability in (8, 9, 10)}
        flash_function.cache_clear()
        return {capability: None if function is None else function() for capability, function in found.items()}

    assert installed() == {8: None, 9: None, 10: None}
    assert installed("flash_attn") == dict.fromkeys((8, 9, 10), "flash_attn")
    assert installed("flash_attn.cute") == {8: None, 9: "flash_attn.cute", 10: "flash_attn.cute"}
    everything = installed("flash_attn", "flash_attn_interface", "flash_attn.cute")
    assert everything == {8: "flash_attn", 9: "flash_attn_interface", 10: "flash_attn.cute"}
