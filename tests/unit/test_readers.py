"""The M3T reader: what it accepts, and how it says what it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from muco_ds.data.conversations import ConversationReader
from muco_ds.data.readers import M3T_SCHEMA, M3TReader, RowError
from muco_ds.data.schema import RecordTurn
from muco_ds.errors import UserError

from demo import row, write_picture, write_rows


def reader_of(root: Path, *rows: dict[str, Any], schema: pa.Schema | None = M3T_SCHEMA) -> M3TReader:
    (root / "images").mkdir(exist_ok=True)
    return M3TReader(str(write_rows(root / "rows.parquet", rows, schema)), str(root / "images"))


def test_ragged_rows_and_paraphrases(tmp_path: Path) -> None:
    reader = reader_of(
        tmp_path,
        row([["<|image_1|>\nWhat?", "<|image_1|>\nWhich?"], ["<|image_1|>\nWhere?"]], [" a ", "b"], "x/1.png"),
        row([["plain"]], ["c"]),
    )
    first, second = reader.record(0), reader.record(1)
    assert first.turns == (RecordTurn(("What?", "Which?"), "a", 0), RecordTurn(("Where?",), "b", 1))
    assert first.query_images == (str(tmp_path.resolve() / "images/x/1.png"),) and first.target_images == ()
    assert second.turns == (RecordTurn(("plain",), "c", 0),) and second.query_images == ()
    assert (first.row, second.row, len(reader)) == (0, 1, 2)


def test_plain_strings_in_place_of_lists(tmp_path: Path) -> None:
    per_turn = reader_of(tmp_path, {"qry": ["one?", "two?"], "pos_text": ["1", "2"], "qry_image_path": ""}, schema=None)
    assert [turn.questions for turn in per_turn.record(0).turns] == [("one?",), ("two?",)]
    single = reader_of(tmp_path, {"qry": "one?", "pos_text": "1", "qry_image_path": ""}, schema=None)
    assert single.record(0).turns == (RecordTurn(("one?",), "1", 0),)


def test_a_string_is_never_taken_for_its_letters(tmp_path: Path) -> None:
    reader = reader_of(tmp_path, {"qry": ["one?", "two?"], "pos_text": "12", "qry_image_path": ""}, schema=None)
    with pytest.raises(RowError, match="qry has 2 turns but pos_text has 1"):
        reader.record(0)


@pytest.mark.parametrize(
    "text, cleaned",
    [
        ("<|image_1|>\nWhat?", "What?"),
        ("What <|image_1|>\nis it?", "What is it?"),
        ("What is <|image_12|>it?", "What is it?"),
        ("What?<|image_1|>", "What?"),
        ("<|image_1|>\n<|image_2|>\nWhat?", "What?"),
    ],
)
def test_the_image_marker_is_removed_anywhere(tmp_path: Path, text: str, cleaned: str) -> None:
    reader = reader_of(tmp_path, row([[text]], [text], "a.png"))
    assert reader.record(0).turns[0] == RecordTurn((cleaned,), cleaned, 0)


def test_holes_among_paraphrases_are_left_out(tmp_path: Path) -> None:
    reader = reader_of(tmp_path, row([["", "What?", "<|image_1|>\n"]], ["a"], "a.png"))
    assert reader.record(0).turns[0].questions == ("What?",)


def test_a_picture_can_be_the_question_or_the_target(tmp_path: Path) -> None:
    record = reader_of(tmp_path, row([["<|image_1|>\n"]], [""], "q.png", "sub/t.png")).record(0)
    assert record.turns[0] == RecordTurn(("",), "", 0)
    assert [Path(path).name for path in (*record.query_images, *record.target_images)] == ["q.png", "t.png"]


def test_target_pictures_are_optional(tmp_path: Path) -> None:
    base = {"qry": [["q"]], "pos_text": ["t"], "qry_image_path": ""}
    for extra in ({}, {"pos_image_path": ""}, {"pos_image_path": None}):
        assert reader_of(tmp_path, {**base, **extra}, schema=None).record(0).target_images == ()


def test_links_of_the_picture_folder_may_lead_out_of_it(tmp_path: Path) -> None:
    picture = write_picture(tmp_path / "elsewhere" / "blob.png", 30, 30)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "link.png").symlink_to(picture)
    record = reader_of(tmp_path, row([["q"]], ["t"], "link.png")).record(0)
    assert Path(record.query_images[0]).read_bytes() == picture.read_bytes()


@pytest.mark.parametrize(
    "bad, reason",
    [
        (row([["q"], ["q"]], ["t"]), "qry has 2 turns but pos_text has 1"),
        (row([], []), "no turns"),
        ({**row([["q"]], ["t"]), "qry": None}, "no turns"),
        (row([["q"]] * 1025, ["t"] * 1025), "1025 turns; at most 1024"),
        (row([["q"], [""]], ["t", "t"]), "turn 1 has neither a question nor a picture"),
        (row([["q"], []], ["t", "t"]), "turn 1 has neither a question nor a picture"),
        (row([["q"], ["q"]], ["t", " \n"]), "turn 1 has an empty target"),
        (row([["q"]], ["<|image_1|>\n"]), "turn 0 has an empty target"),
        (row([["q"]], ["t"], "../x.png"), "leaves data.images"),
        (row([["q"]], ["t"], "a/../../x.png"), "leaves data.images"),
        (row([["q"]], ["t"], "/etc/hosts"), "leaves data.images"),
        (row([["q"]], ["t"], "", "../images2/x.png"), "leaves data.images"),
        (row([["q"]], ["t"], "a\0b.png"), "leaves data.images"),
    ],
)
def test_bad_rows_say_why(tmp_path: Path, bad: dict[str, Any], reason: str) -> None:
    reader = reader_of(tmp_path, bad, row([["fine"]], ["t"], "a/../b.png"))
    with pytest.raises(RowError, match=reason):
        reader.record(0)
    assert reader.record(1).turns[0].questions == ("fine",)


def test_files_folders_and_globs(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name, texts in (("a/1.parquet", "xy"), ("a/deep/2.parquet", "z"), ("b c.parquet", "w")):
        write_rows(tmp_path / "data" / name, [row([[text]], [text]) for text in texts], M3T_SCHEMA)
    (tmp_path / "data/a/notes.txt").write_text("not data")

    def targets(pattern: str) -> str:
        reader = M3TReader(str(tmp_path / pattern), str(tmp_path / "images"))
        return "".join(reader.record(i).turns[0].target for i in range(len(reader)))

    assert targets("data/b c.parquet") == "w"
    assert targets("data/a") == "xyz"
    assert targets("data/*.parquet") == "w"
    assert targets("data/**/*.parquet") == "xyzw"


def test_an_empty_file_beside_a_full_one_is_no_mistake(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    write_rows(tmp_path / "data/1.parquet", [], M3T_SCHEMA)
    write_rows(tmp_path / "data/2.parquet", [row([["q"]], ["t"])], M3T_SCHEMA)
    assert len(M3TReader(str(tmp_path / "data"), str(tmp_path / "images"))) == 1


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_mistakes_name_the_file_and_the_cure(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    write_rows(tmp_path / "good.parquet", [row([["q"]], ["t"])], M3T_SCHEMA)
    write_rows(tmp_path / "wrong.parquet", [{"question": "q", "answer": "a"}])
    write_rows(tmp_path / "numbers.parquet", [{"qry": 1, "pos_text": ["t"], "qry_image_path": ""}])
    write_rows(tmp_path / "empty.parquet", [], M3T_SCHEMA)
    write_text(tmp_path / "text.parquet", "not parquet")
    write_rows(tmp_path / "many/1.parquet", [row([["q"]], ["t"])], M3T_SCHEMA)
    write_text(tmp_path / "many/2.parquet", "PAR1 cut short")
    (tmp_path / "hollow").mkdir()
    cases = {
        "wrong.parquet": r"wrong\.parquet: column 'qry' is missing \(found: question, answer\)",
        "numbers.parquet": r"numbers\.parquet: column 'qry' holds int64",
        "empty.parquet": r"empty\.parquet: holds no rows: set data\.train",
        "text.parquet": r"text\.parquet: can't be read as parquet",
        "many": r"2\.parquet: can't be read as parquet",
        "absent.parquet": r"data\.train: no parquet file at '.*absent\.parquet': give",
        "hollow": r"data\.train: no parquet file at '.*hollow': give",
    }
    for name, message in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            M3TReader(str(tmp_path / name), str(images))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"data\.images: no such folder '.*nowhere': set it"):
        M3TReader(str(tmp_path / "good.parquet"), str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"data\.val: no parquet file"):
        M3TReader(str(tmp_path / "absent.parquet"), str(images), "data.val")


def test_a_picture_that_a_file_declares_is_not_opened(tmp_path: Path) -> None:
    """The hub's metadata can make any column a picture, which `datasets` opens, from any path or address."""
    text, kept = {"dtype": "string", "_type": "Value"}, {"bytes": None, "path": str(tmp_path / "not_here.png")}
    turns = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "that"}]
    said = {"feature": {"role": text, "content": text}, "_type": "List"}
    m3t = {"qry": (["what?"], text), "pos_text": (["that"], text), "qry_image_path": ("", text)}
    m3t |= {name: (value, {"feature": text, "_type": "List"}) for name, (value, _) in m3t.items() if value}
    talk = {"messages": (turns, said), "compression": ('{"query": "text"}', text)}
    for columns, reader in ((m3t, M3TReader), (talk, ConversationReader)):
        columns = {**columns, "extra": (kept, {"_type": "Image"})}
        schema = pa.Table.from_pylist([{name: value for name, (value, _) in columns.items()}]).schema
        place = schema.get_field_index("extra")
        schema = schema.set(place, pa.field("extra", pa.struct({"bytes": pa.binary(), "path": pa.string()})))
        features = {"info": {"features": {name: declared for name, (_, declared) in columns.items()}}}
        schema = schema.with_metadata({"huggingface": json.dumps(features)})
        path = write_rows(tmp_path / "rows.parquet", [{name: value for name, (value, _) in columns.items()}], schema)
        assert reader(str(path), str(tmp_path)).record(0).turns[0].questions == ("what?",)
