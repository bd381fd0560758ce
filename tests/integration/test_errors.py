"""The user's mistakes: one line that names the file, row or key and the cure, in one voice, and every rank ends."""

from __future__ import annotations

import json
import shutil
import struct
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from programs import EVALUATE, TRAIN, Demo, Programs, metrics, refusal

WITHIN_S = 60.0


def parquet(demo: Demo, path: Path, change: Callable[[dict[str, Any]], object], rows: int = 64) -> Path:
    """The training rows, each changed in place by `change`."""
    table = pq.read_table(demo.data / "train.parquet")
    kept = table.to_pylist()[:rows]
    for row in kept:
        change(row)
    pq.write_table(pa.Table.from_pylist(kept, schema=table.schema), path)
    return path


def wrong_columns(demo: Demo, folder: Path) -> dict[str, object]:
    table = pq.read_table(demo.data / "train.parquet").rename_columns(
        ["qry", "qry_sentence", "qry_image_path", "answers", "pos_sentence", "pos_image_path", "neg_text"]
    )
    pq.write_table(table, folder / "wrong.parquet")
    return {"data.train": folder / "wrong.parquet"}


def empty(demo: Demo, folder: Path) -> dict[str, object]:
    return {"data.train": parquet(demo, folder / "empty.parquet", lambda row: None, rows=0)}


def truncated(demo: Demo, folder: Path) -> dict[str, object]:
    (folder / "cut.parquet").write_bytes((demo.data / "train.parquet").read_bytes()[:-100])
    return {"data.train": folder / "cut.parquet"}


def turns_differ(demo: Demo, folder: Path) -> dict[str, object]:
    return {"data.train": parquet(demo, folder / "turns.parquet", lambda row: row["pos_text"].pop())}


def no_good_picture(demo: Demo, folder: Path) -> dict[str, object]:
    shutil.copytree(demo.data / "images", folder / "images")
    for path in (folder / "images").rglob("*.png"):
        path.write_bytes(path.read_bytes()[:10])
    return {"data.images": folder / "images"}


def other_model_type(_demo: Demo, folder: Path) -> dict[str, object]:
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    return {"model.path": folder}


def json_clash(_demo: Demo, folder: Path) -> dict[str, object]:
    (folder / "clash.json").write_text(json.dumps({"train_batch_size": 512}))
    return {"deepspeed": folder / "clash.json"}


def index_dir_is_a_file(_demo: Demo, folder: Path) -> dict[str, object]:
    (folder / "file").touch()
    return {"data.index_dir": folder / "file"}


@dataclass(frozen=True)
class Case:
    """Overrides of a working run, the words its error must hold, and the ranks to run it on (None: no launcher)."""

    overrides: dict[str, object] | Callable[[Demo, Path], dict[str, object]]
    words: tuple[str, ...]
    ranks: int | None = None


CASES = {
    "unknown key": Case({"batch.image": 4}, ("'batch.image'", "the command line", "'batch.images'")),
    "wrong type": Case({"batch.images": "many"}, ("batch.images", "'many'", "expected int")),
    "config clash": Case({"optim.warmup_steps": 9}, ("optim.warmup_steps is 9", "run.max_steps, 4", "lower")),
    "missing data": Case({"data.train": "nowhere.parquet"}, ("data.train", "nowhere.parquet", "set it to")),
    "missing image folder": Case({"data.images": "nowhere"}, ("data.images", "'nowhere'", "set it to")),
    "missing model": Case({"model.path": "/nowhere"}, ("model.path", "'/nowhere'", "set it to")),
    "wrong columns": Case(wrong_columns, ("wrong.parquet", "'pos_text' is missing", "answers", "M3T rows need")),
    "no rows": Case(empty, ("empty.parquet", "no rows", "set data.train")),
    "truncated parquet": Case(truncated, ("cut.parquet", "can't be read as parquet", "written completely"), 2),
    "turn counts": Case(turns_differ, ("turns.parquet", "row 0", "qry has 7 turns but pos_text has 6"), 2),
    "text too long": Case({"batch.pack_tokens": 100}, ("row ", "tokens", "batch.pack_tokens=100", "raise"), 2),
    "no usable picture": Case(no_good_picture, ("train.parquet", "no usable row", "row 0", "00000.png")),
    "unknown model type": Case(other_model_type, ("model.path", "'bert'", "qwen2_vl, qwen2_5_vl, qwen3_vl")),
    "no config.json": Case(lambda _, folder: {"model.path": folder}, ("model.path", "config.json", "give")),
    "fewer examples than ranks": Case({"batch.images": 2}, ("batch.images=2", "3 ranks", "raise it"), 3),
    "fewer rows than a batch": Case({"batch.images": 65}, ("batch.images=65", "64 usable rows", "lower")),
    "DeepSpeed clash": Case(json_clash, ("clash.json", "train_batch_size", "512", 'write "auto"'), 2),
    "no DeepSpeed JSON": Case({"deepspeed": "no.json"}, ("deepspeed", "'no.json'", "ds_configs/zero3.json")),
    "index folder": Case(index_dir_is_a_file, ("file", "length index", "set data.index_dir"), 2),
}


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_one_line_with_its_cure(name: str, demo: Demo, programs: Programs, tmp_path: Path) -> None:
    case = CASES[name]
    overrides = case.overrides if isinstance(case.overrides, dict) else case.overrides(demo, tmp_path)
    argv = demo.train(tmp_path / "runs", overrides)
    line = refusal(programs.run(argv, ranks=case.ranks, timeout=WITHIN_S))
    assert all(word in line for word in case.words), line


def test_a_run_folder_that_cannot_be_written_is_named(demo: Demo, programs: Programs, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    line = refusal(programs.run(demo.train(tmp_path / "file"), ranks=2, timeout=WITHIN_S))
    assert "run.dir" in line and str(tmp_path / "file") in line and "set another" in line


def test_what_one_rank_alone_finds_wrong_ends_all_of_them(demo: Demo, programs: Programs, tmp_path: Path) -> None:
    shutil.copytree(demo.model, tmp_path / "model_0")
    (tmp_path / "model_1").mkdir()
    argv = demo.train(tmp_path / "runs", {"model.path": f"{tmp_path}/model_{{rank}}"})
    line = refusal(programs.run(argv, ranks=2, timeout=WITHIN_S))
    assert "model_1" in line and "config.json" in line


def test_ranks_that_diverge_end_with_the_name_of_the_one_that_differs(
    demo: Demo, programs: Programs, tmp_path: Path
) -> None:
    script = Path(__file__).with_name("diverging_train.py")
    started = time.monotonic()
    line = refusal(programs.run([script, *demo.train(tmp_path)[1:]], ranks=2))
    assert "rank 1 differs at step 3: plan" in line and "same on all machines" in line
    assert time.monotonic() - started < 60, "the ranks waited for each other"


def test_the_launcher_ends_with_one_line_and_the_status(demo: Demo, programs: Programs, tmp_path: Path) -> None:
    argv = [*demo.train(tmp_path), "--optim.lrr", "1"]
    result = programs.launch(["deepspeed", "--num_gpus", "2", *argv], timeout=WITHIN_S)
    assert refusal(result) == "error: unknown key 'optim.lrr' in the command line: did you mean 'optim.lr'?"


def test_a_mistake_on_one_machine_is_not_silent(demo: Demo, programs: Programs, tmp_path: Path) -> None:
    """Rank 1 does not see the pictures, before there is a process group in which to say so."""
    script = tmp_path / "as_rank.py"
    script.write_text(
        "import os, runpy, sys\n"
        'sys.argv = [argument.replace("{rank}", os.environ["RANK"]) for argument in sys.argv]\n'
        f"sys.argv[0] = {TRAIN!r}\n"
        f'runpy.run_path({TRAIN!r}, run_name="__main__")\n'
    )
    (tmp_path / "images_0").symlink_to(demo.data / "images")
    argv = demo.train(tmp_path / "runs", {"data.images": f"{tmp_path}/images_{{rank}}"})[1:]
    line = refusal(programs.launch(["deepspeed", "--num_gpus", "2", script, *argv], timeout=WITHIN_S))
    assert line.startswith("error: rank 1: data.images") and "images_1" in line


@pytest.mark.parametrize(
    ("model", "data", "words"),
    [
        ("{empty}", "{data}/test.parquet", ("holds no config.json", "model folder")),
        ("{empty}/absent", "{data}/test.parquet", ("is no folder", "hf download")),
        ("{model}", "{data}/nowhere.parquet", ("--data", "nowhere.parquet", "give")),
    ],
)
def test_evaluation_names_what_is_missing(
    model: str, data: str, words: tuple[str, ...], demo: Demo, programs: Programs, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    folders = {"empty": tmp_path / "empty", "model": demo.model, "data": demo.data}
    options: list[str | Path]
    options = ["--model", model.format(**folders), "--data", data.format(**folders), "--images", demo.data / "images"]
    line = refusal(programs.run([EVALUATE, "--suite", "m3t", "--output", tmp_path / "out", *options], ranks=2))
    assert all(word in line for word in words), line


def png_header(width: int, height: int) -> bytes:
    """A valid PNG's beginning that claims a size; nothing follows."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))


def test_broken_pictures_among_good_ones_are_listed_and_left_out(
    demo: Demo, programs: Programs, tmp_path: Path
) -> None:
    shutil.copytree(demo.data / "images", tmp_path / "images")
    train = tmp_path / "images" / "train"
    whole = (train / "00000.png").read_bytes()
    (train / "00003.png").write_bytes(whole[:10])
    (train / "00007.png").write_text("not a picture")
    (train / "00011.png").unlink()
    (train / "00020.png").write_bytes(png_header(15_000, 12_000) + whole[33:])
    for i in range(30, 50):  # good headers, cut in the middle: found at run time only
        (train / f"{i:05d}.png").write_bytes((train / f"{i:05d}.png").read_bytes()[:60])
    overrides = {"data.images": tmp_path / "images", "data.index_dir": tmp_path / "index"}
    result = programs.run(demo.train(tmp_path, overrides), ranks=2).check()
    (listing,) = (tmp_path / "index").glob("*/bad_rows.jsonl")
    bad = {entry["row"]: entry["reason"] for entry in map(json.loads, listing.read_text().splitlines())}
    assert list(bad) == [3, 7, 11, 20]
    assert all(f"{row:05d}.png" in reason for row, reason in bad.items())
    assert "no such file" in bad[11] and "far over the limit" in bad[20]
    assert f"4 of 64 rows left out, listed in {listing}" in result.output
    assert sum(line["replaced_images"] for line in metrics(tmp_path)) > 0
