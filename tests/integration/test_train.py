"""launch/train.py as a user starts it: what it writes, and that only speed and memory depend on how it is run."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from muco_ds.config_cli import load_config, parse_args
from muco_ds.metrics import METRIC_KEYS
from muco_ds.rank_log import log_path
from muco_ds.run_status import FINISHED, read_status

from programs import Demo, Programs, Result, losses, metrics

STEPS = 3
PROMISED_KEYS = (
    *("step", "loss", "lr", "grad_norm", "temperature", "pairs", "images", "llm_tokens", "vit_patches", "pairs_per_s"),
    *("tokens_per_s", "mfu", "pack_fill", "imbalance", "data_wait_frac", "peak_mem_gib", "masked_frac"),
    *("same_image_frac", "same_target_frac", "false_negative_frac", "extra_positive_frac"),
    *("in_batch_top1", "pos_sim", "hardest_neg_sim", "negatives"),
    *("step_s_p50", "step_s_p90", "step_s_max", "data_wait_s_p50", "data_wait_s_p90", "data_wait_s_max"),
    *("slowest_rank", "slowest_late_s", "resident_gib", "open_files"),
)
SHORT = {"run.max_steps": STEPS}


@pytest.fixture(scope="module")
def one_process(demo: Demo, programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of the run that the others are compared with: a plain program, ZeRO-3."""
    out = tmp_path_factory.mktemp("one")
    programs.run(demo.train(out, SHORT)).check()
    return out


@pytest.fixture(scope="module")
def launched(demo: Demo, programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """Output folder and outputs of the real launcher's run on two ranks under ZeRO-3, with validation."""
    out = tmp_path_factory.mktemp("launched")
    overrides = {**SHORT, "validation.every": 2, "validation.rows": 2}
    return out, programs.launch(["deepspeed", "--num_gpus", "2", *demo.train(out, overrides)]).check()


def write_stage(folder: Path, stage: int) -> Path:
    path = folder / f"zero{stage}.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage}, "steps_per_print": 1_000_000_000}))
    return path


def close(first: dict[int, float], second: dict[int, float]) -> None:
    assert list(first) == list(second) == list(range(1, STEPS + 1))
    assert list(first.values()) == pytest.approx(list(second.values()), rel=1e-5)


def test_every_metrics_line_holds_the_promised_keys(launched: tuple[Path, Result]) -> None:
    lines = metrics(launched[0])
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert set(PROMISED_KEYS) == METRIC_KEYS
    for line in lines:
        assert set(PROMISED_KEYS) <= set(line)
        assert line["images"] == 8 and line["pairs"] == 56
        assert line["llm_tokens"] > 0 and line["vit_patches"] == 8 * 36
        assert 0 < line["pack_fill"] <= 1 <= line["imbalance"]
        assert line["mfu"] is None, "no peak is known of a CPU"
        assert all(isinstance(line[key], int | float) for key in PROMISED_KEYS if key != "mfu")
    assert [("val/overall/precision@1" in line) for line in lines] == [False, True, True]


def test_each_rank_leaves_a_log_and_a_heartbeat(launched: tuple[Path, Result]) -> None:
    folder = launched[0] / "run"
    status = read_status(folder)
    assert (status.verdict, status.step, status.steps, status.ranks) == (FINISHED, STEPS, STEPS, 2)
    assert status.checkpoint == f"step_{STEPS:07d}" and status.checkpoint_bytes and not status.warnings
    assert status.validation["step"] == STEPS and status.phase == "ended"
    for rank in (0, 1):
        written = log_path(folder, rank).read_text()
        assert f"start: rank {rank} of 2" in written and "steps 0 to 3 of 8 examples" in written
    assert launched[1].output.count("steps 0 to 3 of 8 examples") == 1, "the console shows rank 0 alone"
    for line in metrics(launched[0]):
        assert 0 < line["step_s_p50"] <= line["step_s_max"] and line["slowest_rank"] in (0, 1)
        assert 0 <= line["slowest_late_s"] < 60 and line["open_files"] > 5


def test_the_saved_config_is_the_run(launched: tuple[Path, Result], demo: Demo) -> None:
    argv = demo.train(launched[0], {**SHORT, "validation.every": 2, "validation.rows": 2})[1:]
    assert load_config(launched[0] / "run" / "config.yaml") == parse_args(argv).config


def test_tensorboard_holds_scalars_config_and_a_picture(launched: tuple[Path, Result]) -> None:
    board = EventAccumulator(str(launched[0] / "run" / "tb"))
    board.Reload()
    tags = board.Tags()
    assert {f"train/{key}" for key in PROMISED_KEYS if key not in ("step", "mfu")} <= set(tags["scalars"])
    assert [event.value for event in board.Scalars("train/loss")] == pytest.approx(list(losses(launched[0]).values()))
    text = board.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "temperature: 0.02" in text and "pack_tokens: 4096" in text
    assert tags["images"] == ["val/answers"]
    pictures = board.Images("val/answers")
    assert [picture.step for picture in pictures] == [2, 3] and pictures[0].width >= 300


def test_two_ranks_train_as_one_process(launched: tuple[Path, Result], one_process: Path) -> None:
    close(losses(launched[0]), losses(one_process))
    assert losses(one_process)[1] != pytest.approx(losses(one_process)[3], rel=1e-3), "nothing was learned"
    first, second = ([line["grad_norm"] for line in metrics(out)] for out in (launched[0], one_process))
    assert first == pytest.approx(second, rel=1e-4)


def test_torchrun_gives_the_same_run(demo: Demo, programs: Programs, one_process: Path, tmp_path: Path) -> None:
    command = ["torchrun", "--nproc_per_node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command += demo.train(tmp_path, SHORT)
    programs.launch(command).check()
    close(losses(tmp_path), losses(one_process))


@pytest.mark.parametrize(
    ("stage", "ranks", "packs"),
    [(0, 2, 1), (2, 2, 1), (0, 2, 4), (1, 2, 4), (2, 2, 4), (3, 2, 4), (3, 1, 8)],
)
def test_zero_stages_ranks_and_packs_give_the_same_losses_and_gradients(
    stage: int, ranks: int, packs: int, demo: Demo, programs: Programs, one_process: Path, tmp_path: Path
) -> None:
    """Several packs a rank go through the gradient cache; losses of later steps show the earlier steps' gradients."""
    overrides = {**SHORT, "deepspeed": write_stage(tmp_path, stage)}
    if packs > 1:
        overrides["batch.pack_tokens"] = 340  # a pack holds one example
    programs.run(demo.train(tmp_path, overrides), ranks=ranks).check()
    fill = [line["pack_fill"] for line in metrics(tmp_path)]
    used = [line["llm_tokens"] for line in metrics(tmp_path)]
    budget = overrides.get("batch.pack_tokens", 4096)
    assert {round(tokens / share / budget / ranks) for tokens, share in zip(used, fill, strict=True)} == {packs}
    close(losses(tmp_path), losses(one_process))
    norms = [[line["grad_norm"] for line in metrics(out)] for out in (tmp_path, one_process)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_a_frozen_tower_gives_the_same_losses_in_several_packs(demo: Demo, programs: Programs, tmp_path: Path) -> None:
    """bf16-free on purpose: equality to 1e-5 needs fp32. The tower's output of the first pass serves the second."""
    frozen = {**SHORT, "model.freeze_vision": "true", "model.activation_checkpointing.text": 1}
    programs.run(demo.train(tmp_path / "one", frozen), ranks=2).check()
    programs.run(demo.train(tmp_path / "many", {**frozen, "batch.pack_tokens": 340}), ranks=2).check()
    close(losses(tmp_path / "many"), losses(tmp_path / "one"))


def test_activation_checkpointing_changes_only_memory(
    demo: Demo, programs: Programs, one_process: Path, tmp_path: Path
) -> None:
    """All vision layers and half of the text layers: under ZeRO-3 with and without a second gather each."""
    options = {**SHORT, "model.activation_checkpointing.text": 0.5, "model.activation_checkpointing.vision": 1}
    programs.run(demo.train(tmp_path, options), ranks=2).check()
    close(losses(tmp_path), losses(one_process))


def test_packing_budget_and_workers_change_nothing(
    demo: Demo, programs: Programs, one_process: Path, tmp_path: Path
) -> None:
    programs.run(demo.train(tmp_path, {**SHORT, "batch.pack_tokens": 9000, "data.workers": 0})).check()
    close(losses(tmp_path), losses(one_process))


def test_ranks_without_a_picture_keep_in_step(demo: Demo, programs: Programs, tmp_path: Path) -> None:
    """Two rows a step on two ranks, most rows text alone: on most steps one rank, or both, has no picture at all."""
    table = pq.read_table(demo.data / "train.parquet")
    rows = table.to_pylist()[:16]
    for i, row in enumerate(rows):
        if i % 3:
            row["qry_image_path"] = ""
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), tmp_path / "mixed.parquet")
    overrides = {"data.train": tmp_path / "mixed.parquet", "batch.images": 2, "run.max_steps": 6}
    programs.run(demo.train(tmp_path, overrides), ranks=2).check()
    patches = {line["vit_patches"] for line in metrics(tmp_path)}
    assert 0 in patches and 36 in patches, "the draw no longer holds both kinds of step"


def test_dry_run_says_what_fits_and_saves_nothing(demo: Demo, programs: Programs, tmp_path: Path) -> None:
    result = programs.run([*demo.train(tmp_path), "--dry_run"], ranks=2).check()
    lines = [line for line in result.output.splitlines() if line.startswith("dry run: ")]
    assert len(lines) == 1 and "4 steps planned, 8 per epoch" in lines[0] and "peak memory" in lines[0]
    assert not list(tmp_path.rglob("step_*")) and not metrics(tmp_path)


def test_print_config_is_a_recipe(demo: Demo, programs: Programs, tmp_path: Path) -> None:
    result = programs.run([*demo.train(tmp_path, {"optim.lr": 0.5}), "--print_config"]).check()
    recipe = tmp_path / "printed.yaml"
    recipe.write_text(result.stdout[0])
    assert load_config(recipe) == parse_args(demo.train(tmp_path, {"optim.lr": 0.5})[1:]).config
    assert os.listdir(tmp_path) == ["printed.yaml"]


def test_a_mixture_trains_alike_on_any_number_of_ranks(demo: Demo, programs: Programs, tmp_path: Path) -> None:
    """Two data sets, the rare one weighted up until its rows come again within a few steps, in runs of two."""
    rows = pq.read_table(demo.data / "train.parquet")
    pq.write_table(rows.slice(0, 50), tmp_path / "many.parquet")
    pq.write_table(rows.slice(50, 6), tmp_path / "few.parquet")
    recipe = yaml.safe_load(demo.recipe.read_text())
    recipe["data"]["train"] = [
        {"path": str(tmp_path / "many.parquet"), "weight": 1},
        {"path": str(tmp_path / "few.parquet"), "images": str(demo.data / "images"), "weight": 1},
    ]
    recipe["batch"]["source_run"] = 2
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    runs = []
    for ranks in (1, 2):
        mixture = replace(demo, folder=tmp_path)
        programs.run(mixture.train(tmp_path / str(ranks), SHORT), ranks=ranks).check()
        runs.append(losses(tmp_path / str(ranks)))
    close(*runs)
