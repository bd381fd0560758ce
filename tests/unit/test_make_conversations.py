"""tools/make_conversations.py: M3T-style rows become conversations that the reader takes, of the same words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from muco_ds.data.conversations import ConversationReader
from muco_ds.data.readers import M3TReader

from demo import Demo, row, run_here, write_rows

TOOL = Path(__file__).parents[2] / "tools" / "make_conversations.py"


def test_turns_become_questions_and_answers_in_order(
    demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "rows.jsonl"
    assert run_here(monkeypatch, TOOL, "--data", demo.train, "--images", demo.images, "--output", output) == 0
    before, after = M3TReader(str(demo.train), str(demo.images)), ConversationReader(str(output), str(demo.images))
    assert len(before) == len(after)
    asked = set()
    for i in range(len(before)):
        record, converted = before.record(i), after.record(i)
        assert converted.query_images == record.query_images
        assert [turn.target for turn in converted.turns] == [turn.target for turn in record.turns]
        for old, new in zip(record.turns, converted.turns, strict=True):
            assert new.questions[0] in old.questions
            asked.add(old.questions.index(new.questions[0]))
    assert asked == {0, 1, 2}, "paraphrases are drawn"
    assert json.loads(output.read_text().splitlines()[3])["image"] == "train/00003.png", "paths start from --images"
    assert f"rows      {len(after)}, left out 0\nturns     {7 * len(after)}, left out 0" in capsys.readouterr().out
    assert run_here(monkeypatch, TOOL, "--data", demo.train, "--output", tmp_path / "again.jsonl") == 0
    assert (tmp_path / "again.jsonl").read_bytes() == output.read_bytes(), "the same in every run"


def test_what_has_no_words_is_counted_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = row([["<|image_1|>\na <image>?"], ["<|image_1|>\n"], ["ü?"]], ["1", "2", "3"], "x/../é.png")
    rows = [good, row([["q"]], ["t"]), row([["q"]], ["t", "u"], "a.png"), row([["q"]], [""], "a.png", "b.png")]
    data, output = write_rows(tmp_path / "rows.parquet", [*rows, *rows[1:]]), tmp_path / "o.jsonl"
    assert run_here(monkeypatch, TOOL, "--data", data, "--images", tmp_path, "--output", output) == 0
    out = capsys.readouterr().out
    reasons = ("no picture to ask about", "qry has 1 turns but pos_text has 2", "its targets are pictures")
    assert all(f"row {i}: {reason}" in out for i, reason in enumerate(reasons, start=1))
    assert "... 1 more" in out and "rows      7, left out 6\nturns     2, left out 1\n" in out
    (line,) = output.read_text(encoding="utf-8").splitlines()
    assert json.loads(line) == {
        "id": 0,
        "image": "é.png",
        "conversations": [
            {"from": "human", "value": "<image>\na ?"},
            {"from": "gpt", "value": "1"},
            {"from": "human", "value": "ü?"},
            {"from": "gpt", "value": "3"},
        ],
    }
    assert "é.png" in line, "letters stay letters"


def test_nothing_is_half_written_or_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "o.jsonl"
    output.write_text("mine")
    good = write_rows(tmp_path / "rows.parquet", [row([["q"]], ["t"], "a.png")])
    arguments = ("--data", good, "--images", tmp_path)
    assert run_here(monkeypatch, TOOL, *arguments, "--output", output) == 2
    assert "give --overwrite" in capsys.readouterr().err
    bad = write_rows(tmp_path / "bad.parquet", [row([["q"]], ["t"])])
    assert run_here(monkeypatch, TOOL, "--data", bad, "--images", tmp_path, "--output", output, "--overwrite") == 2
    assert "bad.parquet: no usable row; row 0: no picture to ask about" in capsys.readouterr().err
    assert output.read_text() == "mine" and not list(tmp_path.glob(".o.jsonl*"))
    assert run_here(monkeypatch, TOOL, *arguments, "--output", tmp_path / "o.parquet") == 2
    assert "end it in .jsonl" in capsys.readouterr().err
    assert run_here(monkeypatch, TOOL, *arguments, "--output", output, "--overwrite") == 0
    assert json.loads(output.read_text())["image"] == "a.png"
