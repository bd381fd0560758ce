"""tools/encode.py: rows by line, questions, what is wrong with a line, interruption, pictures that can't be used."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from muco_ds.data.schema import Dialogue
from muco_ds.models import encode_file, item_files, shards
from muco_ds.models.embedder import Embedder
from muco_ds.models.shards import Layout, Shards

from demo import run_here
from tiny_models import export, picture

TOOL = Path(__file__).parents[2] / "tools" / "encode.py"

Run = Callable[..., int]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model and two pictures."""
    folder = tmp_path_factory.mktemp("encode")
    export(folder / "model")
    for i in range(2):
        picture(i).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Embedder:
    return Embedder.from_pretrained(str(folder / "model"), device="cpu")


@pytest.fixture
def run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Lines and options -> status; writes tmp_path/emb.npy."""

    def run(lines: list[Any], *options: Any) -> int:
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (tmp_path / "items.jsonl").write_text("".join(text + "\n" for text in texts))
        files = ("--input", tmp_path / "items.jsonl", "--output", tmp_path / "emb.npy", "--images", folder)
        return run_here(monkeypatch, TOOL, "--model", folder / "model", *files, "--device", "cpu", *options)

    return run


LINES: list[dict[str, Any]] = [
    {"text": "a red star"},
    {"image": "0.png"},
    {"image": ["0.png", "1.png"], "text": "Compare.", "instruction": "Look."},
    {"instruction": "Find it.", "text": "a star"},
]


def absolute(item: dict[str, Any], folder: Path) -> dict[str, Any]:
    if "image" not in item:
        return item
    given = item["image"]
    return {**item, "image": [str(folder / path) for path in (given if isinstance(given, list) else [given])]}


def test_a_row_a_line_equals_encode(
    run: Run, folder: Path, tmp_path: Path, model: Embedder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(LINES) == 0
    got_ND = np.load(tmp_path / "emb.npy")
    assert got_ND.dtype == np.float32
    np.testing.assert_allclose(got_ND, model.encode([absolute(item, folder) for item in LINES]), atol=1e-6)
    assert "4 x 96 written" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["emb.npy", "emb.npy.report.json", "items.jsonl"]
    report = json.loads((tmp_path / "emb.npy.report.json").read_text())
    assert (report["lines"], report["rows"], report["dim"], report["broken"]) == (4, 4, 96, 0)
    assert run(LINES) == 2  # never without being told to
    assert "--overwrite" in capsys.readouterr().err
    assert run(LINES[::-1], "--overwrite", "--dim", "8", "--pack_tokens", "60") == 0
    short_ND = np.load(tmp_path / "emb.npy")
    want_ND = got_ND[::-1, :8] / np.linalg.norm(got_ND[::-1, :8], axis=1, keepdims=True)
    np.testing.assert_allclose(short_ND, want_ND, atol=1e-5)


def test_questions_have_rows_of_their_own(run: Run, folder: Path, tmp_path: Path, model: Embedder) -> None:
    asked = {"image": "1.png", "questions": ["Where?", "How many?"], "instruction": "Look."}
    assert run([LINES[0], asked, LINES[1]]) == 0
    got_ND, rows = np.load(tmp_path / "emb.npy"), np.load(tmp_path / "emb.npy.rows.npy")
    assert rows.tolist() == [0, 1, 3, 4]
    want_kD = model.encode_turns(str(folder / "1.png"), ["Look.\nWhere?", "Look.\nHow many?"])
    np.testing.assert_allclose(got_ND[rows[1] : rows[2]], want_kD, atol=1e-6)
    assert run(LINES, "--overwrite") == 0  # no line has several rows: nobody would look at an old file
    assert not (tmp_path / "emb.npy.rows.npy").exists()


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"text": "a"', "is no JSON"),
        ("", "is no JSON"),
        ('"a"', "holds no object"),
        (r'{"text": "\ud800"}', "is no JSON"),
        ({"text": "a", "img": "x"}, "give a text, a picture"),
        ({"text": " "}, "neither text nor picture"),
        ({"text": 5}, "must be strings"),
        ({"image": 5}, "'image' must be a path"),
        ({"image": "absent.png"}, r"picture .*absent\.png: no such file.*--skip_broken"),
        ({"questions": ["a"]}, "in place of 'text'"),
        ({"questions": ["a"], "image": "0.png", "text": "b"}, "in place of 'text'"),
        ({"questions": [], "image": "0.png"}, "must be a list"),
    ],
)
def test_a_bad_line_is_named_before_the_model_is_loaded(
    line: Any,
    message: str,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Embedder, "from_pretrained", lambda *_, **__: pytest.fail("the model is loaded"))
    assert run([LINES[0], line]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {tmp_path / 'items.jsonl'}: line 2: ")
    assert re.search(message, error)
    assert [path.name for path in tmp_path.iterdir()] == ["items.jsonl"]


def test_an_ended_run_goes_on(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lines: list[Any] = [{"text": f"{i} {'word ' * (i % 4)}"} for i in range(9)]
    lines.insert(4, {"image": "0.png", "questions": ["a", "b", "c"]})
    assert run(lines) == 0
    want_ND = np.load(tmp_path / "emb.npy")
    for name in ("emb.npy", "emb.npy.rows.npy", "emb.npy.report.json"):
        (tmp_path / name).unlink()
    monkeypatch.setattr(encode_file, "Layout", partial(Layout, shard_lines=3))
    write, written = shards._write, []

    def ended(made: Shards, shard: int, *rest: Any) -> None:
        if shard == 2:
            raise KeyboardInterrupt
        written.append(shard)
        write(made, shard, *rest)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(shards, "_write", ended)
        run(lines)
    assert written == [0, 1] and not (tmp_path / "emb.npy").exists()
    assert run(lines) == 0
    assert "2 of 4 shards are there" in caplog.text
    np.testing.assert_allclose(np.load(tmp_path / "emb.npy"), want_ND, atol=1e-6)
    assert np.load(tmp_path / "emb.npy.rows.npy").tolist() == [0, 1, 2, 3, 4, 7, 8, 9, 10, 11, 12]
    assert not list(tmp_path.glob(".*"))


def test_other_lines_start_anew(run: Run, tmp_path: Path, model: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(encode_file.Output, "put", _ended)
        run([{"text": "a"}, {"text": "b"}])
    assert len(list(tmp_path.glob(".emb.npy.partial/*.npy"))) == 1
    assert run([{"text": "c"}, {"text": "b"}]) == 0
    np.testing.assert_allclose(np.load(tmp_path / "emb.npy"), model.encode(["c", "b"]), atol=1e-6)
    assert not list(tmp_path.glob(".*"))


def _ended(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_folder_of_shards(run: Run, folder: Path, tmp_path: Path, model: Embedder) -> None:
    asked = {"image": "1.png", "questions": ["Where?", "How many?"]}
    lines = [LINES[0], asked, LINES[1]]
    assert run(lines, "--output", tmp_path / "shards") == 0
    made = Shards.open(tmp_path / "shards")
    want_ND = np.concatenate(
        [
            model.encode([LINES[0]]),
            model.encode_turns(str(folder / "1.png"), asked["questions"]),  # type: ignore[arg-type]
            model.encode([absolute(LINES[1], folder)]),
        ]
    )
    np.testing.assert_allclose(made.read(0, 4), want_ND, atol=1e-6)
    assert made.line_starts(0).tolist() == [0, 1, 3, 4]
    assert run(lines, "--output", tmp_path / "shards") == 2
    assert run(lines, "--output", tmp_path / "shards", "--format", "parquet", "--overwrite") == 0
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == ["00000.parquet", "report.json"]
    table = pq.read_table(tmp_path / "shards" / "00000.parquet")
    assert table["line"].to_pylist() == [0, 1, 1, 2] and table["question"].to_pylist() == [0, 0, 1, 0]
    np.testing.assert_allclose(np.array(table["embedding"].to_pylist()), want_ND, atol=1e-6)


def test_parquet_with_stored_pictures_and_several_files(
    run: Run, folder: Path, tmp_path: Path, model: Embedder, capsys: pytest.CaptureFixture[str]
) -> None:
    data = (folder / "0.png").read_bytes()
    stored = {"bytes": data, "path": "0.png"}
    rows = [
        {"text": "a red star", "image": None, "id": 7},
        {"text": None, "image": [stored], "id": 8},
        {"text": "Compare.", "image": [stored, {"bytes": None, "path": "1.png"}], "id": 9},
    ]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text('{"text": "first"}\n')
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / "b.parquet")
    assert run([], "--input", tmp_path / "data") == 0
    both = [str(folder / "0.png"), str(folder / "1.png")]
    items = ["first", "a red star", {"image": both[0]}, {"text": "Compare.", "image": both}]
    np.testing.assert_allclose(np.load(tmp_path / "emb.npy"), model.encode(items), atol=1e-6)  # type: ignore[arg-type]
    rows[1]["image"] = [{"bytes": data[: len(data) // 2], "path": "cut.png"}]
    rows.append({"text": None, "image": [{"bytes": b"none", "path": None}], "id": 1})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / "b.parquet")
    assert run([], "--input", tmp_path / "data", "--overwrite") == 2
    assert re.search(r"b\.parquet: row 3: picture .*row 3: image: is not a picture", capsys.readouterr().err)
    assert run([], "--input", tmp_path / "data", "--overwrite", "--skip_broken") == 0
    broken = [json.loads(line) for line in (tmp_path / "emb.npy.broken.jsonl").read_text().splitlines()]
    assert [(entry["file"], entry["row"]) for entry in broken] == [("b.parquet", 1), ("b.parquet", 3)]
    assert broken[0]["picture"].endswith("row 1: cut.png")
    reasons = json.loads((tmp_path / "emb.npy.report.json").read_text())["reasons"]
    assert reasons == {"does not decode": 1, "is not a picture that can be read": 1}
    pq.write_table(pa.table({"caption": ["a"]}), tmp_path / "data" / "b.parquet")
    assert run([], "--input", tmp_path / "data", "--overwrite") == 2
    assert "none of the columns text, image, instruction, questions (found: caption)" in capsys.readouterr().err


def test_equal_lines_beside_other_pictures_are_other_items(
    run: Run, folder: Path, tmp_path: Path, model: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, number in (("a", 0), ("b", 1)):
        (tmp_path / name).mkdir()
        picture(number).save(tmp_path / name / "p.png")
        (tmp_path / name / "items.jsonl").write_text('{"image": "p.png"}\n')
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(encode_file.Output, "put", _ended)
        run([], "--input", tmp_path / "a" / "items.jsonl", "--images", tmp_path / "a")
    assert run([], "--input", tmp_path / "b" / "items.jsonl", "--images", tmp_path / "b") == 0
    np.testing.assert_allclose(np.load(tmp_path / "emb.npy"), model.encode([{"image": picture(1)}]), atol=1e-6)


def test_an_output_is_no_input_of_the_next_run(run: Run, tmp_path: Path) -> None:
    for output in (("emb.npy",), ("out", "--format", "parquet")):
        data = tmp_path / f"beside_{output[0]}"
        data.mkdir()
        (data / "a.jsonl").write_text('{"text": "first"}\n{"image": "absent.png"}\n')
        for again in ((), ("--overwrite",)):
            assert run([], "--input", data, "--output", data / output[0], *output[1:], "--skip_broken", *again) == 0
    assert len(pq.read_table(data / "out" / "00000.parquet")) == 2
    # A file by the name of the folder is nothing of its.
    assert run([], "--input", data / "a.jsonl", "--output", data / "a", "--skip_broken") == 0


def test_folders_of_others_are_left_alone(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own").mkdir()
    for name in ("report.json", "thesis.txt"):
        (tmp_path / "own" / name).write_text("{}")
    assert run(LINES[:1], "--output", tmp_path / "own", "--overwrite") == 2
    assert "holds other files ('thesis.txt')" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert run(LINES[:1], "--output", ".") == 2
    assert "name a folder in it" in capsys.readouterr().err


def test_lines_are_found_in_the_middle_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(item_files, "_STRIDE", 4)
    for name, first in (("a.jsonl", 0), ("b.jsonl", 10)):
        (tmp_path / name).write_text("".join(f'{{"text": "é{first + i}"}}\n' for i in range(10)))
    items = item_files.ItemFiles(str(tmp_path), None)
    items.check(headers=False, progress=False)
    again = pickle.loads(pickle.dumps(items))  # as other ranks get it
    for start in range(21):
        for stop in range(start, 23):
            want = [Dialogue((f"é{i}",)) for i in range(start, min(stop, 20))]
            assert items.dialogues(start, stop) == again.dialogues(start, stop) == want
    assert items.name(12) == f"{tmp_path / 'b.jsonl'}: line 3"


def test_pictures_that_can_not_be_used(
    run: Run, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (folder / "0.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])  # its header is intact
    lines: list[dict[str, Any]] = [
        LINES[0],
        {"image": str(tmp_path / "cut.png"), "questions": ["a", "b"]},
        {"image": "absent.png"},
        LINES[1],
    ]
    assert run([line for line in lines if line.get("image") != "absent.png"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"items\.jsonl: line 2: picture .*cut\.png: does not decode.*--skip_broken", error)
    assert not (tmp_path / "emb.npy").exists()
    assert run(lines, "--skip_broken") == 0
    assert "2 lines could not be used" in capsys.readouterr().out
    got_ND = np.load(tmp_path / "emb.npy")
    np.testing.assert_allclose(np.linalg.norm(got_ND, axis=1), [1, 0, 0, 0, 1], atol=1e-5)
    entries = [json.loads(line) for line in (tmp_path / "emb.npy.broken.jsonl").read_text().splitlines()]
    assert [entry["line"] for entry in entries] == [2, 3]
    assert "does not decode" in entries[0]["reason"] and "no such file" in entries[1]["reason"]
    report = json.loads((tmp_path / "emb.npy.report.json").read_text())
    assert report["broken"] == 2 and report["reasons"] == {"does not decode": 1, "no such file": 1}


def test_options_are_checked(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        (("--output", "emb.bin"), "end it in .npy"),
        (("--output", tmp_path), "holds other files"),
        (("--format", "parquet"), "is for a folder"),
        (("--pack_tokens", "0"), "at least 1"),
        (("--model", tmp_path), "no config.json"),
        (("--input", tmp_path / "absent.jsonl"), "no jsonl or parquet file"),
        (("--dim", "97"), "give 1 to 96"),
    ):
        assert run(LINES, *options) == 2, options
        assert message in capsys.readouterr().err
    assert run([]) == 2
    assert "is empty" in capsys.readouterr().err
