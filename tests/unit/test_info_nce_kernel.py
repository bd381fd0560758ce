"""The Triton kernels of losses.info_nce against the dense twin, in Triton's interpreter, and compiled for real GPUs.

TRITON_INTERPRET must be set before the kernels' module is imported, so the comparisons run in one subprocess: this file
as a script prints, per case, the error of the loss, of each statistic and of each gradient. The interpreter computes
bfloat16 wrongly, so there the kernels widen it after loading; tests/gpu has the real thing.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from muco_ds.losses import RowIds, false_negative_limit, info_nce, info_nce_dense

from interpreter import run_interpreted

pytest.importorskip("triton", reason="triton is not installed")


@dataclass(frozen=True)
class Case:
    rows: int
    keys: int
    dim: int = 40
    dtype: torch.dtype = torch.float32
    masks: tuple[bool, str] = (True, "mask")
    margin: float | None = None
    more: int = 0  # keys that carry the pair id of a row beside its own positive
    temperature: float = 0.05
    small_blocks: bool = True
    lost: int = 0  # rows whose positive is not among the keys


CASES = {
    "one row": Case(1, 1),
    "ragged": Case(37, 83),
    "no masks": Case(37, 83, masks=(False, "keep")),
    "image mask alone": Case(37, 83, masks=(True, "keep")),
    "target mask alone": Case(37, 83, masks=(False, "mask")),
    "equal targets are positives": Case(37, 83, masks=(True, "positive")),
    "equal targets are positives, nothing masked": Case(37, 83, masks=(False, "positive")),
    "pair ids on several keys": Case(37, 83, more=20),
    "false negatives": Case(37, 83, margin=0.1),
    "false negatives, no masks": Case(37, 83, masks=(False, "keep"), margin=0.05),
    "all at once": Case(37, 83, masks=(True, "positive"), margin=0.05, more=20, temperature=0.02),
    "all at once, blocks of the GPU": Case(
        130, 300, 72, masks=(False, "positive"), margin=0.1, more=40, small_blocks=False
    ),
    "all at once, bfloat16": Case(37, 83, dtype=torch.bfloat16, masks=(True, "positive"), margin=0.05, more=20),
    "fits the blocks": Case(64, 96, 48),
    "as many keys as rows": Case(33, 33),
    "fewer keys than a block": Case(9, 11, 7),
    "temperature of the paper": Case(20, 70, temperature=0.02),
    "cold": Case(20, 70, temperature=0.001),
    "blocks of the GPU": Case(130, 300, 72, small_blocks=False),
    "bfloat16": Case(37, 83, dtype=torch.bfloat16),
    "bfloat16, blocks of the GPU": Case(130, 300, 72, torch.bfloat16, small_blocks=False),
    "float16 is computed as float32": Case(37, 83, dtype=torch.float16),
    "no rows": Case(0, 20),
    "no keys": Case(0, 0),
    "row without positive": Case(21, 50, lost=1),
}


def make_batch(case: Case) -> tuple[torch.Tensor, torch.Tensor, RowIds, RowIds, torch.Tensor | None]:
    """Positives at random places among hard negatives; few images and texts, so that both masks bite; ids are wide.

    Rows lean towards their positives, so that some keys are nearer by more than a margin, but not all. The last is
    limit_R.
    """
    generator = torch.Generator().manual_seed(1)
    query_RD, key_KD = (
        F.normalize(torch.randn(n, case.dim, generator=generator), dim=-1).to(case.dtype)
        for n in (case.rows, case.keys)
    )
    place_K = torch.randperm(case.keys, generator=generator)
    place_R = place_K[: case.rows]
    query_RD = F.normalize(query_RD.float() + 0.1 * key_KD[place_R].float(), dim=-1).to(case.dtype)
    key_ids_K3 = torch.randint(0, 6, (case.keys, 3), generator=generator) * 2**40  # wider than 32 bits
    key_ids_K3[:, 1] = -1
    key_ids_K3[place_R, 1] = torch.arange(case.rows) * 2**32
    query_ids_R3 = key_ids_K3[place_R].clone()
    more_M = place_K[case.rows : case.rows + case.more]
    key_ids_K3[more_M, 1] = torch.randint(0, case.rows // 2 + 1, (len(more_M),), generator=generator) * 2**32
    key_ids_K3[place_R[: case.lost], 1] = -1
    limit_R = None if case.margin is None else false_negative_limit(query_RD, key_KD[place_R], case.margin)
    return query_RD, key_KD, RowIds.from_table(query_ids_R3), RowIds.from_table(key_ids_K3), limit_R


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Of the norm; entries that are not finite must be the same ones."""
    got, want = got.double(), want.double()
    if not torch.equal(got.isfinite(), want.isfinite()):
        return float("inf")
    got, want = got[want.isfinite()], want[want.isfinite()]
    return ((got - want).norm() / want.norm().clamp_min(1e-12)).item()


def compare_with_twin(case: Case) -> dict[str, float]:
    """Errors of kernels, of loss, statistics and gradients, against the dense twin in float64 on the same inputs."""
    query_RD, key_KD, *tables, limit_R = make_batch(case)
    options: dict[str, Any] = {"mask_same_image": case.masks[0], "same_target": case.masks[1], "limit_R": limit_R}
    outputs: list[dict[str, torch.Tensor]] = []
    for loss, dtype in [(info_nce, case.dtype), (info_nce_dense, torch.float64)]:
        query, key = (tensor.detach().to(dtype).requires_grad_() for tensor in (query_RD, key_KD))
        exact = torch.promote_types(dtype, torch.float32)
        temperature = torch.tensor(case.temperature, dtype=exact, requires_grad=True)
        result = loss(query, key, *tables, temperature=temperature, **options)
        grads = torch.autograd.grad(3 * result.loss_sum, [query, key, temperature])
        assert [grad.dtype for grad in grads] == [dtype, dtype, exact] and result.count == case.rows
        names = ["grad_query", "grad_key", "grad_temperature"]
        outputs.append({"loss": result.loss_sum.detach(), **result.stats, **dict(zip(names, grads, strict=True))})
    got, want = outputs
    if case.margin is not None:
        assert 0.02 < want["false_negatives"] / want["entries"] < 0.5
    if case.more or case.masks[1] == "positive":
        assert want["extra_positives"] > 10
    if case.lost:  # the twin's gradient of such a row is unspecified: the row's is NaN, the others' are right
        assert want["loss"].isinf() and got["grad_query"][: case.lost].isnan().all()
        got["grad_query"], want["grad_query"] = got["grad_query"][case.lost :], want["grad_query"][case.lost :]
        del want["grad_key"], want["grad_temperature"]
    return {name: relative_error(got[name], want[name]) for name in want}


def compare_blocks_with_whole() -> dict[str, float]:
    """Errors of the block functions on keys in three blocks, one of them empty, as a ring gives them."""
    from muco_ds.losses import info_nce_triton
    from muco_ds.losses.ids import Masks, label_ids
    from muco_ds.losses.tiles import STATS, Block, RowState

    query_RD, key_KD, query_ids, key_ids, limit_R = make_batch(Case(37, 83, margin=0.05, more=20))
    tables, masks, scale = (query_ids, key_ids), Masks(True, "positive"), torch.tensor(20.0)
    whole = Block(query_RD, key_KD, *label_ids(*tables), masks, scale, limit_R, (0, 0))
    blocks = [slice(0, 50), slice(50, 50), slice(50, 83)]
    state, none = RowState.empty(query_RD), RowState.empty(query_RD[:0])
    for col in blocks:
        info_nce_triton.scan_block(whole.keys(col), state)
        info_nce_triton.scan_block(whole.rows(slice(0, 0)).keys(col), none)
    loss_R, softmax_4R = state.finish()
    grads = [torch.zeros_like(query_RD), torch.zeros_like(key_KD)]
    for col in blocks:
        for rows in (slice(0, 37), slice(0, 0)):
            block = whole.rows(rows).keys(col)
            upstream_R = torch.ones_like(loss_R[rows])
            info_nce_triton.add_block_gradients(block, softmax_4R[:, rows], upstream_R, grads[0][rows], grads[1][col])
    leaves = [query_RD.double().requires_grad_(), key_KD.double().requires_grad_()]
    options: dict[str, Any] = {"temperature": 0.05, "same_target": "positive", "limit_R": limit_R}
    want = info_nce_dense(leaves[0], leaves[1], *tables, **options)
    wanted = torch.autograd.grad(want.loss_sum, leaves)
    errors = {"loss": relative_error(loss_R.sum(), want.loss_sum.detach())}
    stats = dict(zip(STATS, state.stats(83, scale).unbind(), strict=True))
    errors |= {name: relative_error(stats[name], value) for name, value in want.stats.items()}
    errors |= {name: relative_error(*pair) for name, *pair in zip(("query", "key"), grads, wanted, strict=True)}
    return errors


def run_cases() -> dict[str, dict[str, float]]:
    from muco_ds.losses import info_nce_triton

    module = sys.modules["muco_ds.losses.info_nce"]
    vars(module)["block_functions"] = lambda query_RD: info_nce_triton
    sizes = {name: getattr(info_nce_triton, name) for name in SMALL_BLOCKS}
    found = {}
    for name, case in CASES.items():
        vars(info_nce_triton).update(SMALL_BLOCKS if case.small_blocks else sizes)
        found[name] = compare_with_twin(case)
    vars(info_nce_triton).update(SMALL_BLOCKS)
    return found | {"keys in blocks": compare_blocks_with_whole()}


COUNTED = ("same_image", "same_target", "false_negatives", "extra_positives", "entries", "top1", "negative_rows")

# Every loop runs more than once, and no size divides another.
SMALL_BLOCKS = {"BLOCK_R": 16, "BLOCK_K": 16, "BLOCK_D_BYTES": 64, "GROUP": 2, "SPLITS": 3, "GRADIENT_TILE": (24, 40)}


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, float]]:
    return run_interpreted(__file__)


@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_the_dense_twin(name: str, interpreted: dict[str, dict[str, float]]) -> None:
    case, errors = CASES[name], interpreted[name]
    # Logits are good to 1e-7 of the largest, 1 / temperature. bfloat16 rounds dL/ds and the gradient once each, in the
    # interpreter towards zero.
    exact = 3e-6 * max(1.0, 0.02 / case.temperature)
    rounded = {torch.float32: exact, torch.float16: 1e-3, torch.bfloat16: 5e-3}[case.dtype]
    for output, error in errors.items():
        counted = output in COUNTED
        assert error <= (0 if counted else rounded if output.startswith("grad") else exact), output


def test_keys_in_blocks_add_up(interpreted: dict[str, dict[str, float]]) -> None:
    errors = interpreted["keys in blocks"]
    assert errors.keys() >= {"loss", *COUNTED, "query", "key"}
    assert all(error <= (0 if output in COUNTED else 3e-6) for output, error in errors.items())


@pytest.mark.parametrize("limited, same_target, positives", [(False, "mask", False), (True, "positive", True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_compile_for_gpus_that_are_not_here(
    dtype: torch.dtype, limited: bool, same_target: str, positives: bool
) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from muco_ds.losses import info_nce_triton

    element = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    pointers = dict.fromkeys(["query_ptr", "key_ptr", "grad_ptr"], f"*{element}")
    constants = {name: getattr(info_nce_triton, name) for name in ("BLOCK_R", "BLOCK_K", "GROUP")}
    constants |= {"BLOCK_D": info_nce_triton.BLOCK_D_BYTES // dtype.itemsize, "DIM": 1536}
    constants |= {"SAME_IMAGE": True, "SAME_TARGET": same_target, "LIMITED": limited}
    for kernel in (info_nce_triton._scan_kernel, info_nce_triton._gradient_kernel):
        signature = {}
        for name in kernel.arg_names:
            label = name.endswith("label_ptr")
            signature[name] = pointers.get(name, "*i32" if label else "*fp32" if name.endswith("_ptr") else "i32")
        known = constants | ({"POSITIVES": positives} if "POSITIVES" in kernel.arg_names else {})
        signature |= dict.fromkeys(known, "constexpr")
        # What the launch knows of addresses and widths: without it there are no wide loads, hence no pipeline.
        aligned = [i for i, name in enumerate(kernel.arg_names) if name.endswith("_ptr") or name == "stride_grad"]
        attrs = {(i,): [["tt.divisibility", 16]] for i in aligned}
        # Two programs of bfloat16 on a multiprocessor: 164 KB of shared memory on an A100, 228 KB on a H100.
        for capability, shared in ((80, 163840 // 2), (90, 232448 // 2)):
            source = ASTSource(fn=kernel, signature=signature, constexprs=known, attrs=attrs)
            compiled = compile(
                source, target=GPUTarget("cuda", capability, 32), options=dict(info_nce_triton.OPTIONS[dtype])
            )
            assert compiled.asm["cubin"] and compiled.metadata.shared <= shared
            tensor_cores = "wgmma.mma_async" if capability == 90 else "mma.sync"
            assert tensor_cores in compiled.asm["ptx"]


if __name__ == "__main__":
    json.dump(run_cases(), sys.stdout)
