"""The length index: what the plan must know of every row, built once, memory-mapped afterwards.

For each usable row: sizes of its pictures (from headers), token counts of its texts, ids of its pictures and targets,
and the same of its hard negatives where the reader reads them.
Rows that can't be used are listed with their reason in `bad_rows.jsonl` and never enter a plan. The folder is named by
a fingerprint of everything it depends on, so changed inputs mean another folder, and it appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from tqdm import tqdm

from muco_ds.data.images import ImageError, ImagePipeline, read_size
from muco_ds.data.readers import RowError, SourceReader
from muco_ds.data.schema import Record
from muco_ds.data.templates import ChatTemplate
from muco_ds.errors import UserError

VERSION = 7
CHUNK_ROWS = 256
_VISIBLE_WITHIN_S = 60.0  # network file systems may show a new folder late

SAMPLE = np.dtype(
    [
        ("row", "i8"),
        ("turn_end", "i8"),  # end of this sample's slice of `turns`
        ("negative_end", "i8"),  # end of this sample's slice of `negatives`
        ("query_word_end", "i8"),  # end of the query's words in this sample's slice of `words`
        ("target_word_end", "i8"),  # end of the target's, and of the slice
        ("image_id", "i8"),
        ("query_images", "i4"),
        ("query_image_tokens", "i4"),
        ("target_images", "i4"),
        ("target_image_tokens", "i4"),
        ("context_tokens", "i4"),  # of `Record.context`
        ("patches", "i8"),  # vision tower input, both sides
        ("patches_squared", "i8"),  # sum over pictures of patches^2: the vision tower's attention
    ]
)
TURN = np.dtype([("target_tokens", "i4"), ("target_hash", "i8"), ("question_end", "i8"), ("kind", "i4")])
QUESTION = np.dtype("i4")  # tokens of each paraphrase
NEGATIVE = np.dtype(
    [
        ("tokens", "i4"),
        ("target_hash", "i8"),
        ("images", "i4"),
        ("image_tokens", "i4"),
        ("patches", "i8"),
        ("patches_squared", "i8"),
    ]
)
WORD = np.dtype("i4")  # tokens of each word of `Record.restated`, where the reader reads captions
TABLES = {"samples": SAMPLE, "turns": TURN, "questions": QUESTION, "negatives": NEGATIVE, "words": WORD}
_WORD_ENDS = {"query_word_end": "words", "target_word_end": "words"}
_ENDS = {
    "samples": {"turn_end": "turns", "negative_end": "negatives", **_WORD_ENDS},
    "turns": {"question_end": "questions"},
}


@dataclass(frozen=True)
class Part:
    """Samples of one data set within an index: up to `end`, from row number `first_row`; `key` names it in messages."""

    key: str
    end: int
    first_row: int


@dataclass(frozen=True)
class Index:
    """Memory-mapped arrays, S samples, of one data set or of several (`parts`), one after the other."""

    folder: Path
    samples: np.ndarray
    turns: np.ndarray
    question_tokens: np.ndarray
    bad_rows: int
    uncaptioned: int  # rows with a picture that has no caption, where the reader reads captions
    identity: str  # of this build: another one of the same inputs may hold other pictures
    parts: tuple[Part, ...]
    negatives: np.ndarray = field(default_factory=lambda: np.empty(0, NEGATIVE))
    word_tokens: np.ndarray = field(default_factory=lambda: np.empty(0, WORD))

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, sample: int) -> str:
        """A sample's data set and row, for messages."""
        part = next(part for part in self.parts if sample < part.end)
        return f"{part.key} row {self.samples['row'][sample] - part.first_row}"

    def turn_bounds(self, sample: int) -> tuple[int, int]:
        """Slice of `turns` that belongs to a sample."""
        start = int(self.samples["turn_end"][sample - 1]) if sample else 0
        return start, int(self.samples["turn_end"][sample])

    def negative_bounds(self, sample: int) -> tuple[int, int]:
        """Slice of `negatives` that belongs to a sample."""
        start = int(self.samples["negative_end"][sample - 1]) if sample else 0
        return start, int(self.samples["negative_end"][sample])

    def tables(self) -> dict[str, np.ndarray]:
        """All arrays, by the names of TABLES."""
        arrays = (self.samples, self.turns, self.question_tokens, self.negatives, self.word_tokens)
        return dict(zip(TABLES, arrays, strict=True))

    def question_bounds(self, turn: int) -> tuple[int, int]:
        """Slice of `question_tokens` that belongs to a turn."""
        start = int(self.turns["question_end"][turn - 1]) if turn else 0
        return start, int(self.turns["question_end"][turn])


@dataclass(frozen=True)
class Measured:
    """What is known of a range of rows: arrays as in Index, by the names of TABLES, and the rows that can't be used.

    `uncaptioned` counts usable rows with a picture that has no caption, where the reader reads captions.
    """

    tables: dict[str, np.ndarray]
    bad: list[dict]
    uncaptioned: int


class TableWriter:
    """Appends parts of tables to the files of an index; what are ends within a part become ends within the whole."""

    def __init__(self, folder: Path) -> None:
        self._files = {name: open(folder / f"{name}.bin", "wb") for name in TABLES}  # noqa: SIM115 - closed on exit
        self._rows = dict.fromkeys(TABLES, 0)
        self._before = dict(self._rows)

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(self, *_error: object) -> None:
        for file in self._files.values():
            file.close()

    def begin_part(self) -> None:
        """Ends in what is appended next count from here."""
        self._before = dict(self._rows)

    def append(self, name: str, values: np.ndarray) -> None:
        """Append rows of a table; changes the ends in `values`."""
        for column, table in _ENDS.get(name, {}).items():
            values[column] += self._before[table]
        values.tofile(self._files[name])
        self._rows[name] += len(values)


class Indexer:
    """Measures rows of a data set; picklable, so that several processes share the work."""

    def __init__(self, reader: SourceReader, template: ChatTemplate, images: ImagePipeline) -> None:
        self.reader, self.template, self.images = reader, template, images

    def fingerprint(self) -> str:
        """Changes when the files, the picture folder, the tokenizer, the template or the picture limits change."""
        stats = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in self.reader.files]
        tokenizer = hashlib.sha256(self.template.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
        limits = [self.images.limits, self.images.patch_size, self.images.merge_size]
        read = [type(self.reader).__name__, self.reader.images, self.reader.negatives]
        facts = repr([VERSION, stats, *read, tokenizer, self.template.opening, self.template.tail, limits])
        return hashlib.sha256(facts.encode()).hexdigest()[:20]

    def measure(self, rows: range) -> Measured:
        """Measure some rows; ends count from the first of them."""
        rows_of: dict[str, list] = {name: [] for name in TABLES}
        bad: list[dict] = []
        uncaptioned = 0
        for row in rows:
            try:
                record = self.reader.record(row)
                self._add(row, record, rows_of)
                uncaptioned += record.lacks_caption
            except (RowError, ImageError) as error:
                bad.append({"row": row, "reason": str(error)})
        return Measured({name: np.array(rows_of[name], dtype) for name, dtype in TABLES.items()}, bad, uncaptioned)

    def _add(self, row: int, record: Record, rows_of: dict[str, list]) -> None:
        """Add a record's rows to all tables, or to none where a picture can't be used."""
        query, target = (self._pictures(paths) for paths in (record.query_images, record.target_images))
        pictures = [self._pictures(negative.images, "negative ") for negative in record.negatives]
        texts = [text for turn in record.turns for text in (*turn.questions, turn.target)]
        texts += [*(negative.text for negative in record.negatives), record.context]
        tokens = iter([len(ids) for ids in self.template.encode_texts(texts)])
        for turn in record.turns:
            rows_of["questions"] += [next(tokens) for _ in turn.questions]
            hashed = target_hash(turn.target, record.target_images)
            rows_of["turns"].append((next(tokens), hashed, len(rows_of["questions"]), turn.kind))
        for negative, picture in zip(record.negatives, pictures, strict=True):
            rows_of["negatives"].append((next(tokens), target_hash(negative.text, negative.images), *picture))
        word_ends = []
        for text in ("", "") if record.captions is None else record.restated():
            rows_of["words"] += [len(ids) for ids in self.template.encode_words(text)]
            word_ends.append(len(rows_of["words"]))
        ends = len(rows_of["turns"]), len(rows_of["negatives"]), *word_ends
        patches = (query[2] + target[2], query[3] + target[3])
        rows_of["samples"].append((row, *ends, image_id(record), *query[:2], *target[:2], next(tokens), *patches))

    def _pictures(self, paths: Sequence[str], whose: str = "") -> tuple[int, int, int, int]:
        """Number, tokens, patches and sum of squared patches of some pictures."""
        tokens = patches = squared = 0
        for path in paths:
            try:
                grid = self.images.grid(*read_size(path))
            except ImageError as error:
                raise ImageError(f"{whose}picture {path}: {error}") from error
            size = grid[0] * grid[1] * grid[2]
            patches, squared = patches + size, squared + size * size
            tokens += self.images.tokens(grid)
        return len(paths), tokens, patches, squared


def stable_hash(text: str) -> int:
    """63-bit hash that is the same on every machine and Python."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def image_id(record: Record) -> int:
    """Same pictures on the query side, same id; a text-only row is its own."""
    return stable_hash("\n".join(record.query_images) if record.query_images else f"row {record.row}")


def target_hash(text: str, images: tuple[str, ...]) -> int:
    """Same for targets that differ only in case or white space: they can't be negatives of one another."""
    return stable_hash("\n".join((" ".join(text.split()).casefold(), *images)))


def index_path(indexer: Indexer, folder: str | None) -> Path:
    """Where the index of a data set lies, built or not; `folder` as in `open_index`."""
    home = Path(folder) if folder else Path(indexer.reader.files[0]).parent / ".muco_index"
    return home / indexer.fingerprint()


def open_index(
    indexer: Indexer, folder: str | None, *, builder: bool, processes: int = 1, progress: bool = True
) -> Index:
    """The index of a data set. The process whose `builder` is True builds it if it is not there; call it there first.

    Args:
        folder: where indices live; default `.muco_index` beside the first data file.
    Raises:
        UserError: no row is usable, the folder can't be written, or what was built is not seen here.
    """
    path = index_path(indexer, folder)
    if builder and not (path / "meta.json").exists():
        with writing_index(path):
            _build(indexer, path, processes, progress)
    index = load_index(seen_index(path))
    if not len(index):
        with open(path / "bad_rows.jsonl") as file:
            first = json.loads(file.readline())
        raise UserError(
            f"{indexer.reader.files[0]}: no usable row; row {first['row']}: {first['reason']}: "
            "mend the rows or pictures, then run tools/index_data.py with --rebuild"
        )
    return replace(index, parts=(Part(indexer.reader.key, len(index), 0),))


@contextmanager
def writing_index(path: Path) -> Iterator[None]:
    """Raises UserError where the folder that is to hold an index can't be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        cure = "set data.index_dir"
        raise UserError(f"{path.parent}: can't write the length index there ({error.strerror}): {cure}") from error


def _build(indexer: Indexer, path: Path, processes: int, progress: bool) -> None:
    work = path.with_name(f"{path.name}.tmp{os.getpid()}")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    total = len(indexer.reader)
    chunks = [range(start, min(start + CHUNK_ROWS, total)) for start in range(0, total, CHUNK_ROWS)]
    usable = bad_rows = uncaptioned = 0
    with (
        TableWriter(work) as writer,
        open(work / "bad_rows.jsonl", "w") as bad_file,
        tqdm(total=total, desc="indexing", unit="row", disable=not progress) as bar,
    ):
        for chunk, part in zip(chunks, _measure_all(indexer, chunks, processes), strict=True):
            writer.begin_part()
            for name, values in part.tables.items():
                writer.append(name, values)
            bad_file.writelines(json.dumps(entry) + "\n" for entry in part.bad)
            usable, bad_rows = usable + len(part.tables["samples"]), bad_rows + len(part.bad)
            uncaptioned += part.uncaptioned
            bar.update(len(chunk))
    facts = {"files": indexer.reader.files, "rows": total}
    publish_index(work, path, **facts, usable=usable, bad_rows=bad_rows, uncaptioned=uncaptioned)


def publish_index(work: Path, path: Path, **facts: Any) -> None:
    """Make a folder of arrays an index, whole or not at all.

    `facts`: files, rows, usable, bad_rows, uncaptioned, and more.
    """
    meta = {"version": VERSION, "identity": uuid4().hex, **facts}
    (work / "meta.json").write_text(json.dumps(meta, indent=2))
    try:
        work.rename(path)
    except OSError:  # another job built the same index meanwhile
        shutil.rmtree(work, ignore_errors=True)


def seen_index(path: Path) -> Path:
    """The path, once the index that rank 0 published there is seen by this machine. Raises UserError if it never is."""
    deadline = time.monotonic() + _VISIBLE_WITHIN_S
    while not (path / "meta.json").exists():
        if time.monotonic() > deadline:
            raise UserError(
                f"{path}: the length index built by rank 0 is not visible here: put the data, or data.index_dir, "
                "on a file system that all machines share"
            )
        time.sleep(0.2)
    return path


def load_index(path: Path) -> Index:
    """The published index in a folder; its parts are for the caller to name. Raises UserError for a damaged one."""
    try:
        meta = json.loads((path / "meta.json").read_text())
        counts, identity = (int(meta["bad_rows"]), int(meta["uncaptioned"])), str(meta["identity"])
        files = {name: path / f"{name}.bin" for name in TABLES}
        tables = {
            name: np.memmap(files[name], dtype, "r") if files[name].stat().st_size else np.empty(0, dtype)
            for name, dtype in TABLES.items()
        }
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    for name, ends in _ENDS.items():
        for column, table in ends.items():
            last = int(tables[name][column][-1]) if len(tables[name]) else 0
            if column != "query_word_end" and last != len(tables[table]):
                raise _damaged(path, f"{name} and {table} do not fit")
    samples, turns, questions, negatives, words = tables.values()
    return Index(path, samples, turns, questions, *counts, identity, (), negatives, words)


def _damaged(path: Path, problem: str) -> UserError:
    problem = " ".join(problem.split())
    return UserError(f"{path}: the length index is damaged ({problem}): remove the folder, and the next start makes it")


def _measure_all(indexer: Indexer, chunks: list[range], processes: int) -> Iterator[Measured]:
    """Measured chunks in order. A few are in flight at a time: results must not pile up when writing is slower."""
    if processes <= 1:
        yield from map(indexer.measure, chunks)
        return
    with ProcessPoolExecutor(processes, get_context("fork"), initializer=_adopt, initargs=(indexer.measure,)) as pool:
        running: deque[Future[Measured]] = deque()
        for chunk in chunks:
            running.append(pool.submit(_run, chunk))
            if len(running) >= 4 * processes:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


_measure: Callable[[range], Measured]


def _adopt(measure: Callable[[range], Measured]) -> None:
    global _measure
    _measure = measure


def _run(rows: range) -> Measured:
    return _measure(rows)
