"""Whatever is in a data set's files: one line that names it, rows that say why they are no good, or records."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muco_ds.data.conversations import ConversationReader
from muco_ds.data.index import Indexer, load_index
from muco_ds.data.readers import M3TReader, PairReader, RowError, SourceReader
from muco_ds.errors import UserError
from muco_ds.eval.mbeir_files import Candidates, PoolFile, read_instructions, read_queries, read_relevance
from muco_ds.eval.mmeb_files import MMEBFile, Pictures
from muco_ds.models.item_files import ItemFiles

from demo import Demo, Rows, write_picture
from fuzzing import damaged, fuzz, lines, objects, tables

M3T = {
    **{"qry": [["what?"], ["where?"]], "pos_text": ["this", "there"], "qry_image_path": "0.png", "pos_image_path": ""},
    **{"neg_text": ["no", "never"], "neg_image_path": ["0.png"], "qry_sentence": "a thing", "pos_sentence": ["this"]},
}
PAIR = {**M3T, "qry": ["what?"], "pos_text": ["this"]}
TALK = {
    "messages": [{"role": "user", "content": "<image>\nwhat?"}, {"role": "assistant", "content": "this"}],
    "images": ["0.png"],
    "compression": {"query": "words", "image": None},
}
ITEM = {"text": "words", "image": ["0.png"], "instruction": "find"}
MMEB = {
    **{"qry_inst": "find", "qry_text": "what?", "qry_img_path": "0.png", "tgt_inst": ""},
    **{"tgt_text": ["a", "b"], "tgt_img_path": ["0.png", ""]},
}
QUERY = {
    **{"qid": "4:17", "query_txt": "what?", "query_img_path": "0.png", "query_modality": "image,text"},
    "pos_cand_list": ["4:1", {"did": "4:2"}],
}
CANDIDATE = {"did": "4:1", "txt": "this", "img_path": "0.png", "modality": "image,text"}
QRELS = b"4:17 0 4:1 1 7\n4:18 0 4:2 1 7\n"
INSTRUCTIONS = b"query_modality\tcand_modality\tname\tid\tprompt\nimage,text\ttext\tcirr\t4\tfind it\n"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    write_picture(folder / "0.png", 60, 60)
    return folder


def parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def put(path: Path, content: bytes) -> Path:
    """A new file each time: `datasets` knows files by name and time."""
    path.write_bytes(content)
    put.clock += 1_000_000_000  # type: ignore[attr-defined]
    os.utime(path, ns=(put.clock, put.clock))  # type: ignore[attr-defined]
    return path


put.clock = 10**18  # type: ignore[attr-defined]


def one_line(error: Exception) -> None:
    assert str(error) and "\n" not in str(error), repr(str(error))


def measured(demo: Demo, open_reader: Callable[[], SourceReader]) -> None:
    """Index the rows as a run does."""
    packer = demo.packer()
    try:
        reader = open_reader()
    except UserError as error:
        return one_line(error)
    found = Indexer(reader, packer.template, packer.images).measure(range(len(reader)))
    assert len(found.bad) + len(found.tables["samples"]) == len(reader)
    for row in range(len(reader)):
        try:
            record = reader.record(row)
        except RowError:
            continue
        assert 0 < len(record.turns) <= 7
        for path in (*record.query_images, *record.target_images, *(p for n in record.negatives for p in n.images)):
            assert os.path.commonpath([path, reader.images]) == reader.images


@fuzz
@given(table=tables(M3T))
def test_m3t_columns(demo: Demo, root: Path, table: pa.Table) -> None:
    path = put(root / "m3t.parquet", parquet(table))
    measured(demo, lambda: M3TReader(str(path), str(root), negatives=True))


@fuzz
@given(table=tables(PAIR))
def test_pair_columns(demo: Demo, root: Path, table: pa.Table) -> None:
    path = put(root / "pairs.parquet", parquet(table))
    measured(demo, lambda: PairReader(str(path), str(root), negatives=True))


@fuzz
@given(table=tables(TALK))
def test_conversation_columns(demo: Demo, root: Path, table: pa.Table) -> None:
    path = put(root / "talk.parquet", parquet(table))
    measured(demo, lambda: ConversationReader(str(path), str(root)))


@fuzz
@given(rows=st.lists(objects(TALK), min_size=1, max_size=3))
def test_conversation_lines(demo: Demo, root: Path, rows: list[Any]) -> None:
    path = put(root / "talk.jsonl", lines(rows))
    measured(demo, lambda: ConversationReader(str(path), str(root)))


@fuzz
@given(content=damaged(lines([TALK] * 3)))
def test_damaged_conversation_lines(demo: Demo, root: Path, content: bytes) -> None:
    path = put(root / "damaged.jsonl", content)
    measured(demo, lambda: ConversationReader(str(path), str(root)))


@fuzz
@given(content=damaged(parquet(pa.Table.from_pylist([M3T] * 3))))
def test_damaged_parquet(demo: Demo, root: Path, content: bytes) -> None:
    path = put(root / "damaged.parquet", content)
    measured(demo, lambda: M3TReader(str(path), str(root), negatives=True))


def items_of(path: Path, root: Path) -> None:
    try:
        files = ItemFiles(str(path), root)
        files.check(headers=True, progress=False)
        assert sum(len(dialogue.turns) for dialogue in files.dialogues(0, len(files))) == files.rows
    except UserError as error:
        one_line(error)


@fuzz
@given(rows=st.lists(objects(ITEM), min_size=1, max_size=3))
def test_item_lines(root: Path, rows: list[Any]) -> None:
    items_of(put(root / "items.jsonl", lines(rows)), root)


@fuzz
@given(table=tables(ITEM))
def test_item_columns(root: Path, table: pa.Table) -> None:
    items_of(put(root / "items.parquet", parquet(table)), root)


@fuzz
@given(content=st.one_of(damaged(lines([ITEM] * 3)), damaged(lines([{"questions": ["a", "b"], "image": "0.png"}]))))
def test_damaged_items(root: Path, content: bytes) -> None:
    items_of(put(root / "damaged_items.jsonl", content), root)


def mmeb_of(folder: Path, pictures: str) -> None:
    try:
        file, places = MMEBFile.open("CIRR", folder), Pictures(str(folder), pictures)
        for _, row in file.rows(None):
            if isinstance(row, RowError):
                one_line(row)
                continue
            assert len(row.captions) == len(row.images) > 0
            for name in (row.query_image, *row.images):
                try:
                    assert not name or os.path.commonpath([places.path(name), pictures]) == pictures
                except RowError as error:
                    one_line(error)
    except UserError as error:
        one_line(error)


@fuzz
@given(content=st.one_of(tables(MMEB).map(parquet), damaged(parquet(pa.Table.from_pylist([MMEB] * 3)))))
def test_mmeb(root: Path, content: bytes) -> None:
    (root / "CIRR").mkdir(exist_ok=True)
    put(root / "CIRR" / "test.parquet", content)
    mmeb_of(root / "CIRR", os.path.realpath(root))


@fuzz
@given(
    content=st.one_of(
        st.lists(objects(QUERY), min_size=1, max_size=3).map(lines), damaged(lines([QUERY] * 2)), st.binary(max_size=60)
    )
)
def test_mbeir_queries(demo: Demo, root: Path, content: bytes) -> None:
    path = put(root / "queries.jsonl", content)
    try:
        for query in read_queries(path, os.path.realpath(root), None):
            demo.packer().template.encode_texts([query.text or ""])
    except UserError as error:
        one_line(error)


@fuzz
@given(content=st.one_of(damaged(QRELS), st.binary(max_size=60)))
def test_mbeir_relevance(root: Path, content: bytes) -> None:
    try:
        found = read_relevance(put(root / "qrels.txt", content))
        assert len(found.query_P) == len(found.candidate_P) == len(found.line_P)
    except UserError as error:
        one_line(error)


@fuzz
@given(content=st.one_of(damaged(INSTRUCTIONS), st.binary(max_size=60)))
def test_mbeir_instructions(root: Path, content: bytes) -> None:
    try:
        assert read_instructions(put(root / "instructions.tsv", content))
    except UserError as error:
        one_line(error)


@fuzz
@given(
    content=st.one_of(st.lists(objects(CANDIDATE), min_size=1, max_size=3).map(lines), damaged(lines([CANDIDATE] * 2)))
)
def test_mbeir_candidates(demo: Demo, root: Path, content: bytes) -> None:
    path = put(root / "pool.jsonl", content)
    try:
        candidates = Candidates.all(PoolFile.scan(path, os.path.realpath(root), progress=False))
        dialogues = candidates.dialogues(0, len(candidates))
        demo.packer().template.encode_texts([str(turn) for dialogue in dialogues for turn in dialogue.turns])
        for row in range(len(candidates)):
            candidates.pool.modality(row)
            candidates.name(row)
    except UserError as error:
        one_line(error)


@pytest.fixture(scope="module")
def index_files(scenes: Rows) -> Iterator[dict[str, bytes]]:
    yield {path.name: path.read_bytes() for path in scenes.index.folder.iterdir()}


@fuzz
@given(data=st.data())
def test_index_files(index_files: dict[str, bytes], root: Path, data: st.DataObject) -> None:
    folder = root / "index"
    folder.mkdir(exist_ok=True)
    which = data.draw(st.sampled_from(sorted(index_files)))
    for name, content in index_files.items():
        (folder / name).unlink(missing_ok=True)  # what was mapped before stays what it was
        (folder / name).write_bytes(content)
    how = data.draw(st.sampled_from(["cut", "gone", "json"]))
    content = index_files[which]
    (folder / which).unlink()
    if how == "cut":
        (folder / which).write_bytes(content[: data.draw(st.integers(0, max(len(content) - 1, 0)))])
    elif how == "json" and which == "meta.json":
        (folder / which).write_text(json.dumps(data.draw(objects(json.loads(content)))))
    try:
        index = load_index(folder)
        assert not len(index) or index.turn_bounds(len(index) - 1)[1] == len(index.turns)
    except UserError as error:
        one_line(error)
