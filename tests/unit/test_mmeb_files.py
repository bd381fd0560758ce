"""MMEB's files: both publications, folders, picture roots, and rows that can't be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from muco_ds.data.readers import RowError
from muco_ds.errors import UserError
from muco_ds.eval.mmeb_datasets import chosen
from muco_ds.eval.mmeb_files import INSTRUCT, READY, MMEBFile, MMEBRow, Pictures, find_datasets

from tiny_mmeb import instructed, ready, write_pictures, write_rows

GOOD = ready("q", "q.png", ["a", "b"], ["", ""])


def test_the_publication_is_told_by_its_columns(tmp_path: Path) -> None:
    write_rows(tmp_path / "one", [GOOD])
    write_rows(tmp_path / "two", [instructed("i", "q", "q.png", "", ["a"], [""])])
    one, two = (MMEBFile.open("GQA", tmp_path / name) for name in ("one", "two"))
    assert (one.publication, two.publication) == (READY, INSTRUCT)
    assert len(one.digest()) == 8 and one.digest() != two.digest()
    write_rows(tmp_path / "two", [GOOD], "test-00001-of-00002")
    with pytest.raises(UserError, match="holds files of TIGER-Lab/MMEB-eval and of ziyjiang/MMEB_Test_Instruct"):
        MMEBFile.open("GQA", tmp_path / "two")
    write_rows(tmp_path / "three", [{"qry": "q", "qry_text": "t"}])
    with pytest.raises(UserError, match=r"three.*'qry_img_path' is missing \(found: qry, qry_text\): TIGER-Lab"):
        MMEBFile.open("GQA", tmp_path / "three")
    with pytest.raises(UserError, match="no parquet file"):
        MMEBFile.open("GQA", tmp_path / "absent")


def test_files_of_other_splits_are_left_alone_and_rows_are_counted_over_files(tmp_path: Path) -> None:
    write_rows(tmp_path, [GOOD], "train-00000-of-00001")
    write_rows(tmp_path, [GOOD, GOOD], "test-00000-of-00002")
    write_rows(tmp_path, [GOOD, GOOD], "test-00001-of-00002")
    file = MMEBFile.open("GQA", tmp_path)
    names = [name.removeprefix(f"{tmp_path}/") for name, _ in file.rows(3)]
    assert names == [f"test-0000{i}-of-00002.parquet: row {row}" for i, row in ((0, 0), (0, 1), (1, 0))]
    assert len(list(file.rows(None))) == 4


def row_of(tmp_path: Path, texts: Any, images: Any) -> MMEBRow | RowError:
    write_rows(tmp_path, [ready("q", "q.png", texts, images)])
    ((_, row),) = MMEBFile.open("GQA", tmp_path).rows(None)
    return row


@pytest.mark.parametrize(
    ("texts", "images", "expected"),
    [
        (["a", "b"], ["x", "y"], (["a", "b"], ["x", "y"])),
        (["a", "b"], ["", ""], (["a", "b"], ["", ""])),
        (["a", "b"], [""], (["a", "b"], ["", ""])),
        (["a", None], None, (["a", ""], ["", ""])),
        ("", ["x", "y"], (["", ""], ["x", "y"])),
        ([], ["x", "y"], (["", ""], ["x", "y"])),
        ([""], ["x", "y"], (["", ""], ["x", "y"])),
        ("a", ["x", "y"], (["a", "a"], ["x", "y"])),
        ("a", "x", (["a"], ["x"])),
        (["", "b"], ["x", ""], (["", "b"], ["x", ""])),
    ],
)
def test_candidates_in_every_spelling(tmp_path: Path, texts: Any, images: Any, expected: Any) -> None:
    row = row_of(tmp_path, texts, images)
    assert isinstance(row, MMEBRow) and (row.captions, row.images) == expected


@pytest.mark.parametrize(
    ("texts", "images", "problem"),
    [
        ([], [], "no candidates"),
        (None, None, "no candidates"),
        (["a", "b"], ["x"], "2 candidates but tgt_img_path 1"),
        ([" ", "b"], ["", "y"], "the right one, has neither text nor picture"),
    ],
)
def test_rows_without_a_usable_list(tmp_path: Path, texts: Any, images: Any, problem: str) -> None:
    row = row_of(tmp_path, texts, images)
    assert isinstance(row, RowError) and problem in str(row)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    path = write_rows(tmp_path, [GOOD] * 200)
    data = bytearray(path.read_bytes())
    data[4:60] = bytes(56)  # the pages, not the footer
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"test-00000-of-00001\.parquet: can't be read as parquet"):
        list(MMEBFile.open("GQA", tmp_path).rows(None))


def test_folders_are_found_in_both_layouts_and_spellings(tmp_path: Path) -> None:
    for name in ("WebQA", "ImageNet_1K", "image-tasks", "CIFAR-100"):
        (tmp_path / "MMEB_eval" / name).mkdir(parents=True)
    for data in (tmp_path, tmp_path / "MMEB_eval"):
        found = find_datasets(str(data))
        assert {name: path.name for name, path in found.items()} == {"ImageNet-1K": "ImageNet_1K", "WebQA": "WebQA"}
        assert list(found) == ["ImageNet-1K", "WebQA"]
    for data in (tmp_path / "MMEB_eval" / "WebQA", tmp_path / "absent"):
        with pytest.raises(UserError, match="--data: "):
            find_datasets(str(data))


def test_a_name_that_is_none_of_the_36_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match="no data set 'CIFAR-100': the nearest names are "):
        chosen(["WebQA", "CIFAR-100"])
    with pytest.raises(UserError, match="'RefCOCO-Match': the nearest names are RefCOCO-Matching, "):
        chosen(["RefCOCO-Match"])


@pytest.mark.parametrize("folder", ["image-tasks", "eval_images", "images", ".", "MMEB_eval/image-tasks"])
def test_pictures_are_found_where_people_unpack_them(tmp_path: Path, folder: str) -> None:
    write_pictures(tmp_path / folder, "GQA/a b.png")
    path = Pictures(str(tmp_path), None).path("GQA/a b.png")
    assert Path(path) == (tmp_path / folder / "GQA" / "a b.png").resolve() and Path(path).exists()


def test_the_second_root_and_the_second_spelling(tmp_path: Path) -> None:
    write_pictures(tmp_path / "image-tasks", "GQA/a.png")
    write_pictures(tmp_path / "eval_images", "GQA/b.png")
    write_pictures(tmp_path, "MMEB/image-tasks/c.png")
    pictures = Pictures(str(tmp_path), None)
    for name, found in (("GQA/a.png", "image-tasks/GQA/a.png"), ("GQA/b.png", "eval_images/GQA/b.png")):
        assert pictures.path(name) == str(tmp_path.resolve() / found)
    assert pictures.path("MMEB/images/c.png") == str(tmp_path.resolve() / "MMEB/image-tasks/c.png")
    assert pictures.path("GQA/no.png") == str(tmp_path.resolve() / "image-tasks/GQA/no.png")
    given = Pictures(str(tmp_path / "elsewhere"), str(tmp_path / "images"))  # as the released evaluation retries
    assert given.path("GQA/a.png") == str(tmp_path.resolve() / "image-tasks/GQA/a.png")
    with pytest.raises(UserError, match="--images: no such folder"):
        Pictures(str(tmp_path), str(tmp_path / "absent"))


@pytest.mark.parametrize("name", ["../x.png", "/etc/hosts", "a/../../x.png", "a\0.png", "images/../../../x.png"])
def test_paths_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(RowError, match="picture path leaves --images"):
        Pictures(str(tmp_path), str(tmp_path)).path(name)
