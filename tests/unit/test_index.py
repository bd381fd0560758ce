"""The length index: right numbers, bad rows listed, rebuilt exactly when its inputs change, whole or not there."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest

from muco_ds.data import index as index_module
from muco_ds.data.images import ImageLimits, ImagePipeline
from muco_ds.data.index import Index, Indexer, image_id, index_path, open_index, target_hash
from muco_ds.data.readers import M3T_SCHEMA, M3TReader
from muco_ds.errors import UserError

from demo import Demo, Rows, open_data, row, write_mixed, write_picture, write_rows


def content(index: Index) -> tuple[bytes, str]:
    tables = b"".join(np.asarray(array).tobytes() for array in index.tables().values())
    return tables, (index.folder / "bad_rows.jsonl").read_text()


def bad_rows(index: Index) -> dict[int, str]:
    entries = map(json.loads, (index.folder / "bad_rows.jsonl").read_text().splitlines())
    return {entry["row"]: entry["reason"] for entry in entries}


def indexer_of(demo: Demo, parquet: Path, images: Path) -> Indexer:
    packer = demo.packer()
    return Indexer(M3TReader(str(parquet), str(images)), packer.template, packer.images)


def test_every_number_is_that_of_the_record(mixed: Rows) -> None:
    assert len(mixed.index) == 40 and mixed.index.bad_rows == 0
    template, images = mixed.packer.template, mixed.packer.images
    for sample in range(40):
        data = mixed.index.samples[sample]
        record = mixed.reader.record(int(data["row"]))
        turns = mixed.index.turns[slice(*mixed.index.turn_bounds(sample))]
        assert len(turns) == len(record.turns)
        paths = {"query": record.query_images, "target": record.target_images}
        grids = {side: [images.patches(path).grid for path in paths[side]] for side in paths}
        for side, found in grids.items():
            assert data[f"{side}_images"] == len(found)
            assert data[f"{side}_image_tokens"] == sum(images.tokens(grid) for grid in found)
        patches = [int(np.prod(grid)) for grid in grids["query"] + grids["target"]]
        assert data["patches"] == sum(patches) and data["patches_squared"] == sum(p * p for p in patches)
        assert data["image_id"] == image_id(record)
        first_turn = mixed.index.turn_bounds(sample)[0]
        assert turns["kind"].tolist() == [turn.kind for turn in record.turns]
        for j, (turn, entry) in enumerate(zip(record.turns, turns, strict=True)):
            counts = mixed.index.question_tokens[slice(*mixed.index.question_bounds(first_turn + j))]
            assert counts.tolist() == [len(ids) for ids in template.encode_texts(turn.questions)]
            assert entry["target_tokens"] == len(template.encode_texts([turn.target])[0])
            assert entry["target_hash"] == target_hash(turn.target, record.target_images)


def test_bad_rows_are_listed_and_left_out(demo: Demo, tmp_path: Path) -> None:
    images = tmp_path / "images"
    write_picture(images / "good.png", 60, 60)
    write_picture(images / "cut.png", 60, 60)
    (images / "cut.png").write_bytes((images / "cut.png").read_bytes()[:20])
    (images / "text.png").write_text("not a picture")
    (images / "folder.png").mkdir()
    write_picture(images / "line.png", 6000, 30)
    rows = [
        row([["q"]], ["t"], "good.png"),
        row([["q"]], ["t"], "absent.png"),
        row([["q"], ["q"]], ["t"]),
        row([["q"]], ["t"], "cut.png"),
        row([["q"]], ["t"], "text.png"),
        row([["q"]], ["t"], "folder.png"),
        row([["q"]], ["t"], "line.png"),
        row([["q"]], ["t"], "../escape.png"),
        row([["q"]], ["t"], "good.png", "absent.png"),
        row([["q"], ["q"]], ["t", "u"]),
    ]
    data = open_data(demo, write_rows(tmp_path / "rows.parquet", rows, M3T_SCHEMA), images, tmp_path / "index")
    assert data.index.samples["row"].tolist() == [0, 9] and data.index.bad_rows == 8
    reasons = bad_rows(data.index)
    assert sorted(reasons) == list(range(1, 9))
    assert "absent.png: no such file" in reasons[1] and "2 turns but pos_text has 1" in reasons[2]
    assert all("is not a picture" in reasons[i] for i in (3, 4, 5))
    assert "factor of 200" in reasons[6] and "leaves data.images" in reasons[7] and "absent.png" in reasons[8]
    assert [data.index.turn_bounds(i) for i in (0, 1)] == [(0, 1), (1, 3)]


def test_several_processes_build_the_same_index(demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "CHUNK_ROWS", 7)
    parquet, images = write_mixed(tmp_path)
    (images / "3.png").unlink()
    one = open_data(demo, parquet, images, tmp_path / "one").index
    three = open_data(demo, parquet, images, tmp_path / "three", processes=3).index
    assert one.bad_rows > 0 and content(one) == content(three)


def test_rebuilt_only_when_something_changed(demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet, images = write_mixed(tmp_path, count=6)
    built = []
    build = index_module._build

    def counted(indexer: Indexer, path: Path, processes: int, progress: bool) -> None:
        built.append(path)
        build(indexer, path, processes, progress)

    monkeypatch.setattr(index_module, "_build", counted)

    def reopen(indexer: Indexer) -> int:
        open_index(indexer, str(tmp_path / "index"), builder=True, progress=False)
        return len(built)

    indexer = indexer_of(demo, parquet, images)
    assert reopen(indexer) == 1 and reopen(indexer_of(demo, parquet, images)) == 1
    limits = dataclasses.replace(indexer.images.limits, max_pixels=84 * 84)
    smaller = ImagePipeline(indexer.images.processor, limits)
    assert reopen(Indexer(indexer.reader, indexer.template, smaller)) == 2
    short = ImagePipeline(indexer.images.processor, ImageLimits(limits.min_pixels, limits.max_pixels, 64))
    assert reopen(Indexer(indexer.reader, indexer.template, short)) == 3
    end = demo.packer("<|im_end|>").template
    assert reopen(Indexer(indexer.reader, end, indexer.images)) == 4
    os.utime(parquet, ns=(1, 1))
    assert reopen(indexer_of(demo, parquet, images)) == 5
    write_mixed(tmp_path, count=7)
    assert reopen(indexer_of(demo, parquet, images)) == 6
    assert len(open_index(indexer_of(demo, parquet, images), str(tmp_path / "index"), builder=False)) == 7
    assert len(set(built)) == 6


def test_default_folder_is_beside_the_data(demo: Demo, tmp_path: Path) -> None:
    parquet, images = write_mixed(tmp_path, count=4)
    index = open_index(indexer_of(demo, parquet, images), None, builder=True, progress=False)
    assert index.folder.parent == tmp_path / ".muco_index"


def test_an_interrupted_build_is_not_taken_for_complete(
    demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet, images = write_mixed(tmp_path, count=20)
    indexer = indexer_of(demo, parquet, images)
    path = index_path(indexer, str(tmp_path / "index"))
    with monkeypatch.context() as patch:
        patch.setattr(index_module, "CHUNK_ROWS", 5)
        measured = []

        def measure(rows: range) -> index_module.Measured:
            measured.append(rows)
            if len(measured) == 3:
                raise KeyboardInterrupt
            return Indexer.measure(indexer, rows)

        patch.setattr(indexer, "measure", measure)
        with pytest.raises(KeyboardInterrupt):
            open_index(indexer, str(tmp_path / "index"), builder=True, progress=False)
    assert len(measured) == 3 and not path.exists()
    whole = open_index(indexer, str(tmp_path / "index"), builder=True, progress=False)
    assert len(whole) == 20


def test_who_does_not_build_waits(demo: Demo, tmp_path: Path) -> None:
    from threading import Thread

    parquet, images = write_mixed(tmp_path, count=4)
    opened: list[Index] = []
    waiting = indexer_of(demo, parquet, images)
    thread = Thread(target=lambda: opened.append(open_index(waiting, str(tmp_path / "index"), builder=False)))
    thread.start()
    thread.join(0.5)
    assert thread.is_alive() and not opened
    built = open_index(indexer_of(demo, parquet, images), str(tmp_path / "index"), builder=True, progress=False)
    thread.join(20)
    assert content(opened[0]) == content(built)


def test_rows_that_share_a_picture_share_its_id(demo: Demo, tmp_path: Path) -> None:
    images = tmp_path / "images"
    for name in ("a.png", "b.png"):
        write_picture(images / name, 60, 60)
    paths = ["a.png", "b.png", "./a.png", "", ""]
    rows = [row([["q"]], [f"t{i}"], path) for i, path in enumerate(paths)]
    data = open_data(demo, write_rows(tmp_path / "rows.parquet", rows, M3T_SCHEMA), images, tmp_path / "index")
    ids = data.index.samples["image_id"].tolist()
    assert ids[0] == ids[2] and len(set(ids)) == 4


def test_target_hash_ignores_case_and_white_space_only() -> None:
    assert target_hash("A red  Circle", ()) == target_hash("a red\tcircle ", ()) >= 0
    others = {
        target_hash("a red circle", ()),
        target_hash("a red circle.", ()),
        target_hash("a redcircle", ()),
        target_hash("a red circle", ("x.png",)),
        target_hash("", ("x.png",)),
        target_hash("", ("y.png",)),
    }
    assert len(others) == 6


def test_no_usable_row_is_an_error_that_names_the_first(demo: Demo, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    rows = [row([["q"]], ["t"], "absent.png"), row([["q"], ["q"]], ["t"])]
    parquet = write_rows(tmp_path / "rows.parquet", rows, M3T_SCHEMA)
    for _ in range(2):  # also from the index that the first attempt left
        message = r"rows\.parquet: no usable row; row 0: picture .*absent\.png: no such file"
        with pytest.raises(UserError, match=message) as caught:
            open_data(demo, parquet, tmp_path / "images", tmp_path / "index")
        assert "\n" not in str(caught.value) and "--rebuild" in str(caught.value)


def test_a_folder_that_can_not_be_written(demo: Demo, tmp_path: Path) -> None:
    parquet, images = write_mixed(tmp_path, count=4)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"can't write the length index there .*: set data\.index_dir"):
        open_data(demo, parquet, images, tmp_path / "file" / "index")
