"""losses.linear_cross_entropy on a GPU: liger-kernel's kernel and the chunked form against dense logits, and memory."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

import pytest
import torch

from muco_ds.losses import linear_cross_entropy, linear_cross_entropy_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

module = importlib.import_module("muco_ds.losses.linear_cross_entropy")
HAS_LIGER = importlib.util.find_spec("liger_kernel") is not None
needs_liger = pytest.mark.skipif(not HAS_LIGER, reason="liger-kernel is not installed")
FORMS = [pytest.param("liger", marks=needs_liger), "chunked"]

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of the two serves ``linear_cross_entropy``."""
    if request.param == "chunked":
        monkeypatch.setattr(module, "_liger_serves", lambda *_: False)
    return request.param


def make_inputs(n_rows: int, n_vocabulary: int, dim: int, dtype: torch.dtype) -> Inputs:
    """Logits of standard deviation 4."""
    generator = torch.Generator("cuda").manual_seed(1)
    options = {"device": "cuda", "generator": generator}
    state_ND = torch.randn(n_rows, dim, **options).to(dtype)
    weight_VD = (torch.randn(n_vocabulary, dim, **options) * 4 / dim**0.5).to(dtype)
    return state_ND, weight_VD, torch.randint(0, n_vocabulary, (n_rows,), **options)


def run(loss: Callable[..., torch.Tensor], inputs: Inputs, table_learns: bool = True) -> list[torch.Tensor]:
    leaves = [inputs[0].detach().clone().requires_grad_(), inputs[1].detach().clone().requires_grad_(table_learns)]
    loss_sum = loss(*leaves, inputs[2])
    learning = [leaf for leaf in leaves if leaf.requires_grad]
    return [loss_sum.detach(), *torch.autograd.grad(loss_sum * 0.37, learning)]


@pytest.mark.parametrize("table_learns", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1001, 64), (700, 50_257, 96), (300, 151_936, 2048)])
def test_equals_dense(form: str, shape: tuple[int, int, int], dtype: torch.dtype, table_learns: bool) -> None:
    inputs = make_inputs(*shape, dtype)
    got = run(linear_cross_entropy, inputs, table_learns)
    want = run(linear_cross_entropy_reference, (inputs[0].double(), inputs[1].double(), inputs[2]), table_learns)
    assert [value.dtype for value in got] == [torch.float32] + [dtype] * (2 if table_learns else 1)
    # bfloat16: liger-kernel rounds the logits too, the chunked form the softmax's gradient alone.
    exact = dtype == torch.float32
    tolerances = [1e-5 if exact else 5e-3 if form == "liger" else 1e-5] + [1e-4 if exact else 2e-2] * 2
    for a, b, tolerance in zip(got, want, tolerances, strict=False):
        assert (a.double() - b).norm() <= tolerance * b.norm()


def test_no_rows_keep_the_graph(form: str) -> None:
    got = run(linear_cross_entropy, make_inputs(0, 1001, 64, torch.bfloat16))
    assert got[0] == 0 and got[1].shape == (0, 64) and (got[2] == 0).all() and got[2].shape == (1001, 64)


def test_a_table_that_learns_beneath_frozen_states(form: str) -> None:
    state_ND, weight_VD, label_N = make_inputs(50, 1001, 64, torch.float32)
    weight_VD.requires_grad_()
    (grad_VD,) = torch.autograd.grad(linear_cross_entropy(state_ND, weight_VD, label_N), weight_VD)
    (want_VD,) = torch.autograd.grad(linear_cross_entropy_reference(state_ND, weight_VD, label_N), weight_VD)
    assert (grad_VD - want_VD).norm() < 1e-4 * want_VD.norm()


def test_memory_of_32k_tokens_against_152k_words(form: str) -> None:
    inputs = make_inputs(32_768, 151_936, 2048, torch.bfloat16)
    inputs[0].requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    linear_cross_entropy(*inputs).backward()
    beyond = torch.cuda.max_memory_allocated() - held
    dense_logits = 4 * 32_768 * 151_936
    assert beyond < 0.05 * dense_logits, f"{beyond / 2**30:.2f} GiB; dense logits {dense_logits / 2**30:.1f} GiB"
