"""The gradient of the gathered loss on several gloo ranks is that of one process on the whole batch."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from muco_ds.distributed.gather import gather_rows, gather_table
from muco_ds.distributed.testing import run_distributed
from muco_ds.losses import RowIds, info_nce

# Per world size: (pairs per rank, hard negatives per rank). Ragged, with ranks that hold none of either.
SPLITS = {1: ([8], [4]), 2: ([5, 3], [0, 4]), 4: ([4, 0, 3, 1], [0, 3, 1, 0])}
IN_DIM, EMB_DIM = 8, 6
Gather = Callable[[torch.Tensor, list[int]], torch.Tensor]


class Encoder(nn.Module):
    """What every rank holds a copy of: one linear map for both sides and a learned temperature."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(IN_DIM, EMB_DIM, dtype=dtype)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(0.05), dtype=dtype))

    def forward(self, input_NI: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.linear(input_NI), dim=-1)

    def flat_grad(self) -> torch.Tensor:
        return torch.cat([param.grad.flatten() for param in self.parameters() if param.grad is not None])


def global_batch(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs of 8 queries, their targets, 4 hard negatives; ids of pairs (three images, six texts) and negatives."""
    generator = torch.Generator().manual_seed(1)
    query_NI, noise_NI = torch.randn(2, 8, IN_DIM, generator=generator, dtype=torch.float64).to(dtype)
    negative_NI = torch.randn(4, IN_DIM, generator=generator, dtype=torch.float64).to(dtype)
    pair_ids_N3 = torch.tensor([[i // 3, i, i % 6] for i in range(8)])
    negative_ids_N3 = torch.tensor([[-1 - i, -1, 100 + i] for i in range(4)])
    return query_NI, query_NI + noise_NI, negative_NI, pair_ids_N3, negative_ids_N3


def my_rows(rows: torch.Tensor, counts: list[int]) -> torch.Tensor:
    return rows.split(counts)[dist.get_rank() if dist.is_initialized() else 0]


def loss_sum(encoder: Encoder, counts: list[int], negative_counts: list[int], gather: Gather) -> torch.Tensor:
    """Half of both directions, summed over this process's rows."""
    query_NI, target_NI, negative_NI, pair_ids_N3, negative_ids_N3 = global_batch(encoder.linear.weight.dtype)
    query, target = encoder(my_rows(query_NI, counts)), encoder(my_rows(target_NI, counts))
    negative = encoder(my_rows(negative_NI, negative_counts))
    ids = my_rows(pair_ids_N3, counts)
    all_ids = gather_table(ids, counts)
    key_ids = torch.cat([all_ids, gather_table(my_rows(negative_ids_N3, negative_counts), negative_counts)])
    key = torch.cat([gather(target, counts), gather(negative, negative_counts)])
    tau = encoder.log_temperature.exp()
    row_ids, key_row_ids = RowIds.from_table(ids), RowIds.from_table(key_ids)
    forward = info_nce(query, key, row_ids, key_row_ids, temperature=tau, tile_rows=2, tile_keys=3)
    backward = info_nce(target, gather(query, counts), row_ids, RowIds.from_table(all_ids), temperature=tau)
    return (forward.loss_sum + backward.loss_sum) / 2


def detached_gather(local_ND: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """The usual mistake: only the rank's own slice keeps its gradient."""
    rows = list(gather_rows(local_ND.detach(), counts).split(counts))
    rows[dist.get_rank()] = local_ND
    return torch.cat(rows)


def gradients_on_this_rank(counts: list[int], negative_counts: list[int]) -> dict[str, tuple[float, torch.Tensor]]:
    """Per variant: the loss averaged over ranks and the gradient as data parallelism averages it."""
    world = dist.get_world_size()
    found = {}
    for name in ["fp32", "fp64", "detached", "mean"]:
        encoder = Encoder(torch.float32 if name == "fp32" else torch.float64)
        total = loss_sum(encoder, counts, negative_counts, detached_gather if name == "detached" else gather_rows)
        rows = max(counts[dist.get_rank()], 1) if name == "mean" else sum(counts) / world
        loss = total / rows
        loss.backward()
        grad = encoder.flat_grad()
        dist.all_reduce(grad)
        mean_loss = loss.detach().clone()
        dist.all_reduce(mean_loss)
        found[name] = (mean_loss.item() / world, grad / world)
    return found


def one_process(dtype: torch.dtype) -> tuple[float, torch.Tensor]:
    encoder = Encoder(dtype)
    loss = loss_sum(encoder, [8], [4], gather_rows) / 8
    loss.backward()
    return loss.item(), encoder.flat_grad()


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("world_size", SPLITS)
def test_gradient_of_the_gathered_loss_equals_one_process(world_size: int) -> None:
    per_rank = run_distributed(gradients_on_this_rank, world_size, *SPLITS[world_size])
    want = {name: one_process(dtype) for name, dtype in [("fp32", torch.float32), ("fp64", torch.float64)]}
    for found in per_rank:
        for name, tolerance in [("fp32", 1e-5), ("fp64", 1e-12)]:
            assert found[name][0] == pytest.approx(want[name][0], rel=tolerance)
            assert relative_error(found[name][1], want[name][1]) < tolerance
        if world_size > 1:
            # Both mistakes are visible at this size, so the lines above would catch them; the first only in the
            # gradient.
            assert found["detached"][0] == pytest.approx(want["fp64"][0], rel=1e-12)
            assert relative_error(found["detached"][1], want["fp64"][1]) > 0.05
            assert relative_error(found["mean"][1], want["fp64"][1]) > 0.05


def gathers_on_this_rank() -> dict[str, object]:
    rank = dist.get_rank()
    counts = [2, 0, 3]
    local_ND = (10.0 * rank + torch.arange(counts[rank] * 2.0).reshape(-1, 2)).requires_grad_()
    rows_KD = gather_rows(local_ND, counts)
    # Rank r weights row k by (r + 1) * k: the gradient of a row is its own number times the sum over ranks.
    (rows_KD * ((rank + 1) * torch.arange(5.0))[:, None]).sum().backward()
    empty_0D = gather_rows(torch.zeros(0, 2, requires_grad=True), [0, 0, 0])
    empty_0D.sum().backward()
    table = gather_table(torch.full((rank + 1, 3), 2**40 + rank), [1, 2, 3])
    even = gather_table(torch.full((2, 1), rank), [2, 2, 2])
    return {
        "rows": rows_KD.detach(),
        "grad": local_ND.grad,
        "empty": tuple(empty_0D.shape),
        "table": table[:, 0].tolist(),
        "even": even[:, 0].tolist(),
    }


def test_rows_and_tables_arrive_in_rank_order_with_the_sum_of_all_ranks_gradients() -> None:
    per_rank = run_distributed(gathers_on_this_rank, 3)
    grads = []
    for found in per_rank:
        assert found["rows"].tolist() == [[0, 1], [2, 3], [20, 21], [22, 23], [24, 25]]
        assert found["table"] == [2**40, *[2**40 + 1] * 2, *[2**40 + 2] * 3]
        assert found["even"] == [0, 0, 1, 1, 2, 2]
        assert found["empty"] == (0, 2)
        grads.append(found["grad"])
    assert torch.cat(grads)[:, 0].tolist() == [0, 6, 12, 18, 24]


def test_without_a_process_group_gathers_are_the_identity() -> None:
    rows = torch.randn(3, 2)
    assert gather_rows(rows, [3]) is rows and gather_table(rows, [3]) is rows


def answer(base: int) -> tuple[int, str, int]:
    return base + dist.get_rank(), os.environ["WORLD_SIZE"], torch.get_num_threads()


def fail_on_last_rank() -> None:
    if dist.get_rank() == 1:
        raise KeyError("no such key")
    dist.barrier()


def exit_on_last_rank() -> None:
    if dist.get_rank() == 1:
        sys.stdout.flush()
        os._exit(7)
    dist.barrier()


def hang_on_last_rank() -> None:
    if dist.get_rank() == 1:
        time.sleep(600)


def test_run_distributed_returns_results_in_rank_order() -> None:
    assert run_distributed(answer, 2, 10) == [(10, "2", 1), (11, "2", 1)]


def test_run_distributed_names_the_rank_that_failed() -> None:
    with pytest.raises(RuntimeError, match=r"rank 1 of 2: (?s:.)*KeyError: 'no such key'"):
        run_distributed(fail_on_last_rank, 2)


def test_run_distributed_notices_a_rank_that_died() -> None:
    with pytest.raises(RuntimeError, match=r"rank 1 of 2: died without a result, exit code 7|rank 0"):
        run_distributed(exit_on_last_rank, 2)


def test_run_distributed_ends_a_hang() -> None:
    started = time.monotonic()
    with pytest.raises(TimeoutError, match="ranks"):
        run_distributed(hang_on_last_rank, 2, timeout_s=4)
    assert time.monotonic() - started < 30
