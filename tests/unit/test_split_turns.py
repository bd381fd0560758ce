"""tools/split_turns.py: several turns become single pairs that fine-tuning reads."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from muco_ds.data.readers import M3TReader, PairReader

from demo import Demo, row, run_here, write_rows

TOOL = Path(__file__).parents[2] / "tools" / "split_turns.py"


def test_every_turn_becomes_a_pair_of_the_row_s_picture(
    demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "pairs.parquet"
    assert run_here(monkeypatch, TOOL, "--data", demo.train, "--images", demo.images, "--output", output) == 0
    before, after = M3TReader(str(demo.train), str(demo.images)), PairReader(str(output), str(demo.images))
    records = [before.record(i) for i in range(len(before))]
    pairs = [after.record(i) for i in range(len(after))]
    assert [turn.target for record in records for turn in record.turns] == [pair.turns[0].target for pair in pairs]
    asked = set()
    for (record, turn), pair in zip([(r, t) for r in records for t in r.turns], pairs, strict=True):
        assert pair.turns[0].questions[0] in turn.questions and pair.query_images == record.query_images
        assert pair.captions is not None and pair.captions[0] and not pair.lacks_caption
        asked.add(turn.questions.index(pair.turns[0].questions[0]))
    assert len(asked) > 1, "paraphrases take turns"
    assert f"pairs     {len(pairs)}" in capsys.readouterr().out


def test_bad_rows_are_named_and_left_out_and_nothing_is_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad, two = ({**row([["a?"]], answers), "qry_image_path": [""]} for answers in (["b"], ["b", "c"], ["b"]))
    two["qry_image_path"] = ["x.png", "y.png"]
    data, output = write_rows(tmp_path / "rows.parquet", [good, bad, two]), tmp_path / "p.parquet"
    assert run_here(monkeypatch, TOOL, "--data", data, "--images", tmp_path, "--output", output) == 0
    out = capsys.readouterr().out
    assert "row 1: qry has 1 turns but pos_text has 2" in out and "row 2: qry_image_path holds 2 pictures" in out
    assert pq.read_table(output).num_rows == 1
    assert run_here(monkeypatch, TOOL, "--data", data, "--images", tmp_path, "--output", output) == 2
    assert "give --overwrite" in capsys.readouterr().err
    only_bad = write_rows(tmp_path / "bad.parquet", [bad])
    arguments = ("--data", only_bad, "--images", tmp_path, "--output", output, "--overwrite")
    assert run_here(monkeypatch, TOOL, *arguments) == 2
    assert "no usable row; row 0: qry has 1 turns" in capsys.readouterr().err
    assert pq.read_table(output).num_rows == 1, "the earlier file is as it was"
    assert not list(tmp_path.glob(".p.parquet*"))
