"""MMEB's files: either publication of its rows, one folder per data set, and the folder of the pictures.

TIGER-Lab/MMEB-eval holds texts that are ready to use; ziyjiang/MMEB_Test_Instruct holds instructions apart from texts.
In both the first candidate of a row is the right one, and a row's candidates are its own.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from muco_ds.data.readers import RowError, data_files, parquet_facts, picture_paths
from muco_ds.errors import UserError
from muco_ds.eval.mmeb_datasets import DATASETS, plain

READY, INSTRUCT = "TIGER-Lab/MMEB-eval", "ziyjiang/MMEB_Test_Instruct"

_COLUMNS = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")
_INSTRUCTIONS = ("qry_inst", "tgt_inst")
_ROWS_AT_ONCE = 16  # a row may hold a thousand candidates
_PICTURE_FOLDERS = ("image-tasks", "eval_images", "images", "")
_OLD, _NEW = "/images/", "/image-tasks/"


@dataclass(frozen=True)
class MMEBRow:
    """One query as it is stored. Of each candidate `captions` and `images` hold the text and the path, '' = none."""

    query_instruction: str
    query_text: str
    query_image: str
    target_instruction: str
    captions: list[str]
    images: list[str]


@dataclass(frozen=True)
class MMEBFile:
    """The parquet files of one data set, in one of the publications."""

    name: str
    files: list[str]
    publication: str

    @classmethod
    def open(cls, name: str, folder: Path) -> MMEBFile:
        """Raises UserError: no parquet file, columns of neither publication."""
        files = data_files(str(folder), "--data")
        files = [file for file in files if os.path.basename(file).startswith("test")] or files
        instructed = set()
        for file in files:
            _, schema = parquet_facts(file)
            if missing := [column for column in _COLUMNS if column not in schema.names]:
                raise UserError(
                    f"{file}: column '{missing[0]}' is missing (found: {', '.join(schema.names)}): "
                    f"{READY} has {', '.join(_COLUMNS)}, {INSTRUCT} also {', '.join(_INSTRUCTIONS)}"
                )
            instructed.add(any(column in schema.names for column in _INSTRUCTIONS))
        if len(instructed) > 1:
            raise UserError(f"{folder}: holds files of {READY} and of {INSTRUCT}: keep one publication")
        return cls(name, files, INSTRUCT if instructed == {True} else READY)

    def digest(self) -> str:
        """Eight digits that stand for the content of the files."""
        content = hashlib.blake2b(digest_size=4)
        for file in self.files:
            with open(file, "rb") as data:
                while block := data.read(2**20):
                    content.update(block)
        return content.hexdigest()

    def rows(self, limit: int | None) -> Iterator[tuple[str, MMEBRow | RowError]]:
        """The (first `limit`) rows by their names, `FILE: row 3`, each as it is or why it can't be used.

        Raises:
            UserError: a file that can't be read to its end.
        """
        count = 0
        for file in self.files:
            number = 0
            for data in _records(file):
                if count == limit:
                    return
                try:
                    yield f"{file}: row {number}", _row(data)
                except RowError as error:
                    yield f"{file}: row {number}", error
                count, number = count + 1, number + 1


def find_datasets(data: str) -> dict[str, Path]:
    """Folders of the data sets in `data` or in its MMEB_eval, by the names of the table, in its order.

    Raises:
        UserError: there is none.
    """
    root = Path(data)
    if (root / "MMEB_eval").is_dir():
        root = root / "MMEB_eval"
    try:
        folders = sorted(path for path in root.iterdir() if path.is_dir())
    except OSError as error:
        raise UserError(f"--data: can't read the folder '{data}' ({error.strerror})") from error
    by_plain: dict[str, Path] = {}
    for folder in folders:
        if folder.name in DATASETS or plain(folder.name) not in by_plain:
            by_plain[plain(folder.name)] = folder
    found = {name: by_plain[plain(name)] for name in DATASETS if plain(name) in by_plain}
    if not found:
        raise UserError(f"--data: no MMEB data set in '{data}': give the folder with A-OKVQA, CIRR and the others")
    return found


class Pictures:
    """Where the paths of the rows start: `images`, or the folders beside the data that people unpack pictures to.

    Raises UserError where `images` is no folder.
    """

    def __init__(self, data: str, images: str | None) -> None:
        if images is None:
            bases = [Path(data), *([nested] if (nested := Path(data) / "MMEB_eval").is_dir() else [])]
            tried = [os.path.join(base, name) for base in reversed(bases) for name in _PICTURE_FOLDERS]
        else:
            # The released MuCo evaluation looks for .../image-tasks/... where .../images/... is not there.
            tried = [images, f"{os.path.abspath(images)}/".replace(_OLD, _NEW)]
        self.roots = list(dict.fromkeys(os.path.realpath(folder) for folder in tried if os.path.isdir(folder)))
        if not self.roots:
            raise UserError(f"--images: no such folder '{images}': give the one that the paths of the rows start from")

    def path(self, name: str) -> str:
        """Absolute path of a picture; where it is in none of the folders, what it would be in the first.

        Raises:
            RowError: the path leaves the folder.
        """
        names = dict.fromkeys((name, f"/{name}".replace(_OLD, _NEW)[1:]))
        tried = [path for root in self.roots for spelled in names for path in picture_paths(spelled, root, "--images")]
        return next(filter(os.path.exists, tried), tried[0])


def _records(file: str) -> Iterator[dict[str, Any]]:
    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as opened:
            columns = [name for name in (*_COLUMNS, *_INSTRUCTIONS) if name in opened.schema_arrow.names]
            for batch in opened.iter_batches(_ROWS_AT_ONCE, columns=columns):
                yield from batch.to_pylist()
    except Exception as error:  # the parquet library raises several kinds on broken files
        cause = (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"{file}: can't be read as parquet ({cause}): was it written completely?") from error


def _row(data: dict[str, Any]) -> MMEBRow:
    captions, images = (_texts(data, column) for column in ("tgt_text", "tgt_img_path"))
    # One text stands for all pictures, and for no text or no picture at all there may be none, one '' or many.
    if isinstance(data["tgt_text"], str):
        captions *= max(len(images), 1)
    captions, images = (
        given if any(given) else [""] * len(other) for given, other in ((captions, images), (images, captions))
    )
    if not captions:
        raise RowError("no candidates: tgt_text and tgt_img_path are empty")
    if len(captions) != len(images):
        raise RowError(f"tgt_text holds {len(captions)} candidates but tgt_img_path {len(images)}")
    if not captions[0].strip() and not images[0]:
        raise RowError("the first candidate, which should be the right one, has neither text nor picture")
    instruction, text, image = (_text(data, column) for column in ("qry_inst", "qry_text", "qry_img_path"))
    return MMEBRow(instruction, text, image, _text(data, "tgt_inst"), captions, images)


def _text(data: dict[str, Any], column: str) -> str:
    value = data.get(column)
    if value is not None and not isinstance(value, str):
        raise RowError(f"{column} holds {value!r}: it may hold a text only")
    return value or ""


def _texts(data: dict[str, Any], column: str) -> list[str]:
    value = data.get(column)
    texts = [value] if isinstance(value, str) else value or []
    if not isinstance(texts, list) or not all(isinstance(text, str | None) for text in texts):
        raise RowError(f"{column} is neither a text nor a list of texts")
    return [text or "" for text in texts]
