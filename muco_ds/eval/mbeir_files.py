"""Files of M-BEIR (TIGER-Lab/M-BEIR): queries, candidate pools, relevance, instructions; as UniIR's code reads them.

A pool of millions of lines is never held: where each line starts, and its id as a number.

Shape suffixes: C candidates of a pool, M candidates of a selection, P pairs of a query and a right candidate.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from muco_ds.data.readers import RowError, picture_paths
from muco_ds.data.schema import Dialogue
from muco_ds.errors import UserError
from muco_ds.files import file_facts

_DATASETS = 1000
_IDS = 10_000_000
"""Of one data set, at most. UniIR counts queries by 500,000; one rule serves both here."""


def formatted(text: str | None) -> str:
    """UniIR's format_string: no carriage returns, white space and double quotes off the ends, a capital, a stop."""
    text = (text or "").replace("\r", "").strip().strip('"')
    if not text:
        return ""
    text = text[0].upper() + text[1:]
    return text if text[-1] in ".?!" else text + "."


def modality(spelling: str) -> str:
    """ "image,text" and "text,image" are one."""
    return ",".join(sorted(part.strip() for part in spelling.split(",")))


def number_of(name: str | dict[str, str]) -> int:
    """A query's or candidate's id as a number: "4:17" or {"did": "4:17"} -> 4 * 10,000,000 + 17. Raises ValueError."""
    name = name["did"] if isinstance(name, dict) else name
    if not isinstance(name, str):
        raise ValueError(f"{name!r} is no id such as '4:17'")
    dataset, number = map(int, name.split(":"))
    if not 0 <= dataset < _DATASETS or not 0 <= number < _IDS:
        raise ValueError(f"{name!r} is no id: its numbers are not under {_DATASETS} and {_IDS}")
    return dataset * _IDS + number


@dataclass(frozen=True)
class Query:
    """A line of a query file."""

    number: int
    text: str | None
    images: tuple[str, ...]
    modality: str
    positives: tuple[int, ...]  # of its own data set
    where: str

    @property
    def dataset(self) -> int:
        return self.number // _IDS


def read_queries(path: Path, images: str, limit: int | None) -> list[Query]:
    """All queries of a file, or the first `limit`. Raises UserError, naming the line."""
    queries: list[Query] = []
    for where, line in _lines(path):
        if limit is not None and len(queries) == limit:
            break
        item = _parsed(line, where)
        try:
            number = number_of(item["qid"])
            positives = tuple(number_of(did) for did in item.get("pos_cand_list") or ())
            own = tuple(did for did in positives if did // _IDS == number // _IDS)
            text, kind = _text(item, "query_txt"), modality(item["query_modality"])
            queries.append(Query(number, text, _images(item, "query_img_path", images), kind, own, where))
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{where}: {_said(error)}") from error
    if not queries:
        raise UserError(f"{path}: is empty: download it again")
    return queries


@dataclass(frozen=True)
class Relevance:
    """Right candidates of queries, by their numbers: int64 [P] each; where the first line with each pair stands."""

    path: Path
    query_P: np.ndarray
    candidate_P: np.ndarray
    line_P: np.ndarray


def read_relevance(path: Path) -> Relevance:
    """Pairs of a qrels file, `qid 0 did score task`, with a score above zero. Raises UserError, naming the line."""
    rows = []
    for number, (where, line) in enumerate(_lines(path), 1):
        try:
            qid, _, did, score, *_ = line.decode().split()
            if int(score) > 0:
                rows.append((number_of(qid), number_of(did), number))
        except ValueError as error:
            raise UserError(f"{where}: {error}: a line is `qid 0 did 1 task`") from error
    if not rows:
        raise UserError(f"{path}: is empty: download it again")
    return Relevance(path, *np.array(rows, np.int64).T)


def read_instructions(path: Path) -> dict[tuple[int, str, str], list[str]]:
    """(data set, query modality, candidate modality) -> prompts. Raises UserError, naming the line."""
    prompts = {}
    for where, line in list(_lines(path))[1:]:
        try:
            query, candidate, _, dataset, *texts = line.decode().strip().split("\t")
            prompts[int(dataset), modality(query), modality(candidate)] = [text for text in texts if text]
        except ValueError as error:
            raise UserError(f"{where}: {error}: columns are two modalities, a name, an id, prompts") from error
    if not prompts:
        raise UserError(f"{path}: is empty: download it again")
    return prompts


@dataclass(frozen=True)
class PoolFile:
    """Candidates of a pool: each line's first byte and length, and its id."""

    path: Path
    images: str
    start_C: np.ndarray  # int64
    size_C: np.ndarray  # int64
    number_C: np.ndarray  # int64
    digest: str
    facts: tuple[str, int, int]

    @classmethod
    def scan(cls, path: Path, images: str, *, progress: bool) -> PoolFile:
        """Read a file once. Raises UserError, naming a line that is no candidate."""
        parts: list[np.ndarray] = []
        rows: list[tuple[int, int, int]] = []
        digest = hashlib.blake2b(digest_size=16)
        start = 0
        facts = file_facts(path)
        total = facts[1]
        try:
            with (
                open(path, "rb") as file,
                tqdm(total=total, desc=path.name, unit="B", unit_scale=True, disable=not progress) as bar,
            ):
                for number, line in enumerate(file, 1):
                    digest.update(line)
                    if not line.isspace():
                        rows.append((start, len(line), _did(line, path, number)))
                    start += len(line)
                    if len(rows) >= 65536:  # as tuples they take ten times the memory
                        parts.append(np.array(rows, np.int64))
                        rows = []
                        bar.update(start - bar.n)
                bar.update(start - bar.n)
        except OSError as error:
            raise UserError(f"'{path}' can't be read ({error.strerror})") from error
        parts.append(np.array(rows, np.int64).reshape(-1, 3))
        table_C3 = np.concatenate(parts)
        if not len(table_C3):
            raise UserError(f"{path}: is empty: download it again")
        start_C, size_C, number_C = map(np.ascontiguousarray, table_C3.T)
        return cls(path, images, start_C, size_C, number_C, digest.hexdigest(), facts)

    def __len__(self) -> int:
        return len(self.start_C)

    @cached_property
    def _order(self) -> np.ndarray:
        return np.argsort(self.number_C, kind="stable")

    def find(self, number: int) -> int | None:
        """A candidate's place in the file, the first one; None where it is not."""
        place = int(np.searchsorted(self.number_C, number, sorter=self._order))
        row = int(self._order[min(place, len(self) - 1)])
        return row if self.number_C[row] == number else None

    def modality(self, row: int) -> str:
        """Of a candidate. Raises UserError, naming it."""
        item = next(self.items([row]))
        try:
            return modality(item["modality"])
        except (KeyError, AttributeError) as error:
            raise UserError(f"{self.path}: candidate {item['did']!r}: {_said(error)}") from error

    def items(self, rows: Sequence[int] | np.ndarray) -> Iterator[dict[str, Any]]:
        """Lines of the file, in any order. Raises UserError where it is not the file any more that was scanned."""
        if file_facts(self.path) != self.facts:
            raise UserError(f"{self.path}: has changed since it was read: start again")
        with open(self.path, "rb") as file:
            for row in map(int, rows):
                yield json.loads(os.pread(file.fileno(), int(self.size_C[row]), int(self.start_C[row])))


@dataclass(frozen=True)
class Candidates:
    """Source: some candidates of a pool, in the file's order, each a dialogue of one turn without an instruction."""

    pool: PoolFile
    row_M: np.ndarray  # int64, ascending

    @classmethod
    def all(cls, pool: PoolFile) -> Candidates:
        return cls(pool, np.arange(len(pool)))

    @property
    def rows(self) -> int:
        return len(self.row_M)

    def __len__(self) -> int:
        return len(self.row_M)

    @property
    def number_M(self) -> np.ndarray:
        """Their ids: int64."""
        return self.pool.number_C[self.row_M]

    @property
    def key(self) -> str:
        """Equal where the dialogues are."""
        rows = hashlib.blake2b(self.row_M.tobytes(), digest_size=16).hexdigest()
        return json.dumps([self.pool.digest, self.pool.images, rows])

    def name(self, line: int) -> str:
        """A candidate, for messages."""
        number = int(self.number_M[line])
        return f"{self.pool.path}: candidate '{number // _IDS}:{number % _IDS}'"

    def dialogues(self, start: int, stop: int) -> list[Dialogue]:
        """Those of candidates start .. stop. Raises UserError, naming the candidate."""
        found = []
        for line, item in enumerate(self.pool.items(self.row_M[start:stop]), start):
            try:
                text, images = formatted(_text(item, "txt")), _images(item, "img_path", self.pool.images)
            except ValueError as error:
                raise UserError(f"{self.name(line)}: {error}") from error
            found.append(Dialogue((text,), images))
        return found


def _did(line: bytes, path: Path, number: int) -> int:
    where = f"{path}: line {number}"
    item = _parsed(line, where)
    try:
        return number_of(item["did"])
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: {_said(error)}") from error


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Lines that are not blank, with a name for messages."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    yield f"{path}: line {number}", line
    except OSError as error:
        raise UserError(f"'{path}' can't be read ({error.strerror})") from error


def _parsed(line: bytes, where: str) -> dict[str, Any]:
    try:
        item = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is no JSON ({error}): download the file again") from error
    if not isinstance(item, dict):
        raise UserError(f"{where}: holds no object: download the file again")
    return item


def _text(item: dict[str, Any], key: str) -> str | None:
    text = item.get(key)
    if not isinstance(text, str | None):
        raise ValueError(f"{key} is {text!r}: it must be a text or null")
    return text


def _images(item: dict[str, Any], key: str, images: str) -> tuple[str, ...]:
    path = _text(item, key)
    try:
        return picture_paths(path, images)
    except RowError as error:
        raise ValueError(f"{key} leaves '{images}': {path!r}") from error


def _said(error: Exception) -> str:
    return f"has no {error}" if isinstance(error, KeyError) else str(error)
