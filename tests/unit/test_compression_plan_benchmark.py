"""benchmarks/compression_plan.py runs and compares the layouts it says; the times at this size mean nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def test_benchmark_leaves_one_line_on_the_layouts_it_names(tmp_path: Path) -> None:
    results = tmp_path / "results" / "compression_plan.jsonl"
    sizes = ["--dialogues", "3", "--picture", "40", "--answers", "20", "--tokens", "4"]
    subprocess.run(
        [
            *(sys.executable, str(ROOT / "benchmarks" / "compression_plan.py")),
            *(*sizes, "--repeats", "3", "--results", str(results)),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    line = json.loads(results.read_text(encoding="utf-8").splitlines()[-1])
    assert line["benchmark"] == "compression_plan/sdpa" and line["device"] and line["versions"]["torch"]
    lengths = line["shape"]["lengths"]
    assert len(lengths) == 3 and line["shape"]["rows"] == sum(map(sum, lengths))
    seen = {"causal": 0, "compression": 0}
    for prefix, tokens, answers in lengths:
        mask = torch.ones(prefix + tokens + answers, prefix + tokens + answers, dtype=torch.bool).tril()
        seen["causal"] += int(mask.sum())
        mask[prefix + tokens :, :prefix] = False  # questions and answers see nothing before the first token
        seen["compression"] += int(mask.sum())
    assert line["share_of_causal_pairs"] == round(seen["compression"] / seen["causal"], 4)
    ratio = line["compression_over_causal"]
    assert 0 < ratio["p20"] <= ratio["p50"] <= ratio["p80"]
