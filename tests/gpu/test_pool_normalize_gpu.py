"""The kernels of ops.pool_normalize on a GPU, in the dtypes and widths of training, against their twin."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from muco_ds.ops import pool_normalize, pool_normalize_reference

pytest.importorskip("triton", reason="triton is not installed")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def run(
    pool: Callable[..., torch.Tensor],
    hidden_TD: torch.Tensor,
    index_E: torch.Tensor | None,
    weight_D: torch.Tensor,
    span: int = 1,
) -> list[torch.Tensor]:
    leaves = [hidden_TD.detach().clone().requires_grad_(), weight_D.detach().clone().requires_grad_()]
    emb_ED = pool(leaves[0], index_E, leaves[1], 1e-6, span=span)
    generator = torch.Generator(device="cuda").manual_seed(2)
    upstream_ED = torch.randn(emb_ED.shape, device="cuda", generator=generator)
    return [emb_ED.detach(), *torch.autograd.grad(emb_ED, leaves, upstream_ED)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "n_tokens, dim, n_rows, span",
    [
        *((7, 48, 1, 1), (300, 1536, 40, 1), (4096, 3584, 448, 1), (64, 8192, 200, 1), (9, 1536, 0, 1)),
        *((300, 1536, 40, 8), (4096, 2048, 64, 32), (300, 3584, 200, 32), (64, 2048, 0, 32)),
    ],
)
def test_kernel_equals_twin_forward_and_backward(
    dtype: torch.dtype, n_tokens: int, dim: int, n_rows: int, span: int
) -> None:
    generator = torch.Generator(device="cuda").manual_seed(1)
    hidden_TD = torch.randn(n_tokens, dim, device="cuda", generator=generator).to(dtype)
    weight_D = (torch.rand(dim, device="cuda", generator=generator) + 0.5).to(dtype)
    # Unsorted, with repeats and overlaps.
    index_E = torch.randint(span - 1, n_tokens, (n_rows,), device="cuda", generator=generator)
    got = run(pool_normalize, hidden_TD, index_E, weight_D, span)
    # The twin in float32 on the same (rounded) inputs, so that only the kernel's own rounding is left.
    want = run(pool_normalize_reference, hidden_TD.float(), index_E, weight_D.float(), span)

    assert got[0].dtype == torch.float32 and got[1].dtype == dtype and got[2].dtype == dtype
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-6)
    for got_grad, want_grad in zip(got[1:], want[1:], strict=True):
        # Twice the rounding of the gradient's dtype: a repeated row is rounded before and after the sum.
        tolerance = max(1e-5, 2 * torch.finfo(dtype).eps)
        assert (got_grad.float() - want_grad).norm() <= tolerance * want_grad.norm()


@pytest.mark.parametrize("span", [1, 32])
@pytest.mark.parametrize("n_embs", [1, 448, 9000])
def test_every_row_in_order(n_embs: int, span: int) -> None:
    hidden_TD, weight_D = (
        torch.randn(n_embs * span, 1536, device="cuda").bfloat16(),
        torch.rand(1536, device="cuda") + 0.5,
    )
    got = run(pool_normalize, hidden_TD, None, weight_D, span)
    want = run(pool_normalize_reference, hidden_TD.float(), None, weight_D, span)
    for ours, exact in zip(got, want, strict=True):
        assert (ours.float() - exact).norm() <= 1e-2 * exact.norm()


@pytest.mark.parametrize("span", [1, 32])
def test_same_bits_every_time(span: int) -> None:
    hidden_TD = torch.randn(100, 1536, device="cuda").bfloat16()
    weight_D = torch.rand(1536, device="cuda").bfloat16()
    index_E = torch.randint(span - 1, 100, (500,), device="cuda")
    first = run(pool_normalize, hidden_TD, index_E, weight_D, span)
    for _ in range(5):
        assert all(
            torch.equal(a, b)
            for a, b in zip(first, run(pool_normalize, hidden_TD, index_E, weight_D, span), strict=True)
        )
