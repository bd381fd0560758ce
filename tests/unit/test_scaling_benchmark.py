"""docs/scaling.md holds what benchmarks/scaling.py computes, and that follows its own formulas."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import scaling  # noqa: E402


@pytest.fixture(scope="module")
def small() -> scaling.Setup:
    return scaling.setups()[0]


def test_the_document_holds_the_tables() -> None:
    document = scaling.DOCUMENT.read_text(encoding="utf-8")
    assert scaling.rendered(document, scaling.tables(scaling.UTILISATION)) == document, "run scaling.py --write"


def test_a_collective_by_hand() -> None:
    assert scaling.collective(8e9, 1, 8) == pytest.approx(7e9 / 360e9 + 14e-6 + 7 * 1.9e-6)
    assert scaling.collective(0, 2.5, 1024) == pytest.approx(3 * (14e-6 + 896 * 1.9e-6 + 127 * 4e-6))


def test_packs_gather_again(small: scaling.Setup) -> None:
    """Forward and backward of one pack; of several each, and pass one; the frozen vision tower once a pack."""
    gradient = 4 * small.trained
    one = scaling.step(replace(small, pack_tokens=10**6), 32, 1024, 0.5)
    three = scaling.step(replace(small, pack_tokens=13_000), 32, 1024, 0.5)
    assert (one.packs, three.packs) == (1, 3)
    assert one.moved["ZeRO-3"] == 2 * (2 * small.text + small.vision) + gradient
    assert three.moved["ZeRO-3"] == 2 * 3 * (3 * small.text + small.vision) + gradient
    assert one.moved["ZeRO-2"] == three.moved["ZeRO-2"] == gradient + 2 * small.trained
    assert three.gathers["hpZ"] < three.gathers["ZeRO-3"] and three.compute > one.compute
    assert one.seconds("ZeRO-3") == one.compute + one.keys, "all gathers hide"
    assert three.seconds("ZeRO-3") == three.compute + three.reduced["ZeRO-3"] + three.keys


def test_compute_is_that_of_the_model(small: scaling.Setup) -> None:
    """Seven turns of 1,024 pictures: 14.6 PFLOP without an adapter and recomputation (benchmarks/plan.py's plans)."""
    full = scaling.setups()[2]
    model = scaling.FlopsModel.from_config(full.backbone, train_vision=False)
    tokens, pairs = 918 + 226, (918**2 + 226**2) / 2
    step = 1024 * model.training(tokens, pairs, scaling.PATCHES, scaling.PATCHES**2)
    assert step == pytest.approx(14.6e15, rel=0.01)
    spared = step - 1024 * model.training(tokens, pairs, scaling.PATCHES, scaling.PATCHES**2, read=14)
    forward = 1024 * (model.per_token * tokens + model.per_token_pair * pairs)
    assert 0 < spared < forward * 3 / 28, "the last layer, for the rows that are not read"
    one, several = (scaling.executed_flops(full, 1024, packs) for packs in (1, 2))
    assert one == pytest.approx(step - spared + forward * 27 / 28, rel=0.005)
    assert several == pytest.approx(one + forward - spared / 3, rel=0.005)
    assert small.vision == full.vision and small.text > full.text
