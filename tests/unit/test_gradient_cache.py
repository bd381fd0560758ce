"""The gradient cache gives the gradient of the whole batch, whatever the split into packs, dropout included."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from muco_ds.distributed.gradient_cache import cached_backward, prepare
from muco_ds.errors import UserError


class Engine(nn.Module):
    """What the cache uses of a DeepSpeed engine, in one process; notes the order of calls."""

    def __init__(self, stage: int, dropout: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.module = self.model = nn.Sequential(
            nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 4)
        ).double()
        self.stage = stage
        self.optimizer: Any = type("Optimizer", (), {} if stage == 0 else {"_coalesce_grad_reduction": False})()
        self.calls: list[str] = []

    def forward(self, rows_ND: torch.Tensor) -> torch.Tensor:
        self.calls.append("graph" if torch.is_grad_enabled() else "no graph")
        return nn.functional.normalize(self.model(rows_ND), dim=-1)

    def backward(self, loss: torch.Tensor) -> None:
        self.calls.append("backward")
        loss.backward()

    def get_data_types(self) -> tuple[torch.dtype, torch.dtype]:
        return torch.float64, torch.float64

    def zero_optimization_stage(self) -> int:
        return self.stage

    def set_gradient_accumulation_boundary(self, last: bool) -> None:
        self.calls.append(f"boundary {last}")

    @contextmanager
    def coalesce_grad_reduction(self) -> Iterator[None]:
        self.calls.append("coalesce")
        yield
        self.calls.append("reduce")


def contrastive(parts: list[torch.Tensor]) -> tuple[torch.Tensor, float]:
    """Every row against all rows of all packs: not a sum over packs."""
    emb_ED = torch.cat(parts)
    loss = nn.functional.cross_entropy(emb_ED @ emb_ED.flip(0).T / 0.1, torch.arange(len(emb_ED)))
    return loss, float(loss.detach())


def gradients(engine: Engine) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in engine.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("sizes", [[5, 3, 4], [11, 1], [12, 0]])
def test_gradient_is_that_of_the_whole_batch(stage: int, sizes: list[int]) -> None:
    rows_ND = torch.randn(12, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole, split = Engine(stage, 0.0), Engine(stage, 0.0)
    loss, value = contrastive([whole(rows_ND)])
    loss.backward()
    packs = rows_ND.split(sizes)
    assert cached_backward(split, [partial(split, pack) for pack in packs], contrastive) == pytest.approx(value)
    for expected, got in zip(gradients(whole), gradients(split), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_summing_the_losses_of_packs_is_another_gradient() -> None:
    """What the cache is for; if this fails, the test above shows nothing."""
    rows_ND = torch.randn(12, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole, accumulated = Engine(3, 0.0), Engine(3, 0.0)
    contrastive([whole(rows_ND)])[0].backward()
    for pack in rows_ND.split([6, 6]):
        (contrastive([accumulated(pack)])[0] / 2).backward()
    assert not torch.allclose(gradients(whole)[0], gradients(accumulated)[0], rtol=0.05)


def test_both_passes_draw_the_same_dropout() -> None:
    rows_ND = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    engine = Engine(3, 0.5)
    seen: list[torch.Tensor] = []
    engine.model[2].register_forward_hook(lambda _m, _i, output: seen.append(output.detach()))
    cached_backward(engine, [partial(engine, pack) for pack in rows_ND.split(4)], contrastive)
    first, second = seen[:2], seen[2:]
    assert not torch.equal(first[0] == 0, first[1] == 0), "packs draw anew"
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradients_are_reduced_once_for_all_packs() -> None:
    rows_ND = torch.randn(6, 6, dtype=torch.float64)
    sharded, plain = Engine(2, 0.0), Engine(0, 0.0)
    for engine in (sharded, plain):
        cached_backward(engine, [partial(engine, pack) for pack in rows_ND.split(3)], contrastive)
    again = ["graph", "backward"]
    assert sharded.calls == ["no graph", "no graph", "coalesce", *again, *again, "reduce"]
    boundaries = ["boundary False", *again, "boundary True", *again, "boundary True"]
    assert plain.calls == ["no graph", "no graph", *boundaries]


def test_an_engine_that_cannot_hold_back_its_reduction_is_refused() -> None:
    engine = Engine(2, 0.0)
    engine.optimizer = type("OldOptimizer", (), {})()
    with pytest.raises(UserError, match=r"OldOptimizer can't reduce .*ZeRO stage 2.* 0\.19\.8 or newer"):
        prepare(engine)
    engine.optimizer._coalesce_grad_reduction = False
    prepare(engine)
