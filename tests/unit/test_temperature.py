"""The temperature of a step: fixed, annealed by equal factors, or learned within bounds and continued exactly."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from muco_ds.config_loss import TemperatureOptions
from muco_ds.temperature import Temperature

CPU = torch.device("cpu")


def learned(target: float = 0.05, **options: Any) -> Temperature:
    return Temperature(TemperatureOptions("learned", **options), target, CPU)


def train(temperature: Temperature, steps: range, sign: float = 1.0) -> list[float]:
    """Steps on a loss with its minimum at 0.03 (sign 1); returns the temperatures used."""
    used = []
    for step in steps:
        tau = temperature.at(step)
        assert isinstance(tau, torch.Tensor) and tau.shape == ()
        (sign * (tau / 0.03).log().square() * (1 + step % 3)).backward()
        temperature.step(taken=True)
        used.append(temperature.used)
    return used


def test_fixed_is_a_number() -> None:
    temperature = Temperature(TemperatureOptions(), 0.02, CPU)
    assert [temperature.at(step) for step in (0, 10**6)] == [0.02, 0.02] and temperature.used == 0.02
    temperature.step(taken=True)
    temperature.restore(json.loads(json.dumps(temperature.state())))
    assert temperature.at(1) == 0.02


def test_annealing_changes_by_the_same_factor_at_every_step() -> None:
    temperature = Temperature(TemperatureOptions("annealed", start=0.16, steps=3), 0.02, CPU)
    assert [temperature.at(step) for step in range(5)] == pytest.approx([0.16, 0.08, 0.04, 0.02, 0.02], rel=1e-12)
    assert temperature.at(10**6) == temperature.used == 0.02
    assert Temperature(TemperatureOptions("annealed", start=0.01, steps=2), 0.04, CPU).at(1) == pytest.approx(0.02)


def test_learning_is_adam_on_the_logarithm() -> None:
    found = train(learned(lr=0.01), range(6))
    log = torch.nn.Parameter(torch.tensor(math.log(0.05)))
    adam = torch.optim.Adam([log], lr=0.01)
    expected = []
    for step in range(6):
        expected.append(float(log.detach().exp()))
        adam.zero_grad()
        ((log - math.log(0.03)).square() * (1 + step % 3)).backward()
        adam.step()
    assert found == pytest.approx(expected, rel=1e-5) and found[0] > found[-1] * 1.04


@pytest.mark.parametrize(("sign", "bound"), [(1.0, 0.045), (-1.0, 0.06)])
def test_bounds_hold_and_can_be_left_again(sign: float, bound: float) -> None:
    temperature = learned(lr=0.1, min=0.045, max=0.06)
    found = train(temperature, range(8), sign)
    assert all(0.045 * (1 - 1e-6) <= value <= 0.06 * (1 + 1e-6) for value in found)
    assert found[-1] == pytest.approx(bound, rel=1e-6)
    back = train(temperature, range(30), -sign)
    assert abs(back[-1] - bound) > 0.01


def test_a_step_that_was_not_taken_is_forgotten() -> None:
    plain, skipping = learned(), learned()
    for temperature in (plain, skipping):
        train(temperature, range(2))
    (skipping.at(2) * math.nan).backward()  # type: ignore[union-attr]
    skipping.step(taken=False)
    assert train(plain, range(2, 5)) == train(skipping, range(2, 5))


@pytest.mark.parametrize("done", [0, 3])
def test_it_continues_exactly_from_a_checkpoints_text(done: int) -> None:
    straight, saved = learned(lr=0.013), learned(lr=0.013)
    for temperature in (straight, saved):
        train(temperature, range(done))
    resumed = learned(lr=0.013)
    resumed.restore(json.loads(json.dumps(saved.state())))
    assert train(straight, range(done, 9)) == train(resumed, range(done, 9))
