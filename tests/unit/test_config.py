"""The run's config: one typed, validated, saved object, with one-line errors that name the key."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from muco_ds.config import RunConfig, Source, check_paths, save_config, validate
from muco_ds.config_activations import ActivationCheckpointing
from muco_ds.config_cli import load_config, parse_args
from muco_ds.config_lora import LoraOptions
from muco_ds.errors import UserError

MINIMAL: dict[str, dict[str, object]] = {
    "run": {"name": "first", "max_steps": 200},
    "model": {"path": "model"},
    "data": {"train": "train.parquet", "images": "pictures"},
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def message(argv: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        parse_args(argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def with_recipe(tmp_path: Path, text: str) -> str:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    return message(["--config", str(path)])


def changed(config: RunConfig, section: str, **values: object) -> RunConfig:
    changes: dict[str, Any] = {section: replace(getattr(config, section), **values)}
    return replace(config, **changes)


def test_recipe_and_overrides_build_a_typed_config(recipe: Path) -> None:
    argv = ["--config", str(recipe), "--optim.lr", "2e-4", "--run.epochs=3", "--loss.symmetric", "true"]
    invocation = parse_args(argv)
    config = invocation.config
    assert invocation.dry_run is False
    assert (config.run.name, config.run.max_steps, config.run.epochs) == ("first", 200, 3.0)
    assert isinstance(config.run.epochs, float)
    assert config.optim.lr == 2e-4
    assert config.loss.symmetric is True
    assert (config.loss.temperature, config.batch.images, config.batch.pack_tokens) == (0.02, 1024, 16384)
    assert (config.data.min_pixels, config.data.max_pixels) == (256 * 28 * 28, 1280 * 28 * 28)


def test_a_section_in_a_section(tmp_path: Path) -> None:
    path = tmp_path / "lora.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, "model": {"path": "m", "lora": {"rank": 16, "dora": True}}}))
    config = parse_args(["--config", str(path), "--model.lora.dropout", "0.1"]).config
    assert config.model.lora == LoraOptions(rank=16, dora=True, dropout=0.1)
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


def test_scientific_notation_in_a_recipe_is_a_number(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(MINIMAL) + "optim:\n  lr: 1e-4\n")  # YAML 1.1 alone reads 1e-4 as text
    assert load_config(path).optim.lr == 1e-4


@pytest.mark.parametrize("rank", [["--local_rank=1"], ["--local-rank=1"], ["--local_rank", "1"], ["--local-rank", "1"]])
def test_launchers_local_rank_is_ignored(recipe: Path, rank: list[str]) -> None:
    plain = parse_args(["--config", str(recipe)])
    assert parse_args([*rank, "--config", str(recipe)]) == plain


def test_dry_run_is_beside_the_config(recipe: Path) -> None:
    assert parse_args(["--config", str(recipe), "--dry_run"]).dry_run is True


def test_saved_config_is_a_recipe(recipe: Path, tmp_path: Path) -> None:
    argv = ["--config", str(recipe), "--optim.eps", "1e-9", "--data.short_side", "640", "--run.epochs", "0.5"]
    config = parse_args(argv).config
    config = changed(config, "run", name="naïve 名")
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    assert parse_args(["--config", str(tmp_path / "saved.yaml")]).config == config


def test_printed_config_is_a_recipe(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--config", str(recipe), "--batch.images", "64", "--dry_run"]
    with pytest.raises(SystemExit) as exit_:
        parse_args([*argv, "--print_config"])
    assert not exit_.value.code
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert load_config(tmp_path / "printed.yaml") == parse_args(argv).config


def test_unknown_key_names_the_place_and_the_nearest_key(recipe: Path, tmp_path: Path) -> None:
    text = message(["--config", str(recipe), "--optim.learning_rate", "1"])
    assert "'optim.learning_rate'" in text and "command line" in text
    text = with_recipe(tmp_path, "run: {name: a, max_step: 5}")
    assert "'run.max_step'" in text and "bad.yaml" in text and "'run.max_steps'" in text
    text = with_recipe(tmp_path, "optimizer: {lr: 5}")
    assert "'optimizer'" in text and "bad.yaml" in text and "'optim" in text
    assert "'loss.temperature'" in message(["--config", str(recipe), "--loss.temprature=1"])
    text = with_recipe(tmp_path, "model: {path: m, lora: {ranks: 5}}")
    assert "'model.lora.ranks'" in text and "bad.yaml" in text and "'model.lora.rank'" in text
    assert "section 'model.lora' must be a mapping" in with_recipe(tmp_path, "model: {path: m, lora: 5}")
    # A prefix is not an abbreviation.
    assert "'optim.warmup_steps'" in message(["--config", str(recipe), "--optim.warm", "1"])


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("optim.lr", "fast", "float"),
        ("run.max_steps", "1.5", "int"),
        ("loss.symmetric", "maybe", "bool"),
        ("task.name", "foo", "muco"),
        ("run.precision", "fp16", "bf16"),
    ],
)
def test_wrong_type_names_key_value_and_type(recipe: Path, tmp_path: Path, key: str, value: str, expected: str) -> None:
    text = message(["--config", str(recipe), f"--{key}", value])
    assert key in text and value in text and expected in text and "command line" in text
    section, name = key.split(".")
    tree = {part: dict(items) for part, items in MINIMAL.items()}
    tree.setdefault(section, {})[name] = value
    text = with_recipe(tmp_path, yaml.safe_dump(tree))
    assert key in text and value in text and expected in text and "bad.yaml" in text


def test_broken_recipes_name_the_file(tmp_path: Path) -> None:
    assert "none.yaml" in message(["--config", "none.yaml"])
    assert "bad.yaml: line 2" in with_recipe(tmp_path, "run: {name: a}\noptim: {lr: 1")
    assert "'name' is set twice" in with_recipe(tmp_path, "run: {name: a, name: b}")
    assert "section 'optim'" in with_recipe(tmp_path, "optim: 3")
    assert "empty" in with_recipe(tmp_path, "")


def test_parsing_ends_with_the_cross_checks(recipe: Path) -> None:
    assert "optim.warmup_steps" in message(["--config", str(recipe), "--optim.warmup_steps", "500"])


def test_command_line_mistakes_are_one_line(recipe: Path) -> None:
    assert "'stray'" in message(["--config", str(recipe), "stray"])
    assert "--optim.lr needs a value" in message(["--optim.lr", "--config", str(recipe)])
    text = message(["--run.name", "x", "--run.max_steps", "1"])
    assert "model.path" in text and "data.train" in text and "data.images" in text


@pytest.mark.parametrize(
    ("section", "values", "parts"),
    [
        ("task", {"query_history": 1.5}, ["task.query_history", "1.5"]),
        ("task", {"target_history": -0.1}, ["task.target_history", "-0.1"]),
        ("data", {"min_pixels": 4000, "max_pixels": 3000}, ["data.min_pixels", "4000", "data.max_pixels", "3000"]),
        ("optim", {"warmup_steps": 201}, ["optim.warmup_steps", "201", "run.max_steps", "200"]),
        ("optim", {"lr": float("nan")}, ["optim.lr", "nan"]),
        ("optim", {"lr": float("inf")}, ["optim.lr", "inf"]),
        ("optim", {"beta2": 1.0}, ["optim.beta2", "1.0"]),
        ("loss", {"temperature": 0.0}, ["loss.temperature", "0.0"]),
        ("loss", {"false_negative_margin": -0.1}, ["loss.false_negative_margin", "-0.1", "at least 0"]),
        ("temperature", {"steps": 0}, ["temperature.steps", "0"]),
        ("temperature", {"min": math.nan}, ["temperature.min", "nan"]),
        ("temperature", {"schedule": "learned", "min": 0.03}, ["loss.temperature is 0.02", "temperature.min, 0.03"]),
        ("temperature", {"schedule": "learned", "max": 0.015}, ["loss.temperature is 0.02", "temperature.max, 0.015"]),
        ("validation", {"every": 50}, ["validation.every", "50", "data.val"]),
        ("batch", {"images": 1}, ["batch.images", "1"]),
        ("run", {"max_steps": None}, ["run.max_steps", "run.epochs"]),
        ("run", {"max_steps": 0}, ["run.max_steps", "0"]),
        ("run", {"name": "a/b"}, ["run.name", "a/b"]),
        ("checkpoint", {"every": 0}, ["checkpoint.every", "0"]),
        ("model", {"pool_token": ""}, ["model.pool_token"]),
        ("model", {"lora": LoraOptions(rank=-1)}, ["model.lora.rank", "-1"]),
        ("model", {"lora": LoraOptions(rank=4, dropout=1.0)}, ["model.lora.dropout", "1.0", "at most"]),
        ("model", {"lora": LoraOptions(rank=4, targets="all")}, ["model.freeze_vision is true", "targets=all"]),
        ("model", {"lora": LoraOptions(rank=4), "freeze_vision": False}, ["freeze_vision is false", "targets=text"]),
        (
            "model",
            {"lora": LoraOptions(rank=4, targets="attention"), "freeze_vision": False},
            ["freeze_vision is false", "set it to true"],
        ),
        (
            "model",
            {"lora": LoraOptions(rank=1, targets="tokens", train_embeddings="none")},
            ["model.lora.targets is tokens", "model.lora.train_embeddings is none", "new or all"],
        ),
        (
            "model",
            {"activation_checkpointing": ActivationCheckpointing(1.0, 0.5)},
            ["model.activation_checkpointing.vision is 0.5", "model.freeze_vision is true", "null"],
        ),
        ("model", {"activation_checkpointing": ActivationCheckpointing(1.5)}, ["activation_checkpointing.text is 1.5"]),
        ("optim", {"vision_lr": 1e-4}, ["optim.vision_lr", "0.0001", "model.freeze_vision"]),
        ("optim", {"vision_lr": 0.0}, ["optim.vision_lr", "0.0"]),
    ],
)
def test_cross_checks_name_both_values(recipe: Path, section: str, values: dict[str, object], parts: list[str]) -> None:
    config = parse_args(["--config", str(recipe)]).config
    with pytest.raises(UserError) as caught:
        validate(changed(config, section, **values))
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_missing_inputs_are_named(recipe: Path, tmp_path: Path) -> None:
    config = parse_args(["--config", str(recipe)]).config
    (tmp_path / "rows").mkdir()
    (tmp_path / "pictures").mkdir()
    (tmp_path / "model").mkdir()
    rows, pictures = str(tmp_path / "rows"), str(tmp_path / "pictures")

    def problem(config: RunConfig) -> str:
        with pytest.raises(UserError) as caught:
            check_paths(config)
        return str(caught.value)

    assert "data.train" in problem(changed(config, "data", train=str(tmp_path / "absent")))
    assert rows in problem(changed(config, "data", train=rows))  # a folder without parquet files
    (tmp_path / "rows" / "0.parquet").touch()
    config = changed(config, "data", train=rows, images=str(tmp_path / "absent"))
    assert problem(config).startswith("data.images: no such folder")
    config = changed(config, "data", images=pictures)
    assert "model.path" in problem(config)
    config = changed(config, "model", path=str(tmp_path / "model"))
    check_paths(config)
    check_paths(changed(config, "data", train=rows + "/*.parquet"))
    with pytest.raises(UserError, match="hf download"):
        check_paths(changed(config, "model", path="Qwen/Qwen2-VL-2B-Instruct"))
    assert "data.val" in problem(changed(config, "data", val=rows + "/*.csv"))


@pytest.mark.parametrize(
    ("rank", "common", "said"),
    [
        ({}, False, "error: data.images: no such folder\n"),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True, "error: data.images: no such folder\n"),
        ({"RANK": "1"}, True, ""),
        ({"LOCAL_RANK": "1"}, False, "error: rank 1: data.images: no such folder\n"),
    ],
)
def test_user_errors_end_every_rank_in_one_voice(rank: dict[str, str], common: bool, said: str) -> None:
    """Rank 0 speaks; another rank only where rank 0 may not know."""
    code = (
        "import muco_ds.errors\n"
        "muco_ds.errors._GRACE_S = 0.0\n"
        "@muco_ds.errors.exit_on_user_error()\n"
        f"def main(): raise muco_ds.errors.UserError('data.images: no such folder', on_every_rank={common})\n"
        "main()"
    )
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK")} | rank
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == said


def test_reading_a_config_does_not_import_torch() -> None:
    code = "import sys, muco_ds.config_cli, muco_ds.ds_config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


MIXTURE = """
run: {name: x, max_steps: 300}
model: {path: demo/model}
data:
  images: pictures
  train:
    - {path: a.parquet, weight: 2}
    - {path: b.parquet, images: others, weight: 1}
"""


def test_a_mixture_is_a_list_of_data_sets(tmp_path: Path) -> None:
    path = tmp_path / "mixture.yaml"
    path.write_text(MIXTURE)
    config = parse_args(["--config", str(path)]).config
    assert config.data.sources() == [Source("a.parquet", "pictures", 2.0), Source("b.parquet", "others", 1.0)]
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    one = parse_args(["--config", str(path), "--data.train", "c.parquet"]).config
    assert one.data.sources() == [Source("c.parquet", "pictures", None)]
    with pytest.raises(UserError, match=r"data\.train\[0\]\.path: no such file or folder 'a\.parquet'"):
        check_paths(config)
    (tmp_path / "a.parquet").touch()
    sources = [Source(str(tmp_path / "a.parquet"), "nowhere")]
    with pytest.raises(UserError, match=r"data\.train\[0\]\.images: no such folder 'nowhere'"):
        check_paths(changed(config, "data", train=sources, images=str(tmp_path)))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("weight: 2", "wieght: 2", "unknown key 'data.train[0].wieght'"),
        ("path: b.parquet, ", "", "data.train[1] has no path"),
        ("weight: 2", "weight: two", "expected str | list[Source]"),
        (", weight: 2", "", "data.train[0] has no weight but others have"),
        ("weight: 2", "weight: -2", "data.train[0].weight is -2.0: it must be a finite number above 0"),
        ("weight: 2", "weight: .inf", "data.train[0].weight is inf"),
        ("model:", "batch: {source_run: 7, images: 64}\nmodel:", "batch.source_run is 7, which does not divide"),
    ],
)
def test_mistakes_in_a_mixture_are_named(old: str, new: str, words: str, tmp_path: Path) -> None:
    assert old in MIXTURE
    assert words in with_recipe(tmp_path, MIXTURE.replace(old, new))


def test_an_empty_mixture_is_refused(tmp_path: Path) -> None:
    text = MIXTURE[: MIXTURE.index("  train:")] + "  train: []\n"
    assert "data.train is an empty list" in with_recipe(tmp_path, text)


def test_a_mixture_on_the_command_line_is_checked_too(recipe: Path) -> None:
    argv = ["--config", str(recipe), "--data.train"]
    config = parse_args([*argv, '[{"path": "a.parquet", "weight": 2}]']).config
    assert config.data.sources() == [Source("a.parquet", "pictures", 2.0)]
    assert "data.train[0] has no path" in message([*argv, '[{"weight": 2}]'])
    assert "did you mean 'data.train[0].weight'" in message([*argv, '[{"path": "x", "wieght": 2}]'])
