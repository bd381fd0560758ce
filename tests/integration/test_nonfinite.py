"""A gradient that is not finite on one rank: skipped on all, counted, and the end of the run when it stays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_train import write_stage

from programs import Demo, Programs, metrics, refusal

SCRIPT = Path(__file__).with_name("poisoned_train.py")


@pytest.mark.parametrize(
    ("stage", "precision", "pack_tokens"), [(0, "fp32", 4096), (1, "bf16", 1500), (2, "fp32", 1500), (3, "bf16", 4096)]
)
def test_a_bad_step_is_skipped_on_all_ranks(
    stage: int, precision: str, pack_tokens: int, demo: Demo, programs: Programs, tmp_path: Path
) -> None:
    path = write_stage(tmp_path, stage)
    check_that_one_step_is_skipped(path, precision, pack_tokens, demo, programs, tmp_path)


def test_an_optimizer_on_the_cpu_forgets_a_bad_step(demo: Demo, programs: Programs, tmp_path: Path) -> None:
    """DeepSpeed 0.19.8 keeps the bad gradients there and adds the next ones to them."""
    path = tmp_path / "offload.json"
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    path.write_text(json.dumps({"zero_optimization": zero, "zero_force_ds_cpu_optimizer": False}))
    check_that_one_step_is_skipped(path, "bf16", 4096, demo, programs, tmp_path)


def check_that_one_step_is_skipped(
    deepspeed: Path, precision: str, pack_tokens: int, demo: Demo, programs: Programs, tmp_path: Path
) -> None:
    overrides = {"deepspeed": deepspeed, "batch.pack_tokens": pack_tokens, "run.precision": precision}
    overrides |= {"temperature.schedule": "learned"}
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
    first, second, third, fourth = (line["temperature"] for line in lines)
    assert first != second == third != fourth, "learned from a step that was not taken"
    assert "step 2: the gradient is not finite: skipped (1 in a row)" in result.stderr[0]


def test_too_many_in_a_row_end_the_run_and_keep_its_checkpoints(demo: Demo, programs: Programs, tmp_path: Path) -> None:
    overrides = {"run.max_steps": 12, "optim.max_skipped": 3, "checkpoint.every": 4}
    argv = [SCRIPT, *demo.train(tmp_path, overrides)[1:]]
    result = programs.run(argv, ranks=2, POISONED="2,6,7,8")
    line = refusal(result)
    assert line.startswith("error: step 8: the gradient was not finite 3 times in a row (rows of the last batch: ")
    assert "start again with a lower optim.lr" in line
    path = tmp_path / "run" / "nonfinite_step_0000008.json"
    assert str(path) in line
    ranks = json.loads(path.read_text())
    assert [entry["rank"] for entry in ranks] == [0, 1]
    rows = [row for entry in ranks for row in entry["rows"]]
    assert len(set(rows)) == 8 and all(row.startswith("data.train row ") for row in rows)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [path.name for path in sorted(checkpoints.glob("step_*"))] == ["step_0000004"]
    # Started again, it goes on from there, counts included, and gets past once the cause is gone.
    again = programs.run([*argv, "--optim.lr", "5e-5"], ranks=2, POISONED="7")
    assert not any(again.codes), again.output[-3000:]
    assert "optim.lr=5e-05 from here on, 0.0001 until" in again.output
    assert [entry["skipped_steps"] for entry in metrics(tmp_path)] == [0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2]
