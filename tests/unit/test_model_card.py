"""The model card: recipe, data, scores and programs; nothing about the machine."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig

from muco_ds.config import DataOptions, ModelOptions, RunConfig, RunOptions
from muco_ds.errors import UserError
from muco_ds.model_card import find_scores, model_card

from tiny_models import model_folder, settings

HERE = "/data/people/ann"


def meta(**changed: Any) -> dict[str, Any]:
    """meta.json of a run; `changed`: "model__path" -> value in its configuration."""
    config = asdict(
        RunConfig(
            RunOptions("first|run", dir=f"{HERE}/runs", max_steps=900),
            ModelOptions(f"{HERE}/models/Qwen2-VL-2B-Instruct"),
            DataOptions(f"{HERE}/M3T.parquet", f"{HERE}/images"),
        )
    )
    for key, value in changed.items():
        *sections, name = key.split("__")
        reduce(dict.__getitem__, sections, config)[name] = value
    return {
        **{"step": 500, "config": config, "world_size": 8, "zero_stage": 3, "data": {"rows": 1234, "digest": "x"}},
        "versions": {"torch": "2.13.0"},
    }


def card(made: Mapping[str, Any], kind: str = "qwen2_vl", scores: Any = (), **options: Any) -> str:
    adapter = options.pop("adapter", False)
    config = AutoConfig.from_pretrained(model_folder(kind))
    return model_card(config, replace(settings(), **options), made, scores, adapter=adapter)


def rows(text: str) -> dict[str, str]:
    """First cell -> the rest, of all tables."""
    lines = [line.strip("| ").split(" | ", 1) for line in text.splitlines() if line.startswith("| ")]
    return {line[0]: line[1] for line in lines if len(line) > 1}


def test_the_recipe_and_the_data_are_named_without_the_machine() -> None:
    text = card(meta())
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "library_name": "sentence-transformers",
        "pipeline_tag": "feature-extraction",
        "base_model": "Qwen/Qwen2-VL-2B-Instruct",
        "tags": ["muco_ds", "multimodal", "qwen2_vl", "sentence-transformers"],
    }
    assert "# first\\|run" in body and "vectors of 96 components" in body and "A Qwen2-VL of" in body
    found = rows(body)
    assert found["backbone"] == "Qwen2-VL-2B-Instruct" and found["steps"] == "500"
    assert found["learning rate"] == "5e-05, constant, 100 steps of warm-up" and found["temperature"] == "0.02, fixed"
    assert found["examples a step"] == "1024" and found["ranks, ZeRO stage"] == "8, 3"
    assert found["read at"] == "\\<\\|emb\\|\\>" and found["M3T.parquet"] == "by its rows"
    assert "1234 usable rows" in body and "Scores" not in body
    assert HERE not in text and "ann" not in text.split()


@pytest.mark.parametrize(
    ("path", "base"),
    [
        (f"{HERE}/hub/models--Qwen--Qwen3-VL-8B-Instruct/snapshots/0123abc", "Qwen/Qwen3-VL-8B-Instruct"),
        ("models/Qwen2.5-VL-3B-Instruct/", "Qwen/Qwen2.5-VL-3B-Instruct"),
        ("models/Qwen2-VL-7B", "Qwen/Qwen2-VL-7B"),
        ("models/Qwen2-VL-2B-Instruct-mine", None),
        ("runs/first/model", None),
    ],
)
def test_the_base_model_is_named_where_it_is_a_released_one(path: str, base: str | None) -> None:
    assert yaml.safe_load(card(meta(model__path=path)).split("---\n")[1]).get("base_model") == base


def test_a_mixture_an_adapter_and_other_stages_are_told() -> None:
    train = [{"path": f"{HERE}/own/*.parquet", "weight": 3.0}, {"path": f"{HERE}/M3T.parquet", "weight": 1.0}]
    lora = {"rank": 16, "alpha": 64, "dora": True, "targets": "text"}
    found = rows(card(meta(data__train=train, model__lora=lora, task__name="finetune", task__negatives=3)))
    assert found["own/\\*.parquet"] == "3.0" and found["M3T.parquet"] == "1.0"
    assert found["trained"] == "DoRA of rank 16, alpha 64, on: text" and found["hard negatives of a row"] == "up to 3"
    assert "turns see earlier ones" not in found
    text = card(meta(task__name="coma_compress"), compression_tokens=4)
    assert "not trained to match" in text and "temperature" not in rows(text)
    assert "LoRA" not in card(meta(model__lora={"rank": 0}))

    alone = card(meta(model__lora=lora), adapter=True)
    assert yaml.safe_load(alone.split("---\n")[1])["library_name"] == "peft"
    assert "base=" in alone and "SentenceTransformer(" not in alone


def test_sizes_and_compression_tokens_have_their_parts() -> None:
    parts = ("of 4 compression tokens", "of 24, 96 components")
    for sizes, tokens in (([], 0), ([24, 96], 0), ([], 4), ([24, 96], 4)):
        text = card(meta(), matryoshka=sizes, compression_tokens=tokens)
        assert [part in text for part in parts] == [tokens > 0, bool(sizes)]
        assert ('SentenceTransformer(".", trust_remote_code=True)' in text) == (tokens > 0)
        assert ("truncate_dim=24, trust_remote_code=True" in text) == bool(sizes and tokens)
        assert ("[-4:].mean(0)" in text) == (tokens > 0) and ("[-1], dim=0" in text) == (tokens == 0)
        tags = yaml.safe_load(text.split("---\n")[1])["tags"]
        assert ("matryoshka" in tags, "custom_code" in tags) == (bool(sizes), tokens > 0)
    assert "Sizes of pictures" not in text and "short side to 640 px" in card(meta(), short_side=640)


def test_small_pictures_are_told_apart() -> None:
    assert "Pictures with a side under 28 px are the exception" in card(meta())


def test_the_programs_are_whole() -> None:
    for program in card(meta(), matryoshka=[24, 96], compression_tokens=4).split("```python\n")[1:]:
        compile(program.split("```")[0], "card", "exec")


def test_scores_are_the_last_validation_and_younger_evaluations(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step_0000500"
    checkpoint.mkdir(parents=True)
    (checkpoint / "meta.json").write_text(json.dumps(meta()))
    assert find_scores(checkpoint, None) == []
    lines: list[dict[str, Any]] = [
        {"step": 400, "loss": 2.0, "val/overall/precision@1": 0.25, "val/turn 1/precision@1": 0.5},
        {"step": 410, "loss": 2.0},
        {"step": 600, "loss": 1.0, "val/overall/precision@1": 0.9},  # after the checkpoint
    ]
    metrics = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 61'
    (tmp_path / "run" / "metrics.jsonl").write_text(metrics)
    results = {"overall": {"precision@1": 0.375, "queries": 8, "candidates": 5, "chance": 0.2, "version": "x"}}
    for name in ("old", "evaluation"):
        (tmp_path / "run" / name).mkdir()
        (tmp_path / "run" / name / "results.json").write_text(json.dumps(results))
    then = (checkpoint / "meta.json").stat().st_mtime
    os.utime(tmp_path / "run" / "old" / "results.json", (then - 5, then - 5))
    os.utime(tmp_path / "run" / "evaluation" / "results.json", (then + 5, then + 5))
    validated = {"overall": {"precision@1": 0.25}, "turn 1": {"precision@1": 0.5}}
    found = find_scores(checkpoint, None)
    assert found == [("held-out rows of the run, step 400", validated), ("evaluation/results.json", results)]

    text = card(meta(), scores=found)
    assert "## Scores: held-out rows of the run, step 400" in text and "| turn 1 | 0.5000 |" in text
    assert "|  | precision@1 | queries | candidates | chance |" in text
    assert "| overall | 0.3750 | 8 | 5 | 0.2000 |" in text

    earlier = checkpoint.with_name("step_0000300")  # the evaluation may be of another checkpoint's export
    earlier.mkdir()
    (earlier / "meta.json").write_text(json.dumps(meta() | {"step": 450}))
    os.utime(earlier / "meta.json", (then - 9, then - 9))
    checkpoint.with_name("step_0000700.tmp").mkdir()
    assert find_scores(earlier, None) == found[:1] and find_scores(checkpoint, None) == found

    other = tmp_path / "other.json"
    other.write_text(json.dumps(results))
    assert [title for title, _ in find_scores(checkpoint, other)] == [found[0][0], "other.json"]
    for content in ("[1]", '{"overall": 5}', "{"):
        other.write_text(content)
        with pytest.raises(UserError, match=r"--scores: .*other\.json' is no results\.json"):
            find_scores(checkpoint, other)
    with pytest.raises(UserError, match="--scores: "):
        find_scores(checkpoint, tmp_path / "absent.json")
