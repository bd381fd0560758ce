"""docs/performance.md is what benchmarks/report.py makes of the committed results."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from report import BEGIN, END, PAGE, PLOTS, generated, main, newest
from report_tables import Table, generic


def test_page_is_that_of_the_committed_results() -> None:
    page = PAGE.read_text(encoding="utf-8")
    shown = page.split(BEGIN)[1].split(END)[0].strip()
    assert shown == generated().strip(), "run python benchmarks/report.py"
    assert all((PAGE.parent / "images" / name).is_file() for name in PLOTS)


def line(benchmark: str, seconds: float, device: str = "here", **shape: int) -> dict:
    return {
        "benchmark": benchmark,
        "shape": shape,
        "seconds": {"ours": {"p20": seconds, "p50": seconds, "p80": seconds}},
        "command": "python x.py",
        "device": device,
        "threads": 1,
        "versions": {"torch": "2", "transformers": "5"},
        "commit": "abc",
        "date": "2026-11-21T00:00:00Z",
    }


def test_only_the_newest_line_of_a_shape_and_device_is_shown() -> None:
    lines = [line("a", 1, rows=1), line("a", 2, rows=2), line("a", 3, rows=1), line("a", 4, "there", rows=1)]
    kept = newest(lines, Table("A", "", generic))
    assert [entry["seconds"]["ours"]["p50"] for entry in kept] == [3, 2, 4]


def test_a_result_file_that_nobody_listed_is_rendered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "new_thing.jsonl").write_text(json.dumps(line("new_thing", 0.5, rows=7)) + "\n")
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    options = ["--results", str(tmp_path), "--page", str(page), "--images", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["report.py", *options])
    assert main() == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "### New thing" in text and "rows 7" in text and "0.5 (0.5–0.5)" in text
    assert "No line of these was measured on a GPU yet: `new_thing`" in text
