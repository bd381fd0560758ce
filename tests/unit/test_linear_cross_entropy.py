"""losses.linear_cross_entropy on the CPU against a dense float64 cross-entropy in plain autograd."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from muco_ds.losses import linear_cross_entropy, linear_cross_entropy_reference

from largest_tensor import LargestTensor

# The package exports the function under its module's name.
module = importlib.import_module("muco_ds.losses.linear_cross_entropy")

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def make_inputs(n_rows: int, n_vocabulary: int, dim: int, dtype: torch.dtype = torch.float32) -> Inputs:
    """Logits of standard deviation 4; the first and the last entry of the table are labels too."""
    generator = torch.Generator().manual_seed(n_rows)
    state_ND = torch.randn(n_rows, dim, generator=generator).to(dtype)
    weight_VD = (torch.randn(n_vocabulary, dim, generator=generator) * 4 / dim**0.5).to(dtype)
    label_N = torch.randint(0, n_vocabulary, (n_rows,), generator=generator)
    label_N[:1], label_N[-1:] = 0, n_vocabulary - 1
    return state_ND, weight_VD, label_N


def run(loss: Loss, inputs: Inputs, upstream: float = 0.37) -> list[torch.Tensor]:
    """Loss, and both gradients of ``upstream`` times it."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs[:2]]
    loss_sum = loss(leaves[0], leaves[1], inputs[2])
    return [loss_sum.detach(), *torch.autograd.grad(loss_sum * upstream, leaves)]


def exact(inputs: Inputs, upstream: float = 0.37) -> list[torch.Tensor]:
    """``run`` of torch's own dense cross-entropy in float64."""
    double = (inputs[0].double(), inputs[1].double(), inputs[2])
    return run(lambda x, w, y: F.cross_entropy(x @ w.T, y, reduction="sum"), double, upstream)


def relative_errors(got: list[torch.Tensor], want: list[torch.Tensor]) -> list[float]:
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, want, strict=True)]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven rows a chunk at a vocabulary of 101."""
    monkeypatch.setattr(module, "MIN_CHUNK_ROWS", 1)
    monkeypatch.setattr(module, "CHUNK_BYTES", 7 * 101 * 4)


@pytest.mark.parametrize("loss", [linear_cross_entropy, linear_cross_entropy_reference])
@pytest.mark.parametrize("shape", [(1, 101, 5), (7, 101, 16), (40, 101, 33), (3, 1, 4)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_equals_dense_cross_entropy(
    loss: Loss, shape: tuple[int, int, int], dtype: torch.dtype, tolerance: float, small_chunks: None
) -> None:
    inputs = make_inputs(*shape, dtype)
    got, want = run(loss, inputs), exact(inputs)
    assert got[0].shape == () and all(value.dtype == dtype for value in got)
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).norm() <= tolerance * max(b.norm().item(), 1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_multiplied_and_summed_in_float32(dtype: torch.dtype, small_chunks: None) -> None:
    inputs = make_inputs(60, 101, 33, dtype)
    got, want = run(linear_cross_entropy, inputs), exact(inputs)
    assert [value.dtype for value in got] == [torch.float32, dtype, dtype]
    errors = relative_errors(got, want)
    # Each gradient is rounded twice, after the sum over chunks and after the upstream factor, never on the way.
    assert errors[0] < 1e-6 and max(errors[1:]) < torch.finfo(dtype).eps


def test_mixed_types_meet_in_the_wider_and_gradients_keep_their_own(small_chunks: None) -> None:
    state_ND, weight_VD, label_N = make_inputs(20, 101, 16)
    inputs = (state_ND, weight_VD.bfloat16(), label_N)
    got, want = run(linear_cross_entropy, inputs), exact(inputs)
    assert [value.dtype for value in got] == [torch.float32, torch.float32, torch.bfloat16]
    errors = relative_errors(got, want)
    assert max(errors[:2]) < 2e-6 and errors[2] < 2**-8


def test_autocast_changes_nothing() -> None:
    inputs = make_inputs(20, 101, 16)
    want = run(linear_cross_entropy, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(linear_cross_entropy, inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_large_logits_do_not_overflow() -> None:
    state_ND, weight_VD, label_N = make_inputs(20, 101, 16)
    inputs = (state_ND * 1e3, weight_VD, label_N)  # up to some 15,000: e^s is inf, and most p[label] are 0
    got, want = run(linear_cross_entropy, inputs), exact(inputs)
    assert want[0] > 1e4 and max(relative_errors(got, want)) < 1e-5


@pytest.mark.parametrize(
    "state_learns, table_learns, products", [(True, True, 3), (True, False, 2), (False, True, 2), (False, False, 1)]
)
def test_only_wanted_gradients_are_computed(
    state_learns: bool, table_learns: bool, products: int, small_chunks: None
) -> None:
    inputs = make_inputs(20, 101, 16)
    leaves = inputs[0].clone().requires_grad_(state_learns), inputs[1].clone().requires_grad_(table_learns)
    with FlopCounterMode(display=False) as counter:
        loss_sum = linear_cross_entropy(*leaves, inputs[2])
        if state_learns or table_learns:
            loss_sum.backward()
    assert counter.get_total_flops() == products * 2 * 20 * 101 * 16
    want = exact(inputs, 1.0)
    torch.testing.assert_close(loss_sum.detach(), want[0].float())
    for leaf, grad in zip(leaves, want[1:], strict=True):
        if leaf.requires_grad:
            torch.testing.assert_close(leaf.grad, grad.float())
        else:
            assert leaf.grad is None


def test_without_a_graph_no_gradient_is_computed() -> None:
    state_ND, weight_VD, label_N = make_inputs(20, 101, 16)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        loss_sum = linear_cross_entropy(state_ND.requires_grad_(), weight_VD.requires_grad_(), label_N)
    assert not loss_sum.requires_grad and counter.get_total_flops() == 2 * 20 * 101 * 16


def test_no_rows_are_zero_and_keep_the_graph() -> None:
    got = run(linear_cross_entropy, make_inputs(0, 101, 16))
    assert [tuple(value.shape) for value in got] == [(), (0, 16), (101, 16)]
    assert got[0] == 0 and got[0].dtype == torch.float32 and (got[2] == 0).all()


def test_backward_may_run_twice_and_add_up() -> None:
    state_ND, weight_VD, label_N = make_inputs(5, 101, 16)
    state_ND.requires_grad_()
    loss_sum = linear_cross_entropy(state_ND, weight_VD, label_N)
    for factor in (0.5, 2.0):
        (loss_sum * factor).backward(retain_graph=True)
    assert state_ND.grad is not None
    torch.testing.assert_close(state_ND.grad, exact((state_ND, weight_VD, label_N), 2.5)[1].float())


@pytest.mark.parametrize("table_learns", [True, False])
def test_no_tensor_is_larger_than_a_chunk(table_learns: bool) -> None:
    state_ND, weight_VD, label_N = make_inputs(2048, 50_000, 16)
    state_ND.requires_grad_()
    weight_VD.requires_grad_(table_learns)
    with LargestTensor() as made:
        linear_cross_entropy(state_ND, weight_VD, label_N).backward()
    chunk = module.CHUNK_BYTES // 4
    assert made.numel <= chunk < 2048 * 50_000 / 3
    # So many rows are a chunk that the table is not read more often than needed.
    assert made.numel > chunk * 0.99
