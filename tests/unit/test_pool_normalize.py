"""ops.pool_normalize on the CPU: torch's own RMSNorm and normalize, on the pooled rows only."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from muco_ds.ops import pool_normalize, pool_normalize_reference


@pytest.mark.parametrize("scale", [1.0, 1e-17], ids=["plain", "clamped norm"])  # eps shows only in the clamped one
@pytest.mark.parametrize("pool", [pool_normalize, pool_normalize_reference])
def test_equals_rms_norm_of_every_row_then_normalize(pool: Callable[..., torch.Tensor], scale: float) -> None:
    norm = torch.nn.RMSNorm(48, eps=0.1)
    torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
    hidden_TD = (torch.randn(20, 48) * scale).requires_grad_()
    index_E = torch.tensor([7, 3, 3, 19, 0])
    upstream_ED = torch.randn(5, 48)

    want_ED = F.normalize(norm(hidden_TD)[index_E], dim=-1)
    want = torch.autograd.grad(want_ED, [hidden_TD, norm.weight], upstream_ED)
    emb_ED = pool(hidden_TD, index_E, norm.weight, 0.1)
    got = torch.autograd.grad(emb_ED, [hidden_TD, norm.weight], upstream_ED)

    torch.testing.assert_close(emb_ED, want_ED, rtol=1e-6, atol=1e-7)
    for got_grad, want_grad in zip(got, want, strict=True):
        assert (got_grad - want_grad).norm() < 1e-5 * want_grad.norm()


@pytest.mark.parametrize("span", [2, 8, 32])
@pytest.mark.parametrize("pool", [pool_normalize, pool_normalize_reference])
def test_span_equals_rms_norm_of_every_row_then_mean_then_normalize(
    pool: Callable[..., torch.Tensor], span: int
) -> None:
    norm = torch.nn.RMSNorm(48, eps=0.1, dtype=torch.float64)
    torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
    wide = torch.randn(96, 90, dtype=torch.float64)  # hidden states are a strided view of it
    rows_T1 = torch.linspace(0.1, 2, 90, dtype=torch.float64)[:, None]  # the rows' own norms differ
    hidden_TD = (wide[:48].T * rows_T1).requires_grad_()
    ends = [31, 89, 40, 31, 88]  # unsorted; spans overlap and one repeats
    upstream_ED = torch.randn(5, 48, dtype=torch.float64)

    normed_TD = norm(hidden_TD)
    want_ED = torch.stack([F.normalize(normed_TD[end + 1 - span : end + 1].mean(0), dim=0) for end in ends])
    want = torch.autograd.grad(want_ED, [hidden_TD, norm.weight], upstream_ED)
    for dtype, tolerance in [(torch.float64, 1e-12), (torch.float32, 2e-6)]:
        leaves = [hidden_TD.detach().to(dtype).requires_grad_(), norm.weight.detach().to(dtype).requires_grad_()]
        assert not leaves[0].is_contiguous()
        emb_ED = pool(leaves[0], torch.tensor(ends), leaves[1], 0.1, span=span)
        got = torch.autograd.grad(emb_ED, leaves, upstream_ED.to(dtype))
        assert emb_ED.dtype == dtype and (emb_ED - want_ED).abs().max() < tolerance
        for got_grad, want_grad in zip(got, want, strict=True):
            assert got_grad.dtype == dtype and (got_grad - want_grad).norm() < 5 * tolerance * want_grad.norm()


def test_gradcheck_in_float64() -> None:
    hidden_TD = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    weight_D = (torch.rand(5, dtype=torch.float64) + 0.5).requires_grad_()
    index_E = torch.tensor([4, 1, 1])
    assert torch.autograd.gradcheck(lambda h, w: pool_normalize(h, index_E, w, 1e-6), (hidden_TD, weight_D))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_float32_out_and_gradients_in_the_inputs_dtype(dtype: torch.dtype) -> None:
    hidden_TD = torch.randn(9, 64).to(dtype).requires_grad_()
    weight_D = (torch.rand(64) + 0.5).to(dtype).requires_grad_()
    emb_ED = pool_normalize(hidden_TD, torch.tensor([8, 2]), weight_D, 1e-6)
    exact_ED = pool_normalize(hidden_TD.double(), torch.tensor([8, 2]), weight_D.double(), 1e-6)
    emb_ED.square().mul(torch.arange(64)).sum().backward()
    assert emb_ED.dtype == torch.float32
    torch.testing.assert_close(emb_ED.norm(dim=-1), torch.ones(2))
    torch.testing.assert_close(emb_ED.double(), exact_ED, rtol=1e-6, atol=1e-7)
    assert hidden_TD.grad is not None and hidden_TD.grad.dtype == dtype
    assert weight_D.grad is not None and weight_D.grad.dtype == dtype
    untouched_T = torch.ones(9, dtype=torch.bool)
    untouched_T[[8, 2]] = False
    assert (hidden_TD.grad[untouched_T] == 0).all() and (hidden_TD.grad[[8, 2]] != 0).any(1).all()


@pytest.mark.parametrize("span", [1, 32])
def test_no_embeddings_keep_the_graph(span: int) -> None:
    hidden_TD = torch.randn(4, 8, requires_grad=True)
    weight_D = torch.ones(8, requires_grad=True)
    emb_ED = pool_normalize(hidden_TD, torch.empty(0, dtype=torch.int64), weight_D, 1e-6, span=span)
    emb_ED.sum().backward()
    assert emb_ED.shape == (0, 8)
    assert hidden_TD.grad is not None and weight_D.grad is not None and (weight_D.grad == 0).all()


def test_imports_and_runs_without_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None  # an import of it now fails, as where it is not installed
import torch
from muco_ds.ops import pool_normalize
assert pool_normalize(torch.randn(3, 8), torch.tensor([1]), torch.ones(8), 1e-6).shape == (1, 8)
assert "muco_ds.ops.pool_normalize_triton" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
