"""Readers: files of a data set -> Record, row by row, memory-mapped so that millions of rows cost no memory."""

from __future__ import annotations

import ast
import glob
import os
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, disable_progress_bars, load_dataset
from pyarrow.dataset import ParquetFragmentScanOptions

from muco_ds.data.schema import TURNS_PER_SAMPLE, Negative, Record, RecordTurn
from muco_ds.errors import UserError

_IMAGE_MARKER = re.compile(r"<\|image_\d+\|>\n?")
"""M3T's picture placeholder. Pictures always come first here, so the marker is only removed."""

IMAGE_MARK = "<|image_1|>\n"
"""How rows mark a picture; readers put pictures first, marked or not."""

_CONVERTED_ROWS = 1000
# Pages are checked where their writer gave them checksums, as ours do; without, altered texts may look like texts.
_CHECKED = ParquetFragmentScanOptions(page_checksum_verification=True)

M3T_COLUMNS = ("qry", "pos_text", "qry_image_path")
"""Those that a row must have."""

M3T_SCHEMA = pa.schema(
    [
        ("qry", pa.list_(pa.list_(pa.string()))),
        ("qry_sentence", pa.string()),
        ("qry_image_path", pa.string()),
        ("pos_text", pa.list_(pa.string())),
        ("pos_sentence", pa.list_(pa.string())),
        ("pos_image_path", pa.string()),
        ("neg_text", pa.list_(pa.string())),
    ]
)


class RowError(ValueError):
    """A row that can't be trained on; the message says why, without naming the row."""


class Reader(Protocol):
    """Rows of a data set, or of several."""

    def __len__(self) -> int: ...

    def record(self, row: int) -> Record:
        """The row as a Record. Raises RowError when it can't be used."""
        ...


class SourceReader(Reader, Protocol):
    """Rows of one data set. `key` is what set it, for messages; `images` is where its picture paths start."""

    key: str
    files: list[str]
    images: str
    negatives: bool


def data_files(pattern: str, key: str, suffixes: Sequence[str] = (".parquet",)) -> list[str]:
    """Files of a path, folder or glob, sorted; of a folder those that end in one of `suffixes`.

    `key` is the config key named in errors.
    """
    if os.path.isdir(pattern):
        files = sorted(str(path) for suffix in suffixes for path in Path(pattern).glob(f"**/*{suffix}"))
    else:
        files = sorted(glob.glob(pattern, recursive=True)) or ([pattern] if os.path.exists(pattern) else [])
    if not files:
        kinds = " or ".join(suffix.removeprefix(".") for suffix in suffixes)
        cure = f"give a {' or '.join(suffixes)} file, a folder of them or a glob"
        raise UserError(f"{key}: no {kinds} file at '{pattern}': {cure}")
    return files


def picture_folder(images: str, pattern: str) -> str:
    """The real path of the folder that the picture paths of the rows at `pattern` start from."""
    if not os.path.isdir(images):
        raise UserError(f"data.images: no such folder '{images}': set it to where the paths of '{pattern}' start")
    return os.path.realpath(images)


def picture_paths(value: Any, images: str, key: str = "data.images") -> tuple[str, ...]:
    """Absolute paths of the pictures in a column that holds one path, a list of them or none.

    Raises RowError for anything else, and for a path that leaves the folder `images`, a real path that `key` set.
    """
    names = _strings(value, "a picture path")
    # Links are the user's own and may lead anywhere; '../' and '/' in a row must not.
    paths = tuple(os.path.normpath(os.path.join(images, name)) for name in names if name)
    for path in paths:
        if os.path.commonpath([path, images]) != images or "\0" in path:
            raise RowError(f"picture path leaves {key}: {path!r}")
    return paths


class M3TReader:
    """Rows in naver-ai/M3T's columns (qry = list of paraphrase lists, pos_text = list of targets).

    Accepts ragged numbers of turns, a plain string in place of a list of paraphrases, and a picture on either side.
    `key` is what set the pattern, for messages. `negatives`: read hard negatives too, from neg_text and neg_image_path
    (any number, for the whole row).
    """

    def __init__(self, pattern: str, images: str, key: str = "data.train", *, negatives: bool = False) -> None:
        self.key, self.negatives = key, negatives
        self.files = data_files(pattern, key)
        self.images = picture_folder(images, pattern)
        if not sum(_checked_rows(path) for path in self.files):
            raise UserError(f"{self.files[0]}: holds no rows: set {key} to a parquet file with data")
        self._dataset = memory_mapped(self.files)

    def __len__(self) -> int:
        return len(self._dataset)

    def record(self, row: int) -> Record:
        """The row as a Record. Raises RowError when it can't be used."""
        return self._record(row, plain_row(self._dataset, row))

    def tables(self) -> Iterator[pa.Table]:
        """All rows with all their columns, a thousand at a time."""
        for start in range(0, len(self), _CONVERTED_ROWS):
            yield self._dataset[start : start + _CONVERTED_ROWS].replace_schema_metadata(None)

    def _record(self, row: int, data: dict[str, Any]) -> Record:
        questions, targets = data["qry"], data["pos_text"]
        questions = [questions] if isinstance(questions, str) else questions
        targets = [targets] if isinstance(targets, str) else targets
        if not questions or not targets:
            raise RowError("no turns: qry or pos_text is empty")
        if len(questions) != len(targets):
            raise RowError(f"qry has {len(questions)} turns but pos_text has {len(targets)}")
        if len(questions) > TURNS_PER_SAMPLE:
            raise RowError(f"{len(questions)} turns; at most {TURNS_PER_SAMPLE} are supported")
        query_images = self._paths(data["qry_image_path"])
        target_images = self._paths(data.get("pos_image_path"))
        turns = tuple(
            self._turn(j, question, target, bool(query_images), bool(target_images))
            for j, (question, target) in enumerate(zip(questions, targets, strict=True))
        )
        return Record(row, turns, query_images, target_images, self._negatives(data) if self.negatives else ())

    def _turn(self, j: int, question: Any, target: Any, has_query_image: bool, has_target_image: bool) -> RecordTurn:
        paraphrases = [question] if isinstance(question, str) else list(question or [])
        cleaned = tuple(_clean(text) for text in paraphrases if isinstance(text, str))
        # An empty question is fine when the picture is the question; among other paraphrases it is a hole.
        cleaned = tuple(text for text in cleaned if text) or (cleaned[:1] if has_query_image else ())
        if not cleaned:
            raise RowError(f"turn {j} has neither a question nor a picture")
        text = _clean(target) if isinstance(target, str) else ""
        if not text and not has_target_image:
            raise RowError(f"turn {j} has an empty target")
        return RecordTurn(cleaned, text, kind=j)

    def _negatives(self, data: dict[str, Any]) -> tuple[Negative, ...]:
        """Texts and pictures by their places; '' = none, and the last picture serves where there are fewer of them."""
        texts, paths = (_listed(data.get(name), name) for name in ("neg_text", "neg_image_path"))
        negatives = []
        for i in range(max(len(texts), len(paths))):
            text = _clean(texts[i]) if i < len(texts) else ""
            images = self._paths(paths[min(i, len(paths) - 1)]) if paths else ()
            if text or images:
                negatives.append(Negative(text, images))
        return tuple(negatives)

    def _paths(self, value: Any) -> tuple[str, ...]:
        return picture_paths(value, self.images)


class PairReader(M3TReader):
    """Single pairs in the columns of TIGER-Lab/MMEB-train or of M3T's MMEB folder, with captions where there are any.

    qry_sentence and pos_sentence describe the pictures of the query and of the target.
    """

    def _record(self, row: int, data: dict[str, Any]) -> Record:
        record = super()._record(row, data)
        if len(record.turns) != 1 or len(record.turns[0].questions) != 1:
            raise RowError(f"{len(record.turns)} turns, or paraphrases: fine-tuning takes single pairs")
        return replace(record, captions=(caption_of(data.get("qry_sentence")), caption_of(data.get("pos_sentence"))))


def caption_of(value: Any) -> str:
    """The caption in a column that holds one, or a list of them; '' where there is none."""
    first = value[0] if isinstance(value, list) and value else value
    return _clean(first) if isinstance(first, str) else ""


def _strings(value: Any, what: str) -> list[str]:
    """A column's one text or its list of them. Raises RowError for anything else."""
    texts = [value] if isinstance(value, str) else value or []
    if not isinstance(texts, list) or not all(isinstance(text, str | None) for text in texts):
        raise RowError(f"{value!r} is not {what} or a list of them")
    return [text or "" for text in texts]


def _clean(text: str) -> str:
    return _IMAGE_MARKER.sub("", text).strip()


def _listed(value: Any, column: str) -> list[str]:
    """The texts of a column that holds one, a list of them, or such a list written as a Python literal."""
    if isinstance(value, str):
        literal = value.strip()
        if not (literal.startswith("[") and literal.endswith("]")):
            return [value]
        try:
            value = ast.literal_eval(literal)
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise RowError(
                f"{column} is a list literal that does not parse: {textwrap.shorten(literal, 60)}"
            ) from error
    texts: list[str] = []
    if value is not None and not isinstance(value, list | tuple):
        raise RowError(f"{column} holds {value!r}: it may hold texts only")
    for item in value or []:
        if isinstance(item, list | tuple):  # a list for each turn
            texts += _listed(item, column)
        elif isinstance(item, str) or item is None:
            texts.append(item or "")
        else:
            raise RowError(f"{column} holds {item!r}: it may hold texts only")
    return texts


def parquet_facts(path: str) -> tuple[int, pa.Schema]:
    """Rows and columns of a parquet file. Raises UserError naming the file when it is none."""
    try:
        with pq.ParquetFile(path) as file:
            return file.metadata.num_rows, file.schema_arrow
    except Exception as error:  # the parquet library raises several kinds on broken files
        cause = (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"{path}: can't be read as parquet ({cause}): was it written completely?") from error


def _checked_rows(path: str) -> int:
    """Rows of a parquet file. Raises UserError naming the file when it is none, or not with M3T's columns."""
    rows, schema = parquet_facts(path)
    for name in M3T_COLUMNS:
        if name not in schema.names:
            raise UserError(
                f"{path}: column '{name}' is missing (found: {', '.join(schema.names)}): "
                f"M3T rows need {', '.join(M3T_COLUMNS)}"
            )
        kind = schema.field(name).type
        if not any(word in str(kind) for word in ("string", "list", "null")):
            raise UserError(f"{path}: column '{name}' holds {kind}: M3T rows need text or lists of texts there")
    return rows


def memory_mapped(files: list[str]) -> Dataset:
    """Rows of parquet files with the same columns, kept on disk, in Arrow's format. Raises UserError naming a file."""
    disable_progress_bars()
    try:
        # M3T is one row group of gigabytes, which would otherwise be held at once.
        rows = load_dataset(
            "parquet", data_files=files, split="train", batch_size=_CONVERTED_ROWS, fragment_scan_options=_CHECKED
        )
        return rows.with_format("arrow")
    except Exception as error:  # datasets wraps whatever the parquet library says
        cause = (str(error.__cause__ or error).strip().splitlines() or [""])[0]
        raise UserError(f"{files[0]}: can't be read as parquet ({cause}): was it written completely?") from error


def plain_row(rows: Dataset, row: int) -> dict[str, Any]:
    """A row of `memory_mapped` as it is stored. In its own format, `datasets` would open what a file declares to be a
    picture or a sound, by all of Pillow's decoders, from whatever path or address it names."""
    return rows[row].to_pylist()[0]
