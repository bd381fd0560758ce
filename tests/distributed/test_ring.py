"""The ring gives what the gathered loss gives, on every rank, and never holds the keys of all ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from muco_ds.distributed.gather import gather_rows, gather_table
from muco_ds.distributed.ring import ring_info_nce
from muco_ds.distributed.testing import run_distributed
from muco_ds.losses import InfoNCE, RowIds, false_negative_limit, info_nce

from largest_tensor import LargestTensor

# Per rank: (query rows, of which the positive is on the next rank, hard negatives).
SPLITS = {
    "one rank": [(6, 0, 3)],
    "even": [(5, 0, 2), (5, 0, 2)],
    "ragged": [(7, 2, 0), (2, 1, 5)],
    "ranks without rows or keys": [(5, 0, 3), (0, 0, 4), (3, 1, 0), (0, 0, 0)],
    "no rows on two": [(0, 0, 0), (4, 2, 1)],
    "nothing anywhere": [(0, 0, 0), (0, 0, 0)],
}
DIM = 6
COUNTED = ("same_image", "same_target", "false_negatives", "extra_positives", "entries", "top1", "negative_rows")
OPTIONS: list[dict[str, Any]] = [
    {},
    {"mask_same_image": False, "same_target": "keep"},
    {"margin": 0.3, "same_target": "positive"},
    {"margin": 0.1, "mask_same_image": False},
]


def batch_of_rank(split: list[tuple[int, int, int]], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """This rank's (query_RD, key_ND, query_ids_R3, key_ids_N3), the keys per rank, the rows' own positives.

    Few images, few texts; some hard negatives carry a pair id and so are positives, of rows of any rank.
    """
    rank, world = dist.get_rank(), len(split)
    generator = torch.Generator().manual_seed(5)
    n_pairs = sum(rows for rows, *_ in split)
    ids_N3 = torch.randint(0, 3, (n_pairs, 3), generator=generator)
    ids_N3[:, 1] = torch.arange(n_pairs)
    query_ND, target_ND = F.normalize(torch.randn(2, n_pairs, DIM, generator=generator, dtype=torch.float64), dim=-1)
    mine = list(torch.arange(n_pairs).split([rows for rows, *_ in split]))
    # The last `moved` targets of a rank lie on the next one.
    kept = [rows[: len(rows) - moved] for rows, (_, moved, _) in zip(mine, split, strict=True)]
    moved = [rows[len(rows) - moved :] for rows, (_, moved, _) in zip(mine, split, strict=True)]
    targets = [torch.cat([kept[r], moved[(r - 1) % world]]) for r in range(world)]
    n_negatives = split[rank][2]
    negative_ND = F.normalize(torch.randn(n_negatives, DIM, generator=generator, dtype=torch.float64), dim=-1)
    pair_ids = [(3 * i + rank) % n_pairs if i % 2 and n_pairs else -1 for i in range(n_negatives)]
    negative_ids_N3 = torch.tensor([[i % 3, pair, 50 + i] for i, pair in enumerate(pair_ids)], dtype=torch.int64)
    negative_ids_N3 = negative_ids_N3.reshape(-1, 3)
    key_ND = torch.cat([target_ND[targets[rank]], negative_ND])
    key_ids_N3 = torch.cat([ids_N3[targets[rank]], negative_ids_N3])
    counts = torch.tensor([len(targets[r]) + split[r][2] for r in range(world)])
    own_RD = target_ND[mine[rank]].to(dtype)
    return query_ND[mine[rank]].to(dtype), key_ND.to(dtype), ids_N3[mine[rank]], key_ids_N3, counts, own_RD


def results_of(
    form: str, split: list[tuple[int, int, int]], dtype: torch.dtype, chosen: dict[str, Any]
) -> dict[str, torch.Tensor]:
    query_RD, key_ND, query_ids_R3, key_ids_N3, counts_W, own_RD = batch_of_rank(split, dtype)
    leaves = [query_RD.requires_grad_(), key_ND.requires_grad_(), torch.tensor(0.1, dtype=dtype, requires_grad=True)]
    counts, query_ids = counts_W.tolist(), RowIds.from_table(query_ids_R3)
    options: dict[str, Any] = {"temperature": leaves[2], "tile_rows": 2, "tile_keys": 3, **chosen}
    margin = options.pop("margin", None)
    options["limit_R"] = None if margin is None else false_negative_limit(query_RD, own_RD, margin)
    if form == "ring":
        result = ring_info_nce(query_RD, key_ND, query_ids, RowIds.from_table(key_ids_N3), counts, **options)
    else:
        key_ids = RowIds.from_table(gather_table(key_ids_N3, counts))
        result = info_nce(query_RD, gather_rows(key_ND, counts), query_ids, key_ids, **options)
    assert isinstance(result, InfoNCE) and result.count == len(query_RD)
    # Each rank's loss has a weight of its own, so that a gradient that went to the wrong rank is another one.
    grads = torch.autograd.grad(result.loss_sum * (dist.get_rank() + 1), leaves)
    assert [grad.dtype for grad in grads] == [dtype] * 3
    names = ["grad_query", "grad_key", "grad_temperature"]
    return {"loss": result.loss_sum.detach(), **result.stats, **dict(zip(names, grads, strict=True))}


def both_forms(split: list[tuple[int, int, int]]) -> list[tuple[str, dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    found = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for options in OPTIONS:
            ring, gathered = (results_of(form, split, dtype, options) for form in ("ring", "gathered"))
            found.append((f"{dtype} {options}", ring, gathered))
    return found


@pytest.mark.parametrize("name", SPLITS)
def test_ring_equals_the_gathered_loss(name: str) -> None:
    split = SPLITS[name]
    seen: dict[str, float] = {}
    for rank, found in enumerate(run_distributed(both_forms, len(split), split)):
        for case, ring, gathered in found:
            assert ring.keys() == gathered.keys()
            for output, want in gathered.items():
                tolerance = 1e-12 if "float64" in case else 1e-6 if "float32" in case else 1e-2
                if output == "grad_temperature":  # one sum over all entries, whose terms cancel
                    tolerance = max(tolerance, 1e-5 * ("float64" not in case))
                torch.testing.assert_close(
                    ring[output],
                    want,
                    rtol=0 if output in COUNTED else tolerance,
                    atol=tolerance * max(1.0, want.abs().max().item() if want.numel() else 0.0),
                    msg=lambda text, where=(rank, case, output): f"{where}: {text}",
                )
            seen = {output: seen.get(output, 0.0) + float(gathered[output].sum()) for output in COUNTED}
            if sum(rows for rows, *_ in split) and split[rank][0] + split[rank][2]:
                assert gathered["grad_key"].abs().sum() > 0  # also from other ranks' rows where this one has none
    if sum(rows for rows, *_ in split) > 4:
        assert all(seen.values()), seen


def largest_tensors(rows: int, dim: int) -> tuple[int, int, int]:
    """Largest number of entries seen by (ring, gathered), and that of this rank's keys."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)
    ids_N3 = torch.arange(rank * rows, (rank + 1) * rows)[:, None].expand(-1, 3).contiguous()
    counts, seen = [rows] * world, []
    for form in ("ring", "gathered"):
        query_RD, key_ND = (F.normalize(torch.randn(rows, dim), dim=-1).requires_grad_() for _ in range(2))
        with LargestTensor() as largest:
            if form == "ring":
                ids = RowIds.from_table(ids_N3)
                loss = ring_info_nce(query_RD, key_ND, ids, ids, counts, tile_rows=16, tile_keys=16)
            else:
                key_ids = RowIds.from_table(gather_table(ids_N3, counts))
                key_KD = gather_rows(key_ND, counts)
                loss = info_nce(query_RD, key_KD, RowIds.from_table(ids_N3), key_ids, tile_rows=16, tile_keys=16)
            loss.loss_sum.backward()
        seen.append(largest.numel)
    return seen[0], seen[1], rows * dim


def test_no_tensor_is_larger_than_one_ranks_block() -> None:
    for ring, gathered, block in run_distributed(largest_tensors, 4, 64, 32):
        assert ring == block
        assert gathered == 4 * block  # what the ring is for: the mode does see the gathered keys


def row_that_lost_its_positive() -> tuple[float, list[bool]]:
    rank = dist.get_rank()
    query_RD = torch.eye(4)[2 * rank : 2 * rank + 2].requires_grad_()
    ids_N3 = torch.arange(2 * rank, 2 * rank + 2)[:, None].expand(-1, 3).contiguous()
    key_ids_N3 = ids_N3.clone()
    if rank == 1:
        key_ids_N3[0] = 99
    ids = RowIds.from_table(ids_N3), RowIds.from_table(key_ids_N3)
    result = ring_info_nce(query_RD, torch.eye(4)[2 * rank : 2 * rank + 2].requires_grad_(), *ids, [2, 2])
    result.loss_sum.backward()
    assert query_RD.grad is not None
    return result.loss_sum.item(), query_RD.grad.isnan().any(1).tolist()


def test_a_row_without_its_positive_anywhere_is_never_silent() -> None:
    (loss_0, nan_0), (loss_1, nan_1) = run_distributed(row_that_lost_its_positive, 2)
    assert loss_0 < float("inf") and nan_0 == [False, False]
    assert loss_1 == float("inf") and nan_1 == [True, False]
