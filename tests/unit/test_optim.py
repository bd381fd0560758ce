"""What is decayed, and the learning rate of a step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from muco_ds.config import OptimOptions
from muco_ds.optim import build_optimizer, learning_rate

from tiny_models import embedder, new_embedder


def test_norms_and_biases_are_not_decayed() -> None:
    model = new_embedder()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, OptimOptions(lr=3e-4, weight_decay=0.1, beta1=0.8, beta2=0.95, eps=1e-6))
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert all(g["lr"] == 3e-4 and g["betas"] == (0.8, 0.95) and g["eps"] == 1e-6 for g in optimizer.param_groups)
    assert len(decayed["params"]) + len(plain["params"]) == len(names)

    def exempt(parameter: torch.Tensor) -> bool:
        name = names[id(parameter)]
        return name.endswith("bias") or "norm" in name or ".ln_q." in name

    assert all(map(exempt, plain["params"])) and not any(map(exempt, decayed["params"]))


def test_a_zero3_partition_counts_by_its_whole_shape() -> None:
    """A partition is flat: by its own shape a matrix would never be decayed."""
    model = nn.Module()
    model.matrix, model.bias = nn.Parameter(torch.zeros(6)), nn.Parameter(torch.zeros(3))
    for parameter, shape in ((model.matrix, (2, 3)), (model.bias, (3,))):
        parameter.ds_shape = torch.Size(shape)  # type: ignore[attr-defined]
    decayed, plain = build_optimizer(model, OptimOptions(weight_decay=0.1)).param_groups
    assert decayed["params"] == [model.matrix] and plain["params"] == [model.bias]


def test_frozen_parameters_are_left_out() -> None:
    optimizer = build_optimizer(embedder(), OptimOptions())
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in embedder().parameters() if p.requires_grad}
    assert not held & {id(p) for p in embedder().model.visual.parameters()}


def test_the_vision_tower_has_a_learning_rate_of_its_own() -> None:
    model = new_embedder()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = build_optimizer(model, OptimOptions(lr=1e-3, vision_lr=2e-4, weight_decay=0.1)).param_groups
    assert [(group["lr_ratio"], group["weight_decay"]) for group in groups] == [(1, 0.1), (1, 0), (0.2, 0.1), (0.2, 0)]
    for group in groups:
        assert {".visual." in names[id(p)] for p in group["params"]} == {group["lr_ratio"] < 1}
    assert sum(len(group["params"]) for group in groups) == len(names)
    assert len(build_optimizer(model, OptimOptions(lr=1e-3)).param_groups) == 2


def test_an_update_decays_matrices_only() -> None:
    model = nn.Linear(2, 2)
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    model(torch.zeros(1, 2)).mul(0).sum().backward()
    build_optimizer(model, OptimOptions(lr=0.1, weight_decay=0.5)).step()
    torch.testing.assert_close(model.weight, weight * 0.95)
    assert torch.equal(model.bias, bias)


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("constant", {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 60: 1.0, 109: 1.0}),
        ("cosine", {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 35: 0.853553, 60: 0.5, 85: 0.146447, 109: 0.000247}),
    ],
)
def test_schedule(schedule: str, expected: dict[int, float]) -> None:
    options = OptimOptions(lr=2e-3, warmup_steps=10, schedule=schedule)  # type: ignore[arg-type]
    for step, factor in expected.items():
        assert learning_rate(step, 110, options) == pytest.approx(2e-3 * factor, rel=2e-3), step


def test_the_first_step_moves_and_without_warm_up_starts_at_the_peak() -> None:
    for schedule in ("constant", "cosine"):
        options = OptimOptions(lr=1.0, warmup_steps=0, schedule=schedule)  # type: ignore[arg-type]
        assert learning_rate(0, 5, options) == 1.0
        assert all(learning_rate(step, 5, options) > 0 for step in range(5))
    only_warm_up = OptimOptions(lr=1.0, warmup_steps=5, schedule="cosine")
    assert [learning_rate(step, 5, only_warm_up) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
