"""Real pictures with captions in several languages through the evaluation's programs."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from muco_ds.eval.suite import scores_of
from muco_ds.models.shards import Shards

from programs import EVALUATE, REPOSITORY, Demo, Programs

STAMPS = REPOSITORY.parent / "shared" / "data" / "stamps"
ROWS = 12


def test_every_suite_and_the_encoder(demo: Demo, programs: Programs, tmp_path: Path) -> None:
    if not STAMPS.is_dir():
        pytest.skip("the stamps data set is not beside the repository")
    held_out, rows = STAMPS / "test.parquet", ["--rows", str(ROWS)]
    tools = REPOSITORY / "tools"
    made = [tools / "make_miniatures.py", "--data", held_out, "--images", STAMPS, "--output", tmp_path / "mini"]
    programs.run([*made, *rows]).check()
    cells = ["mscoco_task0", "mscoco_task3", "oven_task6"]
    suites: dict[str, list[str | Path]] = {
        "m3t": ["--data", held_out, "--images", STAMPS, *rows],
        "mmeb": ["--data", tmp_path / "mini" / "mmeb"],
        "mbeir": ["--data", tmp_path / "mini" / "mbeir", "--datasets", *cells],
    }
    for name, options in suites.items():
        command = [EVALUATE, "--model", demo.model, "--suite", name, *options, "--output", tmp_path / name]
        done = programs.run(command).check()
        assert "never trained to embed" in done.output
        results = json.loads((tmp_path / name / "results.json").read_text())
        assert all(0 <= score <= 1 for entry in results.values() for score in scores_of(entry).values())
        assert results["overall"].get("left_out", 0) == 0 and results["overall"]["queries"] >= ROWS
    assert (tmp_path / "mmeb" / "results.md").is_file()

    table = pq.read_table(held_out, columns=["qry_image_path"]).to_pylist()[:ROWS]
    lines = [{"image": row["qry_image_path"]} for row in table] + [{"text": "Uma letra."}]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = ["--input", tmp_path / "items.jsonl", "--images", STAMPS, "--output", tmp_path / "embeddings"]
    programs.run([tools / "encode.py", "--model", demo.model, *files]).check()
    assert len(Shards.open(tmp_path / "embeddings")) == ROWS + 1
