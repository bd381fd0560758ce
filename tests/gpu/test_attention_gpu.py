"""Every installed backend of the packed attention on a GPU, forward and backward, against the dense twin in fp32.

The question behind it: do the varlen kernels align causal segments to the bottom right when a segment has fewer
queries than keys, as turns of isolated dialogues do?

Shape suffixes: T rows of the pack, H query heads, G key/value heads, d head dimension.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

from muco_ds.data.segments import Segment, SegmentBuilder, SegmentPlan, causal, isolated
from muco_ds.models import attention
from muco_ds.models.attention import segment_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


LAYOUTS: dict[str, list[list[Segment]]] = {
    "causal": [causal(length) for length in (1, 130, 17, 64, 129, 2, 300)],
    "isolated": [isolated(150, [7, 1, 33, 128, 64]), isolated(14, [20]), isolated(257, [130, 5])],
    "mixed": [causal(90), isolated(65, [1, 2, 40]), causal(1), isolated(300, [16] * 7)],
    "compression": [
        [Segment(rows), Segment(behind, context=(rows - 32, rows))] for rows, behind in ((300, 90), (41, 7))
    ],
}


def plan_of(layout: str, device: str) -> SegmentPlan:
    builder = SegmentBuilder()
    for segments in LAYOUTS[layout]:
        builder.add(segments)
    return builder.build().map(lambda tensor: tensor.to(device))


def attend(
    leaves: list[torch.Tensor], plan: SegmentPlan, backend: str, upstream_THd: torch.Tensor
) -> list[torch.Tensor]:
    """Output and the gradients of q, k and v, in fp32."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    q_THd, k_TGd, v_TGd = leaves
    out_THd = segment_attention(q_THd, k_TGd, v_TGd, plan, q_THd.shape[-1] ** -0.5, backend)
    assert out_THd.dtype == q_THd.dtype and out_THd.shape == q_THd.shape
    grads = torch.autograd.grad(out_THd, leaves, upstream_THd.to(out_THd.dtype))
    return [tensor.detach().float() for tensor in (out_THd, *grads)]


def compare(
    backend: str, layout: str, device: str, dtype: torch.dtype, heads: tuple[int, int, int], tolerance: float
) -> None:
    """Row by row: a wrong alignment is wrong in few rows of a long segment, which a norm over all could hide."""
    n_heads, n_kv, head_dim = heads
    plan = plan_of(layout, device)
    rows = int(plan.cu_q_S1[-1])
    generator = torch.Generator(device=device).manual_seed(0)
    q, k, v, upstream = (
        torch.randn(rows, n, head_dim, device=device, generator=generator).to(dtype)
        for n in (n_heads, n_kv, n_kv, n_heads)
    )
    got = attend([q, k, v], plan, backend, upstream)
    want = attend([q.float(), k.float(), v.float()], plan, "dense", upstream.float())
    for name, got_TXd, want_TXd in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        error_T = (got_TXd - want_TXd).flatten(1).norm(dim=1)
        # A row's gradient may be tiny (a one-token segment's query has none): measured against the typical row.
        scale_T = want_TXd.flatten(1).norm(dim=1).clamp_min(want_TXd.flatten(1).norm(dim=1).mean())
        worst = float((error_T / scale_T).max())
        print(f"{backend} {layout} {name}: worst row {worst:.2e}")
        assert worst <= tolerance, f"{name} of row {int((error_T / scale_T).argmax())} is off by {worst:.2e}"


def needs(backend: str) -> None:
    if backend == "flash_attn" and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash_attn is not installed")
    if backend == "varlen" and importlib.util.find_spec("torch.nn.attention.varlen") is None:
        pytest.skip("this torch has no varlen_attn")


@pytest.mark.parametrize("heads", [(12, 2, 128), (28, 4, 128)], ids=["2b", "7b"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["flash_attn", "varlen", "sdpa", "auto"])
def test_backend_equals_dense_twin_in_bf16(backend: str, layout: str, heads: tuple[int, int, int]) -> None:
    needs(backend)
    # bf16 keeps 8 bits: inputs are exact, probabilities and outputs are rounded once each. Misalignment gives > 0.5.
    compare(backend, layout, "cuda", torch.bfloat16, heads, tolerance=3e-2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sdpa_equals_dense_twin_in_fp32(layout: str) -> None:
    compare("sdpa", layout, "cuda", torch.float32, (12, 2, 128), tolerance=1e-4)


def test_the_tolerance_tells_bottom_right_from_top_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys one later than allowed, or one fewer, must not pass as rounding."""
    original = attention._dense

    def shifted(q, k, v, plan, scale):  # type: ignore[no-untyped-def]
        return original(q, k.roll(1, 0), v.roll(1, 0), plan, scale)

    monkeypatch.setitem(attention._FUNCTIONS, "shifted", shifted)
    with pytest.raises(AssertionError, match="is off by"):
        compare("shifted", "isolated", "cuda", torch.bfloat16, (12, 2, 128), tolerance=3e-2)


@pytest.mark.parametrize("backend", ["flash_attn", "varlen", "sdpa"])
def test_no_leak_between_segments(backend: str) -> None:
    needs(backend)
    plan = plan_of("isolated", "cuda")
    generator = torch.Generator(device="cuda").manual_seed(1)
    rows = int(plan.cu_q_S1[-1])
    q, k, v = (torch.randn(rows, n, 128, device="cuda", generator=generator).bfloat16() for n in (12, 2, 2))
    before = segment_attention(q, k, v, plan, 128**-0.5, backend)
    turn = slice(150 + 7 + 1, 150 + 7 + 1 + 33)  # the third turn of the first dialogue
    k[turn], v[turn] = k[turn] + 1, v[turn] - 1
    after = segment_attention(q, k, v, plan, 128**-0.5, backend)
    same = torch.ones(rows, dtype=torch.bool, device="cuda")
    same[turn] = False
    assert torch.equal(before[same], after[same])
    assert (before[turn] != after[turn]).flatten(1).any(1).all()


def test_auto_takes_the_best_that_is_installed() -> None:
    expected = "varlen" if importlib.util.find_spec("torch.nn.attention.varlen") else "sdpa"
    if importlib.util.find_spec("flash_attn"):
        expected = "flash_attn"
    assert attention._best_backend("cuda", torch.bfloat16) == expected
    assert attention._best_backend("cuda", torch.float32) == "sdpa"
