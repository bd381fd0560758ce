"""The stage's loss of embeddings: both directions in the dense form, and what guards against a broken table of ids."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from muco_ds.config import LossOptions
from muco_ds.data.schema import RowCounts
from muco_ds.losses import RowIds, false_negative_limit, info_nce_dense
from muco_ds.tasks.muco import MuCoTask

COUNTS = [RowCounts(3, 3, 2), RowCounts(4, 4, 0)]


def two_packs() -> tuple[list[torch.Tensor], list[Any]]:
    """Embeddings and ids of two packs, the second without hard negatives; few images, few texts."""
    generator = torch.Generator().manual_seed(0)
    parts, packs, first = [], [], 0
    for counts in COUNTS:
        n = counts.queries
        query_ND, noise_ND = torch.randn(2, n, 5, generator=generator, dtype=torch.float64)
        negative_ND = torch.randn(counts.negatives, 5, generator=generator, dtype=torch.float64)
        pair_ids_N3 = torch.randint(0, 3, (n, 3), generator=generator)
        pair_ids_N3[:, 1] = torch.arange(first, first + n)
        negative_ids_N3 = torch.tensor([[9, -1, i] for i in range(counts.negatives)]).reshape(-1, 3)
        first += n
        emb_ED = F.normalize(torch.cat([query_ND, query_ND + 4 * noise_ND, negative_ND]), dim=-1)
        parts.append(emb_ED.requires_grad_())
        packs.append(SimpleNamespace(counts=counts, ids_E3=torch.cat([pair_ids_N3, pair_ids_N3, negative_ids_N3])))
    return parts, packs


def task(**options: Any) -> MuCoTask:
    embedder: Any = nn.Identity()
    return MuCoTask(embedder, LossOptions(**options))


@pytest.mark.parametrize("same_target", ["mask", "positive", "keep"])
@pytest.mark.parametrize("margin", [None, 0.05])
@pytest.mark.parametrize("temperature", [None, 0.3])
def test_both_directions_equal_the_dense_form(
    same_target: Any, margin: float | None, temperature: float | None
) -> None:
    parts, packs = two_packs()
    chosen = task(temperature=0.2, symmetric=True, same_target=same_target, false_negative_margin=margin)
    result = chosen.loss(parts, packs, [RowCounts(7, 7, 2)], temperature)
    sides = [part.split([c.queries, c.targets, c.negatives]) for part, c in zip(parts, COUNTS, strict=True)]
    ids = [pack.ids_E3.split([c.queries, c.targets, c.negatives]) for pack, c in zip(packs, COUNTS, strict=True)]
    query_RD, target_RD, negative_ND = (torch.cat(side) for side in zip(*sides, strict=True))
    pair_ids, _, negative_ids = (torch.cat(side) for side in zip(*ids, strict=True))
    key_ids = RowIds.from_table(torch.cat([pair_ids, negative_ids]))
    row_ids = RowIds.from_table(pair_ids)
    limit_R = None if margin is None else false_negative_limit(query_RD, target_RD, margin)
    options: dict[str, Any] = {"temperature": temperature or 0.2, "same_target": same_target, "limit_R": limit_R}
    forward = info_nce_dense(query_RD, torch.cat([target_RD, negative_ND]), row_ids, key_ids, **options)
    backward = info_nce_dense(target_RD, query_RD, row_ids, row_ids, **options)
    expected = (forward.loss_sum + backward.loss_sum) / 14
    assert (margin is None) == (forward.stats["false_negatives"] == 0)
    found, wanted = torch.autograd.grad(result.loss, parts), torch.autograd.grad(expected, parts)
    torch.testing.assert_close([result.loss, *found], [expected, *wanted], rtol=1e-10, atol=1e-12)
    assert {name: result.stats[name] for name in forward.stats} == forward.stats


def test_pair_ids_that_contradict_the_order_are_never_silent() -> None:
    """Two targets change places: each query still finds a target with its id, and it is the wrong one."""
    parts, packs = two_packs()
    packs[0].ids_E3[[3, 4]] = packs[0].ids_E3[[4, 3]]
    result = task().loss(parts, packs, [RowCounts(7, 7, 2)])
    result.loss.backward()
    assert result.loss.isnan() and result.stats["loss"].isnan()
    assert all(part.grad is not None and part.grad.isnan().any() for part in parts)
