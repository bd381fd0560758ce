"""A gradient that is not finite on one rank: skipped on all, counted, and the end of the run when it stays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_train import write_stage

from programs import Demo, Programs, metrics, refusal

SCRIPT = Path(__file__).with_name("poisoned_train.py")


@pytest.mark.parametrize(("stage", "pack_tokens"), [(0, 4096), (2, 1500), (3, 4096)])
def test_a_bad_step_is_skipped_on_all_ranks(
    stage: int, pack_tokens: int, demo: Demo, programs: Programs, tmp_path: Path
) -> None:
    overrides = {"deepspeed": write_stage(tmp_path, stage), "batch.pack_tokens": pack_tokens}
    result = programs.run([SCRIPT, *demo.train(tmp_path, overrides)[1:]], ranks=2, POISONED="2").check()
    for output in result.stdout:
        told = [line for line in output.splitlines() if line.endswith("weights")]
        assert told == [
            "step 1: other weights",
            "step 2: same weights",
            "step 3: other weights",
            "step 4: other weights",
        ]
    lines = metrics(tmp_path)
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1, 1]
    assert [line["grad_norm"] is None for line in lines] == [False, True, False, False]
    assert "step 2: the gradient is not finite: skipped (1 in a row)" in result.stderr[0]


def test_too_many_in_a_row_end_the_run_and_keep_its_checkpoints(demo: Demo, programs: Programs, tmp_path: Path) -> None:
    overrides = {"run.max_steps": 12, "optim.max_skipped": 3, "checkpoint.every": 4}
    argv = [SCRIPT, *demo.train(tmp_path, overrides)[1:]]
    result = programs.run(argv, ranks=2, POISONED="2,6,7,8")
    line = refusal(result)
    assert line.startswith("error: step 8: the gradient was not finite 3 times in a row: lower optim.lr")
    path = tmp_path / "run" / "nonfinite_step_0000008.json"
    assert str(path) in line
    ranks = json.loads(path.read_text())
    assert [entry["rank"] for entry in ranks] == [0, 1]
    rows = [row for entry in ranks for row in entry["rows"]]
    assert len(set(rows)) == 8 and all(row.startswith("data.train row ") for row in rows)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [path.name for path in sorted(checkpoints.glob("step_*"))] == ["step_0000004"]
    # Started again, it goes on from there, counts included, and gets past once the cause is gone.
    again = programs.run(argv, ranks=2, POISONED="7")
    assert not any(again.codes), again.output[-3000:]
    assert [entry["skipped_steps"] for entry in metrics(tmp_path)] == [0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2]
