"""The kernels of losses.info_nce on a GPU, in the dtypes and widths of training, against their twins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from muco_ds.losses import InfoNCE, RowIds, false_negative_limit, info_nce, info_nce_dense

info_nce_triton = pytest.importorskip("muco_ds.losses.info_nce_triton", reason="triton is not installed")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

NAMES = ["grad_query", "grad_key", "grad_temperature"]
COUNTED = ("same_image", "same_target", "extra_positives", "entries", "negative_rows")
OPTIONS: dict[str, dict[str, Any]] = {
    "masks": {},
    "equal targets are positives": {"same_target": "positive"},
    # Random keys are nowhere near a row, which is at 0.7 to its positive: this margin takes out about half of them.
    "false negatives": {"margin": -0.7, "temperature": 0.2},
    "all at once": {"margin": -0.7, "temperature": 0.2, "same_target": "positive", "mask_same_image": False},
}


def make_batch(
    n_rows: int, n_keys: int, dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, RowIds, RowIds]:
    """Rows near their positives, these at random places among hard negatives; ids need 64 bits, both masks bite."""
    generator = torch.Generator(device="cuda").manual_seed(1)
    options = {"device": "cuda", "generator": generator}
    key_KD = F.normalize(torch.randn(n_keys, dim, **options), dim=-1)
    place_R = torch.randperm(n_keys, **options)[:n_rows]
    query_RD = F.normalize(key_KD[place_R] + torch.randn(n_rows, dim, **options) * dim**-0.5, dim=-1)
    key_ids_K3 = torch.randint(0, max(n_keys // 7, 2), (n_keys, 3), **options) * 2**40
    key_ids_K3[:, 1] = -1
    key_ids_K3[place_R, 1] = torch.arange(n_rows, device="cuda") * 2**32
    query_ids, key_ids = RowIds.from_table(key_ids_K3[place_R]), RowIds.from_table(key_ids_K3)
    return query_RD.to(dtype), key_KD.to(dtype), query_ids, key_ids


def run(
    loss: object,
    query_RD: torch.Tensor,
    key_KD: torch.Tensor,
    *tables: RowIds,
    temperature: float = 0.02,
    margin: float | None = None,
    **options: Any,
) -> dict[str, torch.Tensor]:
    if margin is not None:
        pairs = tables[1].pair_id_N.sort()
        own_R = pairs.indices[torch.searchsorted(pairs.values, tables[0].pair_id_N)]
        options["limit_R"] = false_negative_limit(query_RD, key_KD[own_R], margin)
    exact = torch.promote_types(query_RD.dtype, torch.float32)
    tau = torch.tensor(temperature, device="cuda", dtype=exact, requires_grad=True)
    leaves = [query_RD.detach().clone().requires_grad_(), key_KD.detach().clone().requires_grad_(), tau]
    assert callable(loss)
    result: InfoNCE = loss(leaves[0], leaves[1], *tables, temperature=tau, **options)
    grads = torch.autograd.grad(result.loss_sum, leaves)
    return {"loss": result.loss_sum.detach(), **result.stats, **dict(zip(NAMES, grads, strict=True))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "n_rows, n_keys, dim",
    [
        (1, 1, 48),
        (37, 83, 40),
        (130, 300, 1536),
        (1000, 5003, 1536),
        (300, 2000, 3584),
        (200, 700, 4096),
        (9000, 17000, 64),  # more than one tile of gradients, more than one panel of rows
        (0, 20, 64),
    ],
)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_kernels_equal_the_dense_twin(
    n_rows: int, n_keys: int, dim: int, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    batch = make_batch(n_rows, n_keys, dim, dtype)
    got = run(info_nce, *batch, **options)
    # The twin in float64 on the same (rounded) inputs, so that only the kernels' own rounding is left.
    want = run(info_nce_dense, batch[0].double(), batch[1].double(), *batch[2:], **options)
    assert got["grad_query"].dtype == got["grad_key"].dtype == dtype
    for name, value in want.items():
        error = (got[name].double() - value.double()).norm() / value.double().norm().clamp_min(1e-12)
        if name in ("top1", "false_negatives"):  # two nearly equal logits may change places
            assert (got[name] - value).abs() <= max(1, n_rows // 1000, 1e-5 * want["entries"])
        elif name in COUNTED:
            assert got[name] == value
        else:  # bfloat16: dL/ds and the gradient are rounded once each; an entry at the limit may fall on either side
            coarse = (dtype == torch.bfloat16 or "margin" in options) and name.startswith("grad")
            assert error <= (4e-3 if coarse else 5e-5), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_every_time(dtype: torch.dtype) -> None:
    batch = make_batch(1000, 5003, 1536, dtype)
    first = run(info_nce, *batch)
    for _ in range(3):
        again = run(info_nce, *batch)
        assert all(torch.equal(again[name], first[name]) for name in first)


def test_float64_takes_the_plain_path() -> None:
    batch = make_batch(50, 200, 64, torch.float64)
    got, want = run(info_nce, *batch), run(info_nce_dense, *batch)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-9, atol=1e-9)


def test_memory_is_bounded_by_the_gradient_tile() -> None:
    size, dim = 32768, 256
    query_RD, key_KD, *tables = make_batch(size, size, dim, torch.bfloat16)
    query_RD.requires_grad_()
    key_KD.requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    info_nce(query_RD, key_KD, *tables).loss_sum.backward()
    assert query_RD.grad is not None and key_KD.grad is not None
    rows, keys = info_nce_triton.GRADIENT_TILE
    tile, float32_sums = 2 * rows * keys, 4 * dim * size * 2  # the keys' sums, and at most as much for the rows'
    gradients = 2 * (2 * size * dim)
    assert torch.cuda.max_memory_allocated() - before < tile + float32_sums + gradients + 64 * 2**20
    assert tile + float32_sums < 0.1 * 4 * size * size
