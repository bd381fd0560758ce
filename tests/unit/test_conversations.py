"""The reader of conversations: every spelling, every row it leaves out and why, long files without memory."""

from __future__ import annotations

import json
import pickle
import tracemalloc
from collections.abc import Callable, Iterable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from muco_ds.config import _check_rows
from muco_ds.data.conversations import ConversationReader, conversation
from muco_ds.data.index import Index, Indexer, open_index
from muco_ds.data.joined import JoinedReader, join_indices
from muco_ds.data.readers import RowError
from muco_ds.data.schema import RecordTurn
from muco_ds.errors import UserError

from demo import Demo, write_picture, write_rows


def said(*texts: str, first: str = "<image>\n") -> list[dict[str, str]]:
    """CoMa's spelling of a conversation."""
    roles = ("human", "gpt")
    return [{"from": roles[i % 2], "value": (first if i == 0 else "") + text} for i, text in enumerate(texts)]


def chat(*contents: Any) -> list[dict[str, Any]]:
    """The ordinary spelling of a conversation."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


GOOD = {"id": 1, "image": "a.png", "conversations": said("How many?", "Two.", "Weather?", " Sunny.\n")}
TURNS = (RecordTurn(("How many?",), "Two.", 0), RecordTurn(("Weather?",), "Sunny.", 1))


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def reader_of(root: Path, *rows: Any) -> ConversationReader:
    (root / "images").mkdir(exist_ok=True)
    return ConversationReader(str(write_lines(root / "rows.jsonl", rows)), str(root / "images"))


def picture(root: Path, name: str) -> str:
    return str(root.resolve() / "images" / name)


REST = ("Two.", "Weather?", "Sunny.")
TEXT = {"type": "text", "text": "How many?"}
SPELLINGS = {
    "coma": GOOD,
    "coma, more fields": {**GOOD, "id": {"any": 1}, "compression": None, "source": "x"},
    "producer": {"message": chat("How many?", *REST), "image": "a.png"},
    "columns of several": {"conversations": None, "message": chat("How many?", *REST), "image": "a.png"},
    "chat": {"messages": chat("<image>How many?", *REST), "images": ["a.png"]},
    "parts": {"messages": chat([{"type": "image"}, TEXT], *REST), "image": ["a.png"]},
    "parts that name pictures": {
        "messages": chat([{"type": "image", "image": "a.png"}, TEXT], *REST),
        "image": None,
    },
    "roles under conversations": {
        "conversations": chat("How many? <image>", *REST),
        "image": "a.png",
        "images": None,
    },
}


@pytest.mark.parametrize("name", [*SPELLINGS, "parts alone"])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_every_spelling_is_the_same_record(tmp_path: Path, name: str, suffix: str) -> None:
    text_parts = [[{"type": "text", "text": text}] for text in ("How many?", *REST)]
    parts = {"messages": chat([{"type": "image"}, *text_parts[0]], *text_parts[1:]), "image": "a.png"}
    row = {**SPELLINGS, "parts alone": parts}[name]
    (tmp_path / "images").mkdir()
    if suffix == "parquet" and name in ("parts", "parts that name pictures"):
        return  # a column can't hold both texts and lists
    path = (write_lines if suffix == "jsonl" else write_rows)(tmp_path / f"rows.{suffix}", [row])
    reader = ConversationReader(str(path), str(tmp_path / "images"))
    record = reader.record(0)
    assert len(reader) == 1 and record.turns == TURNS
    assert record.query_images == (picture(tmp_path, "a.png"),) and record.target_images == ()
    assert (record.context, record.captions, record.negatives, record.row) == ("", None, (), 0)


def test_pictures_by_path_list_or_none_and_markers_anywhere(tmp_path: Path) -> None:
    turns = said("Compare\n<image>\nwith <image>this", "b<image>", first="")
    query = {"compression": json.dumps({"image": None, "query": " what it says\n"})}
    reader = reader_of(
        tmp_path,
        {"conversations": turns, "image": ["a.png", "b/c.png", None, ""], "images": ["a.png", "a.png", "a.png"]},
        {"conversations": turns, "images": ["a.png", "a.png", "b/c.png"]},
        {"conversations": said("q", "a", first=""), "image": None, **query},
        {"conversations": said("q", "a"), "image": "x/../a.png", "compression": {"query": "<image>\ncontext"}},
    )
    with pytest.raises(RowError, match="3 <image> markers but 2 pictures"):
        reader.record(0)
    record = reader.record(1)
    assert record.turns == (RecordTurn(("Compare\nwith this",), "b", 0),)
    assert record.query_images == tuple(picture(tmp_path, name) for name in ("a.png", "a.png", "b/c.png"))
    alone = reader.record(2)
    assert alone.query_images == () and alone.context == "what it says"
    with pytest.raises(RowError, match="2 <image> markers but 1 pictures"):
        reader.record(3)


def test_a_picture_named_by_the_compression_alone_is_read(tmp_path: Path) -> None:
    row = {"conversations": said("q", "a"), "compression": '{"image": "a.png", "query": ""}'}
    record = reader_of(tmp_path, row).record(0)
    assert record.query_images == (picture(tmp_path, "a.png"),) and record.context == ""


def good_with(**fields: Any) -> dict[str, Any]:
    return {**GOOD, **fields}


BAD = [
    ("no json", "no JSON .*: no json"),
    ('{"image": "a.png", "conversations": [', "no JSON"),
    ('["a"]', r"no JSON object: \[\"a\"\]"),
    ("7", "no JSON object: 7"),
    ("[" * 100_000, "no JSON"),
    (good_with(conversations=None), r"no list of turns under any of conversations, .* \(found: id, image, conv"),
    (good_with(conversations=[]), "no list of turns"),
    (good_with(conversations="hello"), "no list of turns"),
    (good_with(conversations=["hello", "you"]), "entry 0 is 'hello'"),
    (good_with(conversations=chat("q")), "entry 0, a question, has no answer"),
    (good_with(conversations=said("q", "a", "r")), "entry 2, a question, has no answer"),
    (good_with(conversations=said("q", "a")[::-1]), r"entry 0 is from 'gpt' where a question \(human or user\) is due"),
    (good_with(conversations=said("q", "a")[:1] * 2), "entry 1 is from 'human' where an answer"),
    (good_with(conversations=[*said("q", "a"), *said("q", "a")[1:]]), "entry 2 is from 'gpt' where a question"),
    (good_with(conversations=[{"from": ["human"], "value": "q"}]), r"entry 0 is from \['human'\]"),
    (good_with(conversations=[{"value": "q"}, {"value": "a"}]), "entry 0 is from None"),
    (good_with(conversations=[{"role": "system", "content": "s"}, *said("q", "a")]), "entry 0 is a system.*: remove"),
    (good_with(conversations=said("q", "a", " \n", "b")), "turn 1 has an empty question"),
    (good_with(conversations=said("", "a")), "turn 0 has an empty question"),
    (good_with(conversations=said("q", "a", "r", "<image>\n"), image=["a.png"] * 2), "turn 1 has an empty answer"),
    (good_with(conversations=chat("q", None)), "turn 0 has an empty answer"),
    (good_with(conversations=chat("q", 5)), "entry 1 holds .*5.*: texts and image parts are read"),
    (good_with(conversations=chat([{"type": "video"}], "a")), "entry 0 holds .*video"),
    (good_with(conversations=chat(["q"], "a")), "entry 0 holds 'q'"),
    (good_with(conversations=said(*["x"] * 2050)), "1025 turns; at most 1024"),
    (good_with(conversations=said("<image>q", "a")), "2 <image> markers but 1 pictures"),
    (good_with(conversations=chat([{"type": "image"}] * 2, "a")), "2 <image> markers but 1 pictures"),
    (good_with(image=None), "1 <image> markers but 0 pictures"),
    (good_with(image="", conversations=said("q", "a", first="")), "nothing to compress"),
    (good_with(image=7), "7 is not a picture path"),
    (good_with(image={"path": "a.png"}), "is not a picture path"),
    (good_with(image="../a.png"), "leaves data.images"),
    (good_with(image="/etc/hosts"), "leaves data.images"),
    (good_with(image="a\0.png"), "leaves data.images"),
    (good_with(compression="{query: x"), "compression is no JSON .*: {query: x"),
    (good_with(compression='["x"]'), r"compression holds '\[\"x\"\]': an object is due"),
    (good_with(compression={"query": 5}), "compression holds .*5"),
    (good_with(compression='{"query": "\\ud800"}'), "compression is no JSON .*surrogates"),
    ('{"conversations": [{"from": "human", "value": "\\ud83d"}]}', "no JSON .*surrogates"),
]


@pytest.mark.parametrize("bad, reason", BAD)
def test_bad_rows_say_why(tmp_path: Path, bad: Any, reason: str) -> None:
    reader = reader_of(tmp_path, GOOD, bad, GOOD)
    with pytest.raises(RowError, match=reason) as caught:
        reader.record(1)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert reader.record(0).turns == reader.record(2).turns == TURNS


def test_blank_lines_byte_order_marks_and_other_line_ends(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    lines = [json.dumps({**GOOD, "conversations": said("ü?", str(i))}, ensure_ascii=False) for i in range(3)]
    for i, end in enumerate(("\n", "\r\n")):
        text = f"\ufeff{end}{lines[0]}{end} \t{end}{end}{lines[1]}{end}{lines[2]}" + i * end * 2
        (tmp_path / "rows.jsonl").write_bytes(text.encode())
        reader = ConversationReader(str(tmp_path / "rows.jsonl"), str(tmp_path / "images"))
        assert [reader.record(row).turns[0].target for row in range(len(reader))] == ["0", "1", "2"]
        assert reader.record(0).turns[0].questions == ("ü?",)
    (tmp_path / "rows.jsonl").write_bytes(b'\xff{"a": 1}\n' + lines[0].encode())
    reader = ConversationReader(str(tmp_path / "rows.jsonl"), str(tmp_path / "images"))
    with pytest.raises(RowError, match=r"no JSON .*utf-8"):
        reader.record(0)
    assert reader.record(1).turns[0].target == "0"


def answers(reader: ConversationReader) -> str:
    return "".join(reader.record(row).turns[0].target for row in range(len(reader)))


def test_files_folders_globs_and_both_kinds(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()

    def rows(texts: str) -> list[dict[str, Any]]:
        return [{**GOOD, "conversations": said("q", text)} for text in texts]

    write_lines(tmp_path / "data/a/2.jsonl", rows("yz"))
    write_lines(tmp_path / "data/a/deep/3.jsonl", rows("w"))
    write_rows(tmp_path / "data/a/1.parquet", rows("uv"))
    write_lines(tmp_path / "data/b.txt", rows("t"))
    (tmp_path / "data/a/notes.md").write_text("no data")
    for pattern, expected in {"a": "yzwuv", "a/*.jsonl": "yz", "**/[1-3].*": "yzwuv", "b.txt": "t"}.items():
        reader = ConversationReader(str(tmp_path / "data" / pattern), str(tmp_path / "images"))
        assert answers(reader) == expected
        assert [reader.record(row).row for row in range(len(reader))] == list(range(len(expected)))


def test_mistakes_name_the_file_and_the_cure(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (tmp_path / "hollow").mkdir()
    (tmp_path / "empty.jsonl").write_text("\n \n")
    (tmp_path / "my list.json").write_text(f"\n [{json.dumps(GOOD)}]")
    write_rows(tmp_path / "wrong.parquet", [{"question": "q", "answer": "a"}])
    (tmp_path / "text.parquet").write_text("not parquet")
    write_rows(tmp_path / "none.parquet", [], pq.read_schema(write_rows(tmp_path / "one.parquet", [GOOD])))
    cases = {
        "empty.jsonl": r"empty\.jsonl: holds no rows: set data\.train",
        "none.parquet": r"none\.parquet: holds no rows: set data\.train",
        "my list.json": r"list\.json: is a JSON array.*`jq -c '\.\[\]' '.*my list\.json' > '.*my list\.json\.jsonl'`",
        "hollow": r"data\.train: no jsonl or parquet file at '.*hollow': give a \.jsonl or \.parquet file",
        "absent.jsonl": r"data\.train: no jsonl or parquet file at '.*absent\.jsonl'",
        "wrong.parquet": r"wrong\.parquet: has no column of conversations \(found: question, answer\)",
        "text.parquet": r"text\.parquet: can't be read as parquet",
    }
    for name, message in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            ConversationReader(str(tmp_path / name), str(images))
        assert "\n" not in str(caught.value)
    good = str(write_lines(tmp_path / "good.jsonl", [GOOD]))
    with pytest.raises(UserError, match=r"data\.images: no such folder '.*nowhere': set it"):
        ConversationReader(good, str(tmp_path / "nowhere"))


def test_the_configuration_takes_folders_of_json_lines(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.train: no \*\.parquet or \*\.jsonl file in folder"):
        _check_rows("data.train", str(tmp_path))
    write_lines(tmp_path / "deep" / "rows.jsonl", [GOOD])
    _check_rows("data.train", str(tmp_path))


def test_long_files_cost_eight_bytes_a_line(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    count = 20_000
    line = json.dumps({**GOOD, "filler": "x" * 2000})
    with open(tmp_path / "rows.jsonl", "w") as file:
        file.writelines(f"{line}\n" for _ in range(count))
    tracemalloc.start()
    try:
        reader = ConversationReader(str(tmp_path / "rows.jsonl"), str(tmp_path / "images"))
        assert reader.record(count - 1).turns == TURNS
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(reader) == count and kept < 8 * count + 100_000 and peak < 40 * count + 500_000


def _read_all(reader: ConversationReader, offset: int, send: Callable[[Any], None]) -> None:
    rows = [(offset + 7 * i) % len(reader) for i in range(20 * len(reader))]  # long enough to meet the others
    send({row: reader.record(row).turns[0].target for row in rows})


def test_processes_that_share_a_reader_read_their_own_rows(tmp_path: Path) -> None:
    expected = {i: f"{i} {'x' * (1 + i * 37 % 900)}" for i in range(300)}
    reader = reader_of(tmp_path, *({**GOOD, "conversations": said("q", text)} for text in expected.values()))
    assert reader.record(5).turns[0].target == expected[5]  # the file is open here before the others start
    context = get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(3)]
    for i, (_, sender) in enumerate(pipes):
        context.Process(target=_read_all, args=(reader, 100 * i, sender.send), daemon=True).start()
    for receiver, _ in pipes:
        assert receiver.poll(60) and receiver.recv() == expected
    restored = pickle.loads(pickle.dumps(reader))
    assert {row: restored.record(row).turns[0].target for row in range(300)} == expected


def index_of(demo: Demo, reader: ConversationReader, folder: Path, processes: int = 1) -> Index:
    packer = demo.packer()
    indexer = Indexer(reader, packer.template, packer.images)
    return open_index(indexer, str(folder), builder=True, processes=processes, progress=False)


def test_the_index_counts_every_text_and_names_rows(demo: Demo, tmp_path: Path) -> None:
    write_picture(tmp_path / "images" / "a.png", 84, 84)
    text_row = {"conversations": said("Who?", "a man", first=""), "compression": '{"query": " A man in a dark coat. "}'}
    both = {**GOOD, "compression": {"query": "on the left side"}, "conversations": said("Who?", "a cat")}
    missing = {**GOOD, "image": "gone.png"}
    reader = reader_of(tmp_path, GOOD, "nonsense", text_row, missing, both)
    index = index_of(demo, reader, tmp_path / "index", processes=2)
    template = demo.packer().template
    assert (len(reader), len(index), index.bad_rows) == (5, 3, 2)
    assert index.samples["row"].tolist() == [0, 2, 4]
    assert [index.name(sample) for sample in range(3)] == [f"data.train row {row}" for row in (0, 2, 4)]
    for sample in range(3):
        record = reader.record(int(index.samples["row"][sample]))
        (context,) = template.encode_texts([record.context])
        assert index.samples["context_tokens"][sample] == len(context)
        turns = slice(*index.turn_bounds(sample))
        questions = template.encode_texts([turn.questions[0] for turn in record.turns])
        targets = template.encode_texts([turn.target for turn in record.turns])
        assert index.turns["target_tokens"][turns].tolist() == [len(ids) for ids in targets]
        assert index.question_tokens[turns].tolist() == [len(ids) for ids in questions]
        assert index.turns["kind"][turns].tolist() == list(range(len(record.turns)))
    assert (index.samples["context_tokens"] > 0).tolist() == [False, True, True]
    assert index.samples["query_images"].tolist() == [1, 0, 1]
    assert index.samples["query_image_tokens"].tolist() == [9, 0, 9]
    bad = [json.loads(line) for line in (index.folder / "bad_rows.jsonl").read_text().splitlines()]
    assert [entry["row"] for entry in bad] == [1, 3]
    assert "no JSON" in bad[0]["reason"] and "gone.png" in bad[1]["reason"]


def test_no_usable_row_names_the_first(demo: Demo, tmp_path: Path) -> None:
    reader = reader_of(tmp_path, {"question": "q"}, {"question": "q"})
    with pytest.raises(UserError, match=r"rows\.jsonl: no usable row; row 0: no list of turns.*found: question"):
        index_of(demo, reader, tmp_path / "index")


def test_several_files_of_conversations_are_joined(demo: Demo, tmp_path: Path) -> None:
    write_picture(tmp_path / "images" / "a.png", 84, 84)
    paths = [write_lines(tmp_path / f"{name}.jsonl", ["bad", *[GOOD] * count]) for name, count in (("x", 2), ("y", 1))]
    readers = [
        ConversationReader(str(path), str(tmp_path / "images"), f"data.train[{i}]") for i, path in enumerate(paths)
    ]
    indices = [index_of(demo, reader, tmp_path / "index") for reader in readers]
    joined = join_indices(indices, readers, str(tmp_path / "index"), builder=True)
    assert joined.samples["row"].tolist() == [1, 2, 4] and joined.name(2) == "data.train[1] row 1"
    assert JoinedReader(readers).record(4).turns == TURNS


def test_converted_turns_are_read_back(tmp_path: Path) -> None:
    turns = [
        RecordTurn(("<image> What?", "Which?", "Who?"), "a", 0),
        RecordTurn(("",), "b", 1),
        RecordTurn(("Where?",), "there", 2),
        RecordTurn(("Why?",), "", 3),
    ]
    converted = [conversation(row, turns, ["a.png", "b.png"][: row % 2 + 1]) for row in range(64)]
    reader = reader_of(tmp_path, *converted)
    asked = []
    for row in range(64):
        record = reader.record(row)
        assert [Path(path).name for path in record.query_images] == ["a.png", "b.png"][: row % 2 + 1]
        assert [turn.target for turn in record.turns] == ["a", "there"] and record.turns[1].questions == ("Where?",)
        asked.append(record.turns[0].questions[0])
    assert min(map(asked.count, ("What?", "Which?", "Who?"))) > 10, "paraphrases are drawn by row"
    same_turn_twice = conversation(0, [turns[0]] * 40, ["a.png"])["conversations"][2::2]
    assert len({entry["value"] for entry in same_turn_twice}) == 3, "and by turn"
    assert converted[7] == conversation(7, turns, ["a.png", "b.png"])
    with pytest.raises(RowError, match="no picture"):
        conversation(0, turns, [])
    with pytest.raises(RowError, match="no turn has words on both sides"):
        conversation(0, turns[1:2], ["a.png"])
