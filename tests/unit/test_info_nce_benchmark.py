"""benchmarks/info_nce.py runs and leaves lines that stand alone; the numbers at this size mean nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_benchmark_appends_one_line_per_measurement(tmp_path: Path) -> None:
    results = tmp_path / "results" / "info_nce.jsonl"
    for _ in range(2):
        options = ["--rows", "64", "--repeats", "3", "--results", str(results), "--only", "cpu_speed", "cpu_memory"]
        subprocess.run(
            [sys.executable, str(ROOT / "benchmarks" / "info_nce.py"), *options],
            check=True,
            capture_output=True,
            timeout=120,
        )
    lines = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    assert [line["benchmark"] for line in lines] == [
        f"info_nce/{name}" for name in ["cpu_speed"] * 2 + ["cpu_memory"]
    ] * 2
    for line in lines:
        assert line["shape"]["rows"] == 64 and line["device"] and line["versions"]["torch"] and line["date"]
        assert line["command"].startswith("python benchmarks/info_nce.py --rows 64")
    ratio = lines[0]["tiled_over_dense"]
    assert 0 < ratio["p20"] <= ratio["p50"] <= ratio["p80"]
    assert lines[2]["dense_logits_bytes"] == 4 * 64 * 64 and lines[2]["peak_growth_bytes"] >= 0
