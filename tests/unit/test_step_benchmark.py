"""benchmarks/step.py runs every system on the same work and refuses ratios of different work."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def test_benchmark_compares_all_systems_and_ends_with_one_object(tmp_path: Path) -> None:
    results = tmp_path / "step.jsonl"
    options = ["--preset", "toy", "--workloads", "seven_turns", "pictures_both_sides", "--results", str(results)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "step.py"), *options],
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )
    last = json.loads(done.stdout.splitlines()[-1])
    baselines = ("padded_two_forward", "padded_best", "single_turn")
    assert all(last[f"ratio_{name}"] > 0 for name in baselines), last
    assert set(last["pairs_per_s"]) == {"ours", "ours_isolated", "padded_two_forward", "padded_best", "single_turn"}
    assert set(last["processor_ratios"]) == {f"processor_ratio_{name}" for name in baselines}
    assert "single turns" in last["skipped"]["sentence_transformers"]
    lines = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    assert [line["benchmark"] for line in lines] == ["step/seven_turns", "step/pictures_both_sides"]
    for line in lines:
        assert line["device"] and line["commit"] and line["versions"]["torch"]
        assert all(found["same"] for found in line["agreement"].values())
        ours, padded = line["systems"]["ours"], line["systems"]["padded_two_forward"]
        for name in ("pairs", "tokens"):
            assert ours[name] == pytest.approx(padded[name])
        assert 0.5 * padded["model_gflop"] < ours["model_gflop"] < padded["model_gflop"]  # the last layer's read rows
        assert padded["padding"] > 0 == ours["padding"]
        assert ours["split_seconds"]["text_forward"] > 0 and ours["split_seconds"]["backward"] > 0
    # Seven copies of the picture: more tokens than the picture once, and the same pairs.
    systems = lines[0]["systems"]
    assert systems["single_turn"]["pairs"] == systems["ours"]["pairs"] == 14
    assert systems["single_turn"]["tokens"] > systems["ours_isolated"]["tokens"]


def stub(loss: float, gradient: float, pairs: int = 4) -> SimpleNamespace:
    weights = {"a": torch.full((3,), gradient), "b": torch.ones(2)}
    return SimpleNamespace(
        pairs=pairs, backward=lambda: torch.tensor(loss), gradients=lambda: weights, update=lambda: None
    )


@pytest.mark.parametrize(
    ("theirs", "same"),
    [(stub(2.0, 1.0), True), (stub(2.001, 1.0), False), (stub(2.0, 1.01), False), (stub(2.0, 1.0, 5), False)],
)
def test_work_that_differs_is_found(theirs: SimpleNamespace, same: bool) -> None:
    from measure import agreement

    assert agreement(stub(2.0, 1.0), theirs, "fp32")["same"] is same  # type: ignore[arg-type]


def test_phases_are_exclusive_and_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    import harness

    ticks = iter(range(100))
    monkeypatch.setattr(harness, "_now", lambda: float(next(ticks)))
    inner = torch.nn.Identity()
    owner = SimpleNamespace(outer=lambda: inner(torch.ones(1)))
    stock: Callable[[], object] = owner.outer
    with harness.Phases() as phases:
        phases.wrap(owner, "outer", "outer")
        phases.watch(inner, "inner")
        owner.outer()
    assert phases.seconds == {"other": 2.0, "outer": 2.0, "inner": 1.0}
    assert owner.outer is stock and not inner._forward_hooks and not inner._forward_pre_hooks


def test_memory_growth_is_that_of_the_work() -> None:
    from harness import peak_growth

    size = 64 * 2**20
    for _ in range(2):  # what the first time frees counts again in the second
        growth = peak_growth(lambda: torch.ones(size // 4))
        if growth is None:
            pytest.skip("peaks can't be put back here: no Linux /proc or no glibc")
        assert 0.9 * size < growth < 1.5 * size
