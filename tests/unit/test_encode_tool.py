"""tools/encode.py: rows by line, questions, what is wrong with a line, interruption, pictures that can't be used."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from muco_ds.models import encode_file
from muco_ds.models.embedder import Embedder

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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["emb.npy", "items.jsonl"]
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
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: list[Any] = [{"text": f"{i} {'word ' * (i % 4)}"} for i in range(9)]
    lines.insert(4, {"image": "0.png", "questions": ["a", "b", "c"]})
    assert run(lines) == 0
    want_ND = np.load(tmp_path / "emb.npy")
    for name in ("emb.npy", "emb.npy.rows.npy"):
        (tmp_path / name).unlink()
    monkeypatch.setattr(encode_file, "WINDOW_LINES", 3)
    append, written = encode_file.RowFile.append, []

    def ended(self: encode_file.RowFile, rows_ND: np.ndarray) -> None:
        if len(written) == 2:
            with open(self.path, "ab") as file:  # cut off within a row, and within a line's rows
                file.write(rows_ND[:1].tobytes() + b"half")
            raise KeyboardInterrupt
        written.append(len(rows_ND))
        append(self, rows_ND)

    monkeypatch.setattr(encode_file.RowFile, "append", ended)
    with pytest.raises(KeyboardInterrupt):
        run(lines)
    assert written == [3, 5] and not (tmp_path / "emb.npy").exists()
    monkeypatch.setattr(encode_file.RowFile, "append", append)
    capsys.readouterr()
    assert run(lines) == 0
    assert "7 lines were there" in capsys.readouterr().out
    np.testing.assert_allclose(np.load(tmp_path / "emb.npy"), want_ND, atol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["emb.npy", "emb.npy.rows.npy", "items.jsonl"]


def test_other_lines_start_anew(run: Run, tmp_path: Path, model: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(encode_file.RowFile, "finish", _ended)
        run([{"text": "a"}, {"text": "b"}])
    assert len(list(tmp_path.glob(".emb.npy.*.partial"))) == 1
    assert run([{"text": "c"}, {"text": "b"}]) == 0
    np.testing.assert_allclose(np.load(tmp_path / "emb.npy"), model.encode(["c", "b"]), atol=1e-6)
    assert not list(tmp_path.glob(".emb.npy.*.partial"))


def _ended(_: object) -> None:
    raise KeyboardInterrupt


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


def test_options_are_checked(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        (("--output", "emb.bin"), "end it in .npy"),
        (("--pack_tokens", "0"), "at least 1"),
        (("--model", tmp_path), "convert_ckpt"),
        (("--input", tmp_path / "absent.jsonl"), "can't be read"),
        (("--dim", "97"), "give 1 to 96"),
    ):
        assert run(LINES, *options) == 2, options
        assert message in capsys.readouterr().err
    assert run([]) == 2
    assert "is empty" in capsys.readouterr().err
