"""tools/index_data.py as a user runs it: the report, the bad rows, and an index that the training run finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from muco_ds.config_cli import load_config
from muco_ds.data import index as index_module
from muco_ds.errors import UserError

from demo import MAX_PIXELS, MIN_PIXELS, Demo, run_here, write_mixed, write_picture

ROOT = Path(__file__).parents[2]


TOOL = ROOT / "tools" / "index_data.py"


def run_tool(*args: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, TOOL, *args], env=env, capture_output=True, text=True, timeout=120)


def test_report_and_index(
    demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parquet, images = write_mixed(tmp_path)
    (images / "3.png").unlink()
    recipe = tmp_path / "recipe.yaml"
    data = {"train": str(parquet), "images": str(images), "min_pixels": MIN_PIXELS, "max_pixels": MAX_PIXELS}
    sections = {"run": {"name": "x", "max_steps": 1}, "model": {"path": str(demo.model)}, "data": data}
    recipe.write_text(yaml.safe_dump({**sections, "optim": {"warmup_steps": 0}}))

    done = run_tool("--config", str(recipe), "--processes", "2", "--batch.pack_tokens", "150")
    assert done.returncode == 0, done.stderr
    assert "indexing" in done.stderr and "40/40" in done.stderr  # the progress bar
    config = load_config(recipe)

    def must_not_build(*_: object) -> None:
        pytest.fail("the training run builds the index again")

    from muco_ds.build import open_rows

    with monkeypatch.context() as patch:
        patch.setattr(index_module, "_build", must_not_build)
        reader, index = open_rows(config, demo.packer(), config.data.sources()[0], "data.train")
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    assert index.bad_rows > 0 and lines["rows"] == f"rows      40, usable {len(index)}, bad {index.bad_rows}"
    assert len(reader) == 40 and done.stdout.count("3.png: no such file") == min(index.bad_rows, 5)
    assert str(index.folder / "bad_rows.jsonl") in done.stdout
    turns_S = [len(reader.record(int(row)).turns) for row in index.samples["row"]]
    assert lines["turns"].endswith(f"min 1, mean {np.mean(turns_S):.1f}, max 5")
    assert f"max {index.samples['patches'].max()}" in lines["patches"] and "p95" in lines["tokens"]
    assert "does not fit batch.pack_tokens=150: raise it" in lines["longest"]

    write_picture(images / "3.png", 60, 60)
    capsys.readouterr()
    assert run_here(monkeypatch, TOOL, "--config", str(recipe)) == 0
    assert f"usable {len(index)}," in capsys.readouterr().out  # a mended picture is not noticed by itself
    assert run_here(monkeypatch, TOOL, "--config", str(recipe), "--rebuild") == 0
    again = capsys.readouterr().out
    assert "usable 40, bad 0" in again and "fits batch.pack_tokens=16384" in again

    assert run_here(monkeypatch, TOOL, "--config", str(recipe), "--data.train", str(tmp_path / "absent.parquet")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: data.train: no such file") and error.count("\n") == 1


def test_conversations(
    demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training and held-out rows are counted alike, as conversations; a long one is named and not cut."""
    lines = demo.train.with_name("conversations_train.jsonl").read_text().splitlines()[:20]
    row = json.loads(lines[3])
    row["conversations"] = row["conversations"][:2]
    row["conversations"][1]["value"] = "red " * 400
    lines[3:3] = [json.dumps({**row, "conversations": row["conversations"][:1]}), json.dumps(row)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    data = dict.fromkeys(("train", "val"), str(tmp_path / "rows.jsonl"))
    data |= {"images": str(demo.images), "index_dir": str(tmp_path / "index")}
    limits = {"min_pixels": MIN_PIXELS, "max_pixels": MAX_PIXELS}
    sections = {"run": {"name": "x", "max_steps": 1}, "data": {**data, **limits}, "task": {"name": "coma_compress"}}
    sections |= {"model": {"path": str(demo.model), "compression_tokens": 6}, "optim": {"warmup_steps": 0}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**sections, "batch": {"images": 8, "pack_tokens": 400}}))
    assert run_here(monkeypatch, TOOL, "--config", str(tmp_path / "recipe.yaml"), "--processes", "1") == 0
    _, train, held_out = capsys.readouterr().out.split("\ndata.")
    assert "rows      22, usable 21, bad 1\n  row 3: entry 0, a question, has no answer\n" in train
    assert "turns     a row: min 1, mean 6.7, max 7" in train
    (found,) = (line for line in train.splitlines() if line.startswith("longest"))
    assert found.startswith("longest   row 4, ") and "does not fit batch.pack_tokens=400: raise it" in found
    assert held_out.splitlines()[1:] == [line for line in train.splitlines()[1:] if line]

    config = load_config(tmp_path / "recipe.yaml")
    from muco_ds.build import build_data

    tokens = found.removeprefix("longest   row 4, ").split()[0]
    with pytest.raises(UserError, match=rf"data\.train row 4 needs up to {tokens} tokens but batch\.pack_tokens=400"):
        build_data(config)
    config.batch.pack_tokens = int(tokens)
    plan = build_data(config).plan
    (sample,) = (plan.index.samples["row"] == 4).nonzero()[0]
    costs = plan.costs(np.array([sample]), np.array([0]), 0)
    assert costs.tokens_B.tolist() == [int(tokens)] and costs.predicted_B[0] > 400, "the whole answer is predicted"
