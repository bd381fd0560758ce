"""A resumed run is the run that was saved: each key of the configuration may change, or is refused by its name."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from muco_ds.config import DataOptions, ModelOptions, RunConfig, RunOptions
from muco_ds.errors import UserError
from muco_ds.manifest import MANIFEST
from muco_ds.resume import MAY_CHANGE, check_same_run

CONFIG = asdict(
    RunConfig(
        run=RunOptions(name="r", max_steps=10),
        model=ModelOptions(path="demo/model"),
        data=DataOptions(train="train.parquet", images="images"),
    )
)

DATA = {"rows": 9, "digest": "0af1"}

# Written out, not taken from MAY_CHANGE: a key that is added to the configuration must be put in one of the two.
FREE = {
    *("run.dir", "run.max_steps", "run.epochs", "run.deadline_s", "run.timeout_s"),
    *("model.attention", "model.kernels"),
    "model.activation_checkpointing.text",
    "model.activation_checkpointing.vision",
    *("data.images", "data.val", "data.index_dir", "data.workers", "batch.pack_tokens"),
    *("validation.every", "validation.rows", "log.every"),
    *(f"checkpoint.{key}" for key in ("every", "keep", "keep_every", "resume", "background", "copy_to")),
    *("optim.lr", "optim.max_skipped", "loss.key_exchange"),
    *(
        f"evaluation.{suite}.{key}"
        for suite in ("m3t", "mmeb", "mbeir")
        for key in ("every", "data", "images", "datasets", "rows", "seconds")
    ),
}
BOUND = {
    *("run.name", "run.seed", "run.precision", "model.path", "model.pool_token", "model.freeze_vision"),
    *("task.name", "task.query_history", "task.target_history", "task.negatives", "task.reconstruct"),
    *("task.turns", "task.turn_weights", "curriculum.steps", "curriculum.turns", "curriculum.negatives"),
    *("task.compound", "prompts.after_query", "prompts.after_target", "model.compression_tokens", "model.template"),
    *("task.answers_see", "task.train_questions", "prompts.compress_picture", "prompts.compress_text"),
    *("data.train", "data.min_pixels", "data.max_pixels", "data.short_side", "batch.images", "batch.source_run"),
    *("optim.warmup_steps", "optim.schedule", "optim.weight_decay", "optim.beta1", "optim.beta2"),
    *("optim.eps", "optim.max_grad_norm", "loss.temperature", "loss.symmetric", "loss.mask_same_image"),
    *("loss.same_target", "loss.false_negative_margin", "loss.matryoshka", "deepspeed", "optim.vision_lr"),
    *(f"model.lora.{key}" for key in ("rank", "alpha", "dropout", "dora", "targets", "train_embeddings")),
    *(f"temperature.{key}" for key in ("schedule", "start", "steps", "lr", "min", "max")),
}


def keys() -> list[str]:
    def leaves(tree: dict[str, Any], prefix: str) -> list[str]:
        found = [leaves(v, f"{prefix}{k}.") if isinstance(v, dict) and v else [f"{prefix}{k}"] for k, v in tree.items()]
        return [key for part in found for key in part]

    return leaves(CONFIG, "")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "step_0000010"
    path.mkdir()
    meta = json.dumps({"config": CONFIG, "world_size": 1, "data": DATA})
    (path / "meta.json").write_text(meta)
    (path / MANIFEST).write_text(json.dumps({"files": {"meta.json": len(meta)}}))
    return path


def changed(key: str) -> tuple[dict[str, Any], Any]:
    config = copy.deepcopy(CONFIG)
    section, _, name = key.rpartition(".")
    tree = config
    for part in section.split(".") if section else []:
        tree = tree[part]
    old = tree[name]
    if isinstance(old, bool):
        tree[name] = not old
    elif isinstance(old, str):
        tree[name] = f"{old}x"
    else:
        tree[name] = (old or 6) + 1
    return config, tree[name]


def test_the_same_configuration_is_the_same_run(saved: Path) -> None:
    check_same_run(saved, copy.deepcopy(CONFIG), DATA)


@pytest.mark.parametrize("key", keys())
def test_each_key_may_change_or_is_refused_by_name(saved: Path, key: str) -> None:
    assert (key in FREE) != (key in BOUND), f"decide whether {key} may change between a run and its continuation"
    config, value = changed(key)
    if key in FREE:
        check_same_run(saved, config, DATA)
        return
    with pytest.raises(UserError) as error:
        check_same_run(saved, config, DATA)
    message = str(error.value)
    assert message.startswith(f"{key}={value} ") and str(saved) in message and "run.name" in message


def test_lists_hold_nothing_that_is_gone() -> None:
    assert set(keys()) == FREE | BOUND
    assert all(any(f"{key}.".startswith(f"{name}.") for key in keys()) for name in MAY_CHANGE)


def test_a_key_that_the_saved_run_did_not_know_is_refused(saved: Path) -> None:
    config = copy.deepcopy(CONFIG)
    config["loss"]["new_weight"] = 0.5
    with pytest.raises(UserError, match=r"loss\.new_weight=0\.5"):
        check_same_run(saved, config, DATA)


@pytest.mark.parametrize("data", [{"rows": 8, "digest": "0af1"}, {"rows": 9, "digest": "0af2"}])
def test_other_rows_under_the_same_path_are_refused(saved: Path, data: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="usable rows"):
        check_same_run(saved, CONFIG, data)


@pytest.mark.parametrize(("before", "now"), [(None, [8]), ([8, 16], [8]), ([8], [8, 16]), ([8], None)])
def test_sizes_are_compared_as_a_list(saved: Path, before: list[int] | None, now: list[int] | None) -> None:
    meta = json.loads((saved / "meta.json").read_text())
    meta["config"]["loss"]["matryoshka"] = before
    content = json.dumps(meta)
    (saved / "meta.json").write_text(content)
    (saved / MANIFEST).write_text(json.dumps({"files": {"meta.json": len(content)}}))
    config = copy.deepcopy(meta["config"])
    check_same_run(saved, config, DATA)
    config["loss"]["matryoshka"] = now
    with pytest.raises(UserError) as error:
        check_same_run(saved, config, DATA)
    assert str(error.value).startswith(f"loss.matryoshka={now} but {saved} was trained with {before}: ")


def test_a_mixture_is_compared_entry_by_entry(saved: Path) -> None:
    entries = [{"path": "a", "images": "x", "weight": 1.0}, {"path": "b", "images": None, "weight": 2.0}]
    meta = json.loads((saved / "meta.json").read_text())
    meta["config"]["data"]["train"] = entries
    content = json.dumps(meta)
    (saved / "meta.json").write_text(content)
    (saved / MANIFEST).write_text(json.dumps({"files": {"meta.json": len(content)}}))

    def check(*changed: dict[str, Any]) -> None:
        config = copy.deepcopy(CONFIG)
        config["data"]["train"] = list(changed)
        check_same_run(saved, config, DATA)

    check(*entries)
    check({**entries[0], "images": "elsewhere"}, entries[1])
    with pytest.raises(UserError, match=r"data\.train\[1\]\.weight=3\.0 but .* was trained with 2\.0"):
        check(entries[0], {**entries[1], "weight": 3.0})
    with pytest.raises(UserError, match=r"data\.train\[1\]\.path=None but"):
        check(entries[0])
    with pytest.raises(UserError, match=r"data\.train\[2\]\.path=c but"):
        check(*entries, {"path": "c", "images": None, "weight": 1.0})


def test_weights_by_kind_are_compared_whole_whatever_json_makes_of_their_keys(saved: Path) -> None:
    meta = json.loads((saved / "meta.json").read_text())
    meta["config"]["task"]["turn_weights"] = {0: 0.5, 5: 2.0}
    content = json.dumps(meta)
    (saved / "meta.json").write_text(content)
    (saved / MANIFEST).write_text(json.dumps({"files": {"meta.json": len(content)}}))
    config = copy.deepcopy(CONFIG)
    config["task"]["turn_weights"] = {0: 0.5, 5: 2.0}
    check_same_run(saved, config, DATA)
    for other in ({}, {0: 0.5}, {0: 0.5, 5: 3.0}):
        config["task"]["turn_weights"] = other
        with pytest.raises(
            UserError, match=r"task\.turn_weights=\{.* was trained with \{'0': 0\.5, '5': 2\.0\}: change"
        ):
            check_same_run(saved, config, DATA)
