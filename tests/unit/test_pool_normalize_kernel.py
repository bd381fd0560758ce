"""The Triton kernels of ops.pool_normalize against their twin, in Triton's interpreter, and compiled for real GPUs.

TRITON_INTERPRET must be set before the kernels' module is imported, so the comparisons run in one subprocess: this file
as a script prints, per case, the largest error of each output. Half precision there is float16: the interpreter
computes bfloat16 wrongly (tests/gpu has it).
"""

from __future__ import annotations

import json
import sys

import pytest
import torch

from interpreter import run_interpreted

pytest.importorskip("triton", reason="triton is not installed")

# name: (T, D, pooled rows (last of each span), dtype, eps, scale of the hidden states, span)
CASES: dict[str, tuple[int, int, list[int] | None, torch.dtype, float, float, int]] = {
    "one row": (5, 48, [3], torch.float32, 1e-6, 1.0, 1),
    "unsorted and repeated": (9, 48, [7, 2, 7, 0, 7], torch.float32, 1e-6, 1.0, 1),
    "width of 2B": (6, 1536, [5, 1], torch.float32, 1e-6, 1.0, 1),
    "power of two": (6, 64, [0, 1, 2, 3, 4, 5], torch.float32, 1e-6, 1.0, 1),
    "more rows than programs": (40, 16, [i * 7 % 40 for i in range(131)], torch.float32, 1e-6, 1.0, 1),
    "half precision": (9, 48, [8, 1, 3], torch.float16, 1e-6, 1.0, 1),
    "large eps": (5, 48, [0, 4], torch.float32, 0.5, 1.0, 1),
    "small states": (5, 48, [0, 4], torch.float32, 1e-6, 1e-4, 1),
    "clamped norm": (5, 48, [0, 4], torch.float32, 1e-6, 1e-17, 1),
    "no rows": (5, 48, [], torch.float32, 1e-6, 1.0, 1),
    "span of 8, overlapping": (20, 48, [9, 7, 19, 9], torch.float32, 1e-6, 1.0, 8),
    "span of 32": (70, 96, [31, 69, 63], torch.float32, 1e-6, 1.0, 32),
    "span of 32 in half precision": (70, 96, [31, 69, 63], torch.float16, 1e-6, 1.0, 32),
    "more spans than programs": (40, 16, [7 + i * 7 % 33 for i in range(131)], torch.float32, 1e-6, 1.0, 8),
    "span with large eps": (20, 48, [9, 7], torch.float32, 0.5, 1.0, 8),
    "span with clamped norm": (20, 48, [9, 7], torch.float32, 1e-6, 1e-17, 8),
    "every row": (13, 48, None, torch.float32, 1e-6, 1.0, 1),
    "every row, in spans, in half precision": (24, 48, None, torch.float16, 1e-6, 1.0, 8),
    "no row at all": (0, 48, None, torch.float32, 1e-6, 1.0, 1),
    "no row of spans": (0, 48, None, torch.float32, 1e-6, 1.0, 8),
    "no spans": (40, 48, [], torch.float32, 1e-6, 1.0, 32),
}


def compare_with_twin(name: str) -> dict[str, float]:
    """Largest error, relative to the largest entry, of embedding and gradients; hidden states are a strided view."""
    from muco_ds.ops.pool_normalize import pool_normalize_reference
    from muco_ds.ops.pool_normalize_triton import pool_normalize_triton

    n_tokens, dim, index, dtype, eps, scale, span = CASES[name]
    generator = torch.Generator().manual_seed(1)
    wide = (torch.randn(n_tokens, 2 * dim, generator=generator) * scale).to(dtype)
    weight_D = (torch.rand(dim, generator=generator) + 0.5).to(dtype)
    # Of every row the twin is told one by one.
    told = range(span - 1, n_tokens, span) if index is None else index
    index_E = torch.tensor(told, dtype=torch.int64)
    upstream_ED = torch.randn(len(index_E), dim, generator=generator)
    outputs = []
    for pool in (pool_normalize_triton, pool_normalize_reference):
        leaves = [wide[:, :dim].detach().requires_grad_(), weight_D.clone().requires_grad_()]
        given_E = None if index is None and pool is pool_normalize_triton else index_E
        emb_ED = pool(leaves[0], given_E, leaves[1], eps, span=span)
        assert emb_ED.dtype == torch.float32 and emb_ED.shape == (len(index_E), dim)
        outputs.append([emb_ED, *torch.autograd.grad(emb_ED, leaves, upstream_ED)])
    errors = {}
    for label, got, want in zip(["emb", "grad_hidden", "grad_weight"], *outputs, strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape
        size = want.abs().max().item() if want.numel() else 0.0
        errors[label] = (got.float() - want.float()).abs().max().item() / (size or 1.0) if got.numel() else 0.0
    return errors


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, float]]:
    return run_interpreted(__file__)


@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_twin_forward_and_backward(name: str, interpreted: dict[str, dict[str, float]]) -> None:
    half = CASES[name][3] == torch.float16
    errors = interpreted[name]
    assert errors["emb"] < 1e-6
    # Gradients in half precision are rounded once on each side: one unit in the last place apart at most.
    assert errors["grad_hidden"] < (2e-3 if half else 5e-6) and errors["grad_weight"] < (2e-3 if half else 5e-6)


@pytest.mark.parametrize("span", [1, 32])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_kernels_compile_for_gpus_that_are_not_here(dtype: str, span: int) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from muco_ds.ops.pool_normalize_triton import _backward_kernel, _forward_kernel

    pointers = {"hidden_ptr": dtype, "index_ptr": "i64", "weight_ptr": dtype, "grad_row_ptr": dtype}
    for kernel in (_forward_kernel, _backward_kernel):
        signature = {
            arg: f"*{pointers.get(arg, 'fp32')}" if arg.endswith("_ptr") else "fp32" if arg.endswith("eps") else "i32"
            for arg in kernel.arg_names
        } | {"SPAN": "constexpr", "BLOCK": "constexpr"}
        for capability in (80, 90):
            source = ASTSource(fn=kernel, signature=signature, constexprs={"SPAN": span, "BLOCK": 2048})
            assert compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]


if __name__ == "__main__":
    json.dump({name: compare_with_twin(name) for name in CASES}, sys.stdout)
