"""M-BEIR as it is run: on one rank and on two, ended and gone on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from programs import EVALUATE, Programs, refusal
from tiny_mbeir import paths, union_path, write_mbeir
from tiny_models import export

CELLS = ["nights_task4", "fashioniq_task7", "oven_task8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data`, a miniature, and `model`."""
    folder = tmp_path_factory.mktemp("mbeir")
    write_mbeir(folder / "data")
    lines = union_path(folder / "data").read_text().splitlines(keepends=True)
    union_path(folder / "data").write_text("".join(lines[:60]))
    export(folder / "model")
    return folder


def command(folder: Path, output: Path, *options: str) -> list[Any]:
    argv = [EVALUATE, "--model", folder / "model", "--suite", "mbeir", "--data", folder / "data", "--output", output]
    return [*argv, "--datasets", *CELLS, "--dims", "24", *options]


def results(output: Path) -> dict[str, Any]:
    return json.loads((output / "results.json").read_text())


def test_ranks_and_interruptions_do_not_matter(folder: Path, programs: Programs, tmp_path: Path) -> None:
    both = ("--pool", "both")
    jobs = [programs.start(command(folder, tmp_path / str(ranks), *both), ranks=ranks) for ranks in (1, 2)]
    for job in jobs:
        done = job.wait().check()
    one, two = (results(tmp_path / str(ranks)) for ranks in (1, 2))
    assert one == two and next(iter(one)) == "overall"
    assert one["oven_task8@union"]["candidates"] == 60 and one["nights_task4@union"]["pool"] == "union"
    assert "fashioniq_task7@union" in done.stdout[0] and "recall@official" in done.stdout[0]
    assert "| fashioniq_task7 | multi->single, image,text -> image |" in (tmp_path / "2" / "results.md").read_text()

    # Ended within a shard and before two of the cells were scored.
    shards = tmp_path / "2" / "embeddings" / "mbeir"
    kept = shards / "mbeir_oven_task6_cand_pool" / "00000.npy"
    before = kept.stat().st_mtime_ns
    shard = shards / "mbeir_oven_task8_cand_pool" / "00000.npy"
    shard.write_bytes(shard.read_bytes()[:-500])
    (shards / "mbeir_fashioniq_task7_queries" / "00000.npy").unlink()
    for name in ("oven_task8", "fashioniq_task7", "oven_task8@union"):
        (tmp_path / "2" / "mbeir_datasets" / f"{name}.json").unlink()
    programs.run(command(folder, tmp_path / "2", *both), ranks=2).check()
    assert results(tmp_path / "2") == one and kept.stat().st_mtime_ns == before


def test_a_problem_is_said_once(folder: Path, programs: Programs, tmp_path: Path) -> None:
    job = programs.start(command(folder, tmp_path / "a", "--rows", "2", "--pool", "union"), ranks=2)
    assert "--rows: a part of the union pool says nothing" in refusal(job.wait())
    pool = paths(folder / "data", CELLS[1])[2]
    text = pool.read_text()
    pool.write_text(text + '{"did": "7:7')
    try:
        result = programs.run(command(folder, tmp_path / "b"), ranks=2)
    finally:
        pool.write_text(text)
    assert "mbeir_fashioniq_task7_cand_pool.jsonl: line 8: is no JSON" in refusal(result)
    assert [name for name in results(tmp_path / "b") if name in CELLS] == [CELLS[0], *CELLS[2:]]  # all others
