"""benchmarks/run_gpu.sh: its commands exist, one part runs without a GPU, and the table comes last."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "run_gpu.sh"


def run(*parts: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(
        [str(SCRIPT), *parts], env=variables, capture_output=True, text=True, timeout=200, check=False
    )


def test_a_part_runs_at_toy_size_and_its_table_is_last(tmp_path: Path) -> None:
    committed = ROOT / "benchmarks" / "results" / "ceilings.jsonl"
    before = committed.read_bytes() if committed.exists() else None
    done = run("ceilings", OUT=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("no CUDA GPU: toy sizes") and "skipped" in lines[0]
    assert re.match(r"ceilings +copy_gb_per_s +[\d.]+ \(", lines[-1]), lines[-3:]
    assert (tmp_path / "ceilings.jsonl").is_file() and (tmp_path / "run_gpu.log").is_file()
    assert (committed.read_bytes() if committed.exists() else None) == before, "toys are no results"


def test_a_part_that_fails_or_has_no_time_is_named() -> None:
    done = run("ceilings", BUDGET_S="5")
    assert done.returncode == 1 and "failed: ceilings(no time left)" in done.stdout


def test_an_unknown_part_is_refused() -> None:
    done = run("pooling")
    assert done.returncode == 2 and "no part 'pooling'" in done.stderr


@pytest.mark.parametrize("line", re.findall(r"^ +benchmark .*$", SCRIPT.read_text(encoding="utf-8"), re.MULTILINE))
def test_commands_name_programs_and_their_options(line: str) -> None:
    file = ROOT / "benchmarks" / f"{line.split()[3]}.py"
    source = file.read_text(encoding="utf-8")
    options = {*re.findall(r"--\w+", line), "--results"}
    assert all(f'"{option}"' in source for option in options), (file.name, options)
