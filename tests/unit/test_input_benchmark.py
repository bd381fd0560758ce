"""benchmarks/input.py compares with the stock processor and counts cores; at this size its numbers mean nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_benchmark_leaves_a_line_and_says_how_many_cores(tmp_path: Path) -> None:
    results = tmp_path / "results" / "input.jsonl"
    options = ["--size", "96", "64", "--pack", "2", "--steps", "1", "--repeats", "1", "--results", str(results)]
    program = [sys.executable, str(ROOT / "benchmarks" / "input.py"), *options]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    rate, images_per_s = line["pictures_per_s_per_core"], line["gpu_images_per_s"]
    assert line["shape"]["size"] == [96, 64]
    assert line["gpu_images_per_s_is"].startswith("computed")
    assert 20 < images_per_s < 100
    assert line["cores_per_gpu"] == pytest.approx(images_per_s / rate, rel=0.1, abs=0.01)
    assert line["pixel_bytes_per_picture"]["stock"] == 8 * line["pixel_bytes_per_picture"]["ours"]
    assert set(line["loader_pictures_per_s"]["ours"]) == {"1 workers", "2 workers"}
    assert line["device"] and line["versions"]["torch"] and line["date"]
    assert done.stdout.splitlines()[-1].startswith(f"{rate} pictures/s per core")
