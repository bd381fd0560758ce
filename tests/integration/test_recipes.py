"""Whatever is shipped to be started from runs: every recipe and every DeepSpeed JSON takes two steps."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from muco_ds.config_cli import load_config

from programs import REPOSITORY, TRAIN, Demo, Programs, losses

RECIPES = sorted((REPOSITORY / "launch" / "recipes").glob("*.yaml"))
ROWS = {
    "finetune": ("pairs_train.parquet", "pairs_test.parquet"),
    "coma_match": ("pairs_train.parquet", "pairs_test.parquet"),
    "coma_compress": ("conversations_train.jsonl", "conversations_test.jsonl"),
}
JSONS = sorted((REPOSITORY / "ds_configs").glob("*.json"))


def small(demo: Demo, out: Path, task: str) -> dict[str, object]:
    """Only paths, sizes and numbers of steps; what the recipe is about stays as it is."""
    train, held_out = ROWS.get(task, ("train.parquet", "test.parquet"))
    return {
        **{"run.name": "run", "run.dir": out, "run.max_steps": 2, "optim.warmup_steps": 1, "log.every": 1},
        **{"model.path": demo.model, "data.train": demo.data / train, "data.images": demo.data / "images"},
        **{"data.val": demo.data / held_out, "data.workers": 1, "validation.rows": 2},
        **{"data.short_side": "null", "data.min_pixels": 3136, "data.max_pixels": 7056},
        **{"batch.images": 8, "batch.pack_tokens": 4096, "batch.source_run": 1},
    }


def check(out: Path) -> None:
    assert list(losses(out)) == [1, 2] and all(math.isfinite(loss) for loss in losses(out).values())
    assert (out / "run" / "checkpoints" / "step_0000002" / "manifest.json").is_file()


def test_recipes_are_found() -> None:
    published = {f"muco_{size}_{stage}" for size in ("2b", "7b") for stage in ("pretrain", "finetune")}
    published |= {f"coma_{size}_{stage}" for size in ("3b", "7b") for stage in ("compress", "match")}
    demos = {"demo", "demo_finetune", "demo_lora", "demo_coma_compress", "demo_coma_match", "demo_coma_muco"}
    assert {*demos, *published} == {path.stem for path in RECIPES} and len(JSONS) >= 3


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_parses_and_runs_two_steps(recipe: Path, demo: Demo, programs: Programs, tmp_path: Path) -> None:
    task = load_config(recipe).task.name
    argv: list[str | Path] = [TRAIN, "--config", recipe]
    for key, value in small(demo, tmp_path, task).items():
        argv += [f"--{key}", str(value)]
    programs.run(argv).check()
    check(tmp_path)


@pytest.mark.parametrize("path", JSONS, ids=lambda path: path.stem)
def test_deepspeed_json_runs_two_steps(path: Path, demo: Demo, programs: Programs, tmp_path: Path) -> None:
    overrides = {"run.max_steps": 2, "deepspeed": f"ds_configs/{path.name}", "run.precision": "bf16"}
    programs.run(demo.train(tmp_path, overrides), ranks=2).check()
    check(tmp_path)
