"""benchmarks/linear_cross_entropy.py runs and leaves lines that stand alone; the numbers at this size mean nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_benchmark_appends_one_line_per_measurement(tmp_path: Path) -> None:
    results = tmp_path / "results" / "linear_cross_entropy.jsonl"
    options = ["--rows", "64", "--vocabulary", "500", "--repeats", "3", "--results", str(results)]
    subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "linear_cross_entropy.py"), *options],
        check=True,
        capture_output=True,
        timeout=120,
    )
    lines = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    assert {line["benchmark"] for line in lines} == {f"linear_cross_entropy/{name}" for name in ("speed", "memory")}
    assert {line["table"] for line in lines if "linear_over_dense" in line} == {"learns", "frozen"}
    for line in lines:
        assert line["shape"]["rows"] == 64 and line["shape"]["vocabulary"] == 500
        assert line["device"] and line["versions"]["torch"] and line["date"] and line["form"]
        assert line["command"].startswith("python benchmarks/linear_cross_entropy.py --rows 64")
    ratio = lines[0]["linear_over_dense"]
    assert 0 < ratio["p20"] <= ratio["p50"] <= ratio["p80"]
    assert lines[-1]["dense_logits_bytes"] == 4 * 64 * 500 and lines[-1]["peak_growth_bytes"] >= 0
