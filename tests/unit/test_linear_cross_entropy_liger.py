"""losses.linear_cross_entropy's call of liger-kernel, whose kernels run here in Triton's interpreter.

TRITON_INTERPRET must be set before the kernels' module is imported, so the comparison runs in a subprocess: this file
as a script prints, per case, the relative error of loss and gradients.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable

import pytest
import torch

from muco_ds.losses import linear_cross_entropy_reference

from interpreter import run_interpreted

pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")

# name: (N, V, D, whether the table learns)
CASES = {
    "several chunks": (40, 300, 48, True),
    "large vocabulary": (7, 1001, 32, True),
    "one row": (1, 9, 8, True),
    "frozen table": (5, 101, 16, False),
}


def errors_of(n_rows: int, n_vocabulary: int, dim: int, table_learns: bool) -> list[float]:
    module = importlib.import_module("muco_ds.losses.linear_cross_entropy")
    generator = torch.Generator().manual_seed(1)
    state_ND = torch.randn(n_rows, dim, generator=generator)
    weight_VD = torch.randn(n_vocabulary, dim, generator=generator)
    label_N = torch.randint(0, n_vocabulary, (n_rows,), generator=generator)

    def run(loss: Callable[..., torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [state_ND.to(dtype).requires_grad_(), weight_VD.to(dtype).requires_grad_(table_learns)]
        loss_sum = loss(*leaves, label_N)
        assert loss_sum.shape == () and loss_sum.dtype == dtype
        return [loss_sum, *torch.autograd.grad(loss_sum * 0.37, leaves if table_learns else leaves[:1])]

    got, want = run(module._liger, torch.float32), run(linear_cross_entropy_reference, torch.float64)
    return [((a - b).norm() / b.norm()).item() for a, b in zip(got, want, strict=True)]


def test_liger_is_called_as_it_wants_to_be() -> None:
    errors = run_interpreted(__file__)
    assert errors.keys() == CASES.keys()
    for name, values in errors.items():
        assert max(values) < 2e-6, name


if __name__ == "__main__":
    json.dump({name: errors_of(*case) for name, case in CASES.items()}, sys.stdout)
