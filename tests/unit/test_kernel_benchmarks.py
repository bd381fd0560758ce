"""benchmarks/{ceilings,pooler,attention,info_nce}.py run at toy size, compare what they time, and can be rendered."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import attention
import ceilings
import info_nce
import pooler
from harness import sample
from report_tables import TABLES

TOY = {
    "pooler": ["--embeddings", "24", "--dim", "48"],
    "attention": ["--dialogues", "2", "--picture", "40", "--turn", "3", "--systems", "sdpa", "padded"],
    "info_nce": ["--only", "keys", "--rows", "32", "--keys", "64", "500"],
}


def lines_of(module: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    name = module.__name__
    file = folder / f"{name}.jsonl"
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *TOY.get(name, []), "--repeats", "3", "--results", str(file)])
    monkeypatch.setattr(ceilings, "copy", lambda device: ceilings.Work(lambda: torch.ones(9), 1e6))
    monkeypatch.setattr(ceilings, "matmul", lambda device: ceilings.Work(lambda: torch.ones(9), 1e6))
    for used in ("copy", "matmul"):
        monkeypatch.setattr(module, used, getattr(ceilings, used), raising=False)
    module.main()
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("module", [ceilings, pooler, attention, info_nce])
def test_lines_stand_alone_and_are_rendered(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = lines_of(module, tmp_path, monkeypatch)
    kinds = {"ceilings": 1, "pooler": 2, "attention": 3, "info_nce": 2}
    assert len(lines) == kinds[module.__name__]
    for line in lines:
        assert line["device"] and line["versions"]["torch"] and line["date"] and line["repeats"] == 3
        rows = TABLES[module.__name__].rows(line)
        assert len(rows) == len(line.get("systems", [1])) and all(row.values() for row in rows)
        for system in line.get("systems", {}).values():
            assert system["seconds"]["p50"] > 0


def test_ceilings_count_what_they_do() -> None:
    work = ceilings.copy(torch.device("cpu"))
    seconds = sample({"copy": work.run}, 3)["copy"]
    assert 1e8 < work.rate(seconds) < 1e12  # bytes a second of any machine's memory


@pytest.mark.parametrize("layout", ["causal", "isolated", "compression"])
def test_a_padded_batch_sees_what_the_plan_lets_see(layout: str) -> None:
    lengths = attention.draw(3, 30, 4)
    leaves = attention.Leaves(layout, lengths, "cpu")
    found = {}
    for name, (attend, inputs, upstream) in leaves.systems(["dense", "padded"], "cpu").items():
        gradients = torch.autograd.grad(attend(*inputs), inputs, upstream)
        out = attend(*inputs)
        found[name] = [leaves.packed_out(name, x) for x in (out, *gradients)]
    for got, want in zip(found["padded"], found["dense"], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["causal", "isolated", "compression"])
def test_flex_masks_are_the_plans(layout: str) -> None:
    plan = attention.plan_of(layout, attention.draw(2, 20, 3))
    mask_mod = attention.flex_mask(plan, "cpu").mask_mod
    rows = torch.arange(int(plan.cu_q_S1[-1]))
    assert torch.equal(mask_mod(0, 0, rows[:, None], rows[None]), plan.dense_mask())


def test_a_loss_that_differs_is_not_timed() -> None:
    batch = info_nce.between(8, 40, 16, "cpu")
    with pytest.raises(AssertionError, match="other differs from ours"):
        info_nce.check({"ours": info_nce.info_nce, "other": lambda *b: info_nce.info_nce(*b, temperature=0.1)}, batch)


def test_what_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(info_nce, "free_bytes", lambda device: 10**5)
    line = info_nce.keys_sweep(32, 300, 16, "cpu", 1)
    assert list(line["systems"]) == ["ours", "chunked"] and "dense" in line["skipped"]
    assert "dense is skipped" in capsys.readouterr().out
