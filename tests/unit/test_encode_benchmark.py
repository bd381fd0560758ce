"""benchmarks/encode.py runs, and compares before it times; the numbers mean nothing here."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_both_sides_agree_and_leave_a_line(tmp_path: Path) -> None:
    apart = Path(sys.prefix) / "torchvision-only"
    if not apart.is_dir() and importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed: stock processors of these models need it")
    pytest.importorskip("sentence_transformers")
    results = tmp_path / "encode.jsonl"
    paths = [str(ROOT), *([str(apart)] if apart.is_dir() else [])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    options = ["--preset", "toy", "--repeats", "2", "--results", str(results), "--only", "mixed", "seven_questions"]
    command = [sys.executable, str(ROOT / "benchmarks" / "encode.py"), *options]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    assert [line["benchmark"] for line in lines] == ["encode/mixed", "encode/seven_questions"]
    for line in lines:
        assert line["max_difference"] < 1e-5 and line["ratio"] > 0 and line["versions"]["torch"] and line["date"]
        assert line["sentence_transformers"]["setting"] == "sdpa/4"
