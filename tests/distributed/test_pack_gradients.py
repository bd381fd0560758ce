"""In bf16 the gradients of many packs add up in fp32, on every ZeRO stage that trains in bf16."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from muco_ds.distributed import env
from muco_ds.distributed.gradient_cache import cached_backward, prepare
from muco_ds.distributed.testing import run_distributed

pytestmark = pytest.mark.distributed

PACKS = 64


def summed(parts: list[torch.Tensor]) -> tuple[torch.Tensor, None]:
    return torch.cat(parts).float().sum(), None


def relative_errors(stage: int) -> dict[str, float]:
    """Of the gradient over all packs against the sum, in fp64, of each pack's own."""
    env.start()
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)).bfloat16()
    config = {
        **{"train_batch_size": 1, "bf16": {"enabled": True}, "steps_per_print": 10**9},
        **{"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=0.0), config=config
    )
    prepare(engine)
    packs = [(torch.randn(16, 64) + 1).bfloat16() for _ in range(PACKS)]
    exact: dict[str, torch.Tensor] = {}
    for pack in packs:
        engine.backward(engine(pack).float().sum())
        for name, parameter in engine.module.named_parameters():
            exact[name] = exact.get(name, 0) + safe_get_full_grad(parameter).double()
        engine.step()
    cached_backward(engine, [partial(engine, pack) for pack in packs], summed)
    named = dict(engine.module.named_parameters())
    return {n: float((safe_get_full_grad(named[n]).double() - g).norm() / g.norm()) for n, g in exact.items()}


@pytest.mark.parametrize(("stage", "limit"), [(1, 1e-6), (2, 2.5e-3), (3, 1e-6)])
def test_gradients_of_many_packs_lose_nothing(stage: int, limit: float) -> None:
    """Added up in bf16 they are off by 1e-2. Stage 2 rounds the sum to bf16 once, when it is reduced."""
    (errors,) = run_distributed(relative_errors, 1, stage)
    assert max(errors.values()) < limit, errors
