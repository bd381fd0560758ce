"""A run goes on at another number of ranks, through DeepSpeed's universal checkpoint, to the losses of one that stayed.

Two faults of DeepSpeed 0.19's loading are mended, and would show here: under ZeRO-3 all parameter groups shared one
step counter, which ran as many times too fast, and all took the first group's weight decay.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from muco_ds.checkpoint import TAG, UNIVERSAL
from muco_ds.reshard import universal_form

from programs import REPOSITORY, Demo, Programs, losses, refusal, vouch

STEPS, MIDDLE = 8, 3
# A weight decay of which a step of one parameter group too many shows in the losses.
LONG: dict[str, object] = {
    **{"run.max_steps": STEPS, "checkpoint.every": MIDDLE, "checkpoint.keep": STEPS},
    **{"optim.schedule": "constant", "optim.weight_decay": 5.0},
    **{"temperature.schedule": "learned", "temperature.lr": 0.05},
}
RESAVE = str(Path(__file__).with_name("resave.py"))
RESHARD = str(REPOSITORY / "tools" / "reshard_ckpt.py")
CONVERT = str(REPOSITORY / "tools" / "convert_ckpt.py")


def write_stage(folder: Path, stage: int) -> Path:
    """Under ZeRO-3 some parameters stay whole and some do not, in several groups with a step counter each."""
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": 1000, "sub_group_size": 100_000}
    path = folder / f"zero{stage}.json"
    path.write_text(json.dumps({"zero_optimization": zero, "steps_per_print": 10**9}))
    return path


def saved(out: Path, step: int) -> Path:
    return out / "run" / "checkpoints" / f"step_{step:07d}"


def cut(whole: Path, out: Path, step: int) -> Path:
    """A copy of a run as if it had been killed some steps after a checkpoint."""
    shutil.copytree(
        whole, out, ignore=shutil.ignore_patterns(*(saved(whole, s).name for s in range(step + 1, STEPS + 1)))
    )
    return out


def assert_same_losses(out: Path, whole: Path) -> None:
    values, expected = losses(out), losses(whole)
    assert values == pytest.approx(expected, rel=1e-5) and len(values) == STEPS
    assert {step: values[step] for step in range(1, MIDDLE + 1)} == {s: expected[s] for s in range(1, MIDDLE + 1)}


@pytest.fixture(scope="module")
def zero3(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    return {**LONG, "deepspeed": write_stage(tmp_path_factory.mktemp("zero3"), 3)}


@pytest.fixture(scope="module")
def whole(demo: Demo, programs: Programs, zero3: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a finished run on two ranks under ZeRO-3."""
    out = tmp_path_factory.mktemp("whole")
    programs.run(demo.train(out, zero3), ranks=2).check()
    return out


def test_on_one_rank_and_back_on_two(
    demo: Demo, programs: Programs, zero3: dict[str, object], whole: Path, tmp_path: Path
) -> None:
    out = cut(whole, tmp_path / "out", MIDDLE)
    output = programs.run(demo.train(out, {**zero3, "run.max_steps": 6})).check().output
    assert output.count(f"{saved(out, MIDDLE)}: converting what 2 ranks wrote") == 1 and "resumed from" in output
    assert not (saved(out, MIDDLE) / UNIVERSAL).exists(), "nobody will resume from it any more"
    # The way back is converted ahead, over what a killed conversion left.
    (saved(out, 6) / f"{UNIVERSAL}.tmp" / TAG).mkdir(parents=True)
    result = programs.run([RESHARD, out / "run"]).check()
    assert result.stdout[0].splitlines()[-1] == str(saved(out, 6) / UNIVERSAL)
    output = programs.run(demo.train(out, zero3), ranks=2).check().output
    assert "converting" not in output and f"resumed from {saved(out, 6)}" in output
    assert_same_losses(out, whole)


@pytest.mark.parametrize(("stage", "frozen"), [(2, True), (1, False)])
def test_the_other_stages(demo: Demo, programs: Programs, stage: int, frozen: bool, tmp_path: Path) -> None:
    options = {**LONG, "deepspeed": write_stage(tmp_path, stage), "model.freeze_vision": frozen}
    programs.run(demo.train(tmp_path / "whole", options), ranks=2).check()
    out = cut(tmp_path / "whole", tmp_path / "out", MIDDLE)
    programs.run(demo.train(out, options)).check()
    assert_same_losses(out, tmp_path / "whole")


def test_not_a_bit_of_the_state_changes(demo: Demo, programs: Programs, tmp_path: Path) -> None:
    """bf16 with frozen weights: masters, moments, counters and hyperparameters from two ranks to one."""
    options = {
        **{**LONG, "run.max_steps": 2, "deepspeed": write_stage(tmp_path, 3)},
        **{"run.precision": "bf16", "model.freeze_vision": True},
    }
    programs.run(demo.train(tmp_path, options), ranks=2).check()
    universal = universal_form(saved(tmp_path, 2), workers=1)
    before = state_of(universal)
    assert before["counters"] == [2.0] * len(before["counters"]) and before["weight_decays"] == [5.0, 0.0]
    programs.run([RESAVE, *demo.train(tmp_path, options)[1:]]).check()
    assert json.loads((saved(tmp_path, 2) / "meta.json").read_text())["world_size"] == 1
    after = state_of(universal_form(saved(tmp_path, 2), workers=1))
    assert after.keys() == before.keys() and len(after) > 100
    for name, value in before.items():
        assert torch.equal(value, after[name]) if torch.is_tensor(value) else set(value) == set(after[name]), name
    exported = programs.run([CONVERT, saved(tmp_path, 2), tmp_path / "exported"]).check()
    assert "embeddings of the written model differ" in exported.output


def state_of(universal: Path) -> dict[str, Any]:
    """Every whole tensor of a universal form, the step counters and the groups' weight decays."""
    folder = universal / TAG / "zero"
    state = {str(path.relative_to(folder)): torch.load(path) for path in sorted(folder.glob("*/*.pt"))}
    optimizer = torch.load(folder / "optimizer_state.pt", weights_only=False)["optimizer_state_dict"]
    state["counters"] = [float(values["step"]) for values in optimizer["state"].values()]
    state["weight_decays"] = [group["weight_decay"] for group in optimizer["param_groups"]]
    return state


def test_what_can_not_be_right_ends_on_all_ranks_with_one_line(
    demo: Demo, programs: Programs, zero3: dict[str, object], whole: Path, tmp_path: Path
) -> None:
    out = cut(whole, tmp_path / "out", MIDDLE)
    weight = universal_form(saved(out, MIDDLE)) / TAG / "zero" / "embedder.model.language_model.norm.weight" / "fp32.pt"
    torch.save(-torch.load(weight), weight)
    vouch(saved(out, MIDDLE) / UNIVERSAL, weight)
    line = refusal(programs.run(demo.train(out, zero3), ranks=1))
    assert f"{saved(out, MIDDLE) / UNIVERSAL}: the loaded model's embeddings differ" in line and "remove it" in line

    shard = next((saved(out, MIDDLE) / TAG).glob("*_optim_states.pt"))
    content = shard.read_bytes()
    shard.write_bytes(b"\0" * len(content))
    vouch(saved(out, MIDDLE), shard)
    shutil.rmtree(saved(out, MIDDLE) / UNIVERSAL)
    line = refusal(programs.run(demo.train(out, zero3), ranks=3))
    assert f"{saved(out, MIDDLE)}: can't be converted for another number of ranks" in line
    assert sorted(path.name for path in saved(out, MIDDLE).glob(f"{UNIVERSAL}*")) == []

    shard.write_bytes(content)
    vouch(saved(out, MIDDLE), shard)
    path = Path(str(zero3["deepspeed"]))
    tree = path.read_text()
    path.write_text(tree.replace('"stage": 3', '"stage": 2'))
    try:
        line = refusal(programs.run(demo.train(out, zero3), ranks=2))
    finally:
        path.write_text(tree)
    assert "ZeRO stage 2 but" in line and "under stage 3" in line
