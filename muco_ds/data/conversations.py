"""Conversations about pictures or texts: CoMa's JSON lines in both their spellings, and ordinary chat-style rows.

Row: `conversations`, `messages` or `message`, a list of {"from": "human" | "gpt", "value": TEXT} or of
{"role": "user" | "assistant", "content": TEXT or a list of text and image parts}; `image` or `images`, a path or a list
of them; `compression`, an object (or one written as a JSON string) whose `query` is text to be compressed beside the
pictures or in their place. What else a row holds, an `id` too, is not read. (FORMATS of the public data: the CoMa
repository's llava_instruct parser and its data_prepare scripts.)

Shape suffix: R rows.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import textwrap
from array import array
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from io import FileIO
from itertools import accumulate
from typing import Any

import numpy as np
from datasets import Dataset

from muco_ds.data import draws
from muco_ds.data.readers import (
    RowError,
    data_files,
    memory_mapped,
    parquet_facts,
    picture_folder,
    picture_paths,
    plain_row,
)
from muco_ds.data.schema import TURNS_PER_SAMPLE, Record, RecordTurn
from muco_ds.errors import UserError

SUFFIXES = (".jsonl", ".parquet")
"""Files of conversations in a folder. A file that is named itself may be called anything, and holds JSON lines then."""

ENTRIES = ("conversations", "messages", "message")
_QUESTION, _ANSWER = ("human", "user"), ("gpt", "assistant")
_MARKER = "<image>"
_MARKERS = re.compile(rf"{_MARKER}\n?")
_BLANK = b"\xef\xbb\xbf \t\r\n"


class ConversationReader:
    """Rows of .jsonl and .parquet files, those of JSON lines first; each conversation is one record, each pair a turn.

    Pictures always come first, so their markers are only counted and removed. A JSON line is read when it is asked for;
    in memory are eight bytes for each. Arguments as of M3TReader; conversations have no hard negatives.
    """

    def __init__(self, pattern: str, images: str, key: str = "data.train") -> None:
        self.key, self.negatives = key, False  # a row has none that are hard
        files = data_files(pattern, key, SUFFIXES)
        tables = [path for path in files if path.endswith(".parquet")]
        lines = [path for path in files if path not in tables]
        self.files = [*lines, *tables]
        self.images = picture_folder(images, pattern)
        self._parts: list[_Lines | Dataset] = [_Lines(path) for path in lines]
        if filled := [path for path in tables if _checked_rows(path)]:
            self._parts.append(memory_mapped(filled))
        self._ends = list(accumulate(map(len, self._parts)))
        if not len(self):
            raise UserError(f"{self.files[0]}: holds no rows: set {key} to a file of conversations")

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def record(self, row: int) -> Record:
        """The row as a Record. Raises RowError when it can't be used."""
        which = bisect_right(self._ends, row)
        part, place = self._parts[which], row - (self._ends[which - 1] if which else 0)
        data = part[place] if isinstance(part, _Lines) else plain_row(part, place)
        entries = _value(data, *ENTRIES)
        if not isinstance(entries, list) or not entries:
            raise RowError(f"no list of turns under any of {', '.join(ENTRIES)} (found: {', '.join(data)})")
        texts, markers, named = _texts(entries)
        context, compressed_image = _compression(data.get("compression"))
        images = next(filter(None, (data.get("image"), data.get("images"), named, compressed_image)), None)
        paths = picture_paths(images, self.images)
        markers += context.count(_MARKER)
        if markers > len(paths):
            raise RowError(f"{markers} {_MARKER} markers but {len(paths)} pictures")
        context = _clean(context)
        if not paths and not context:
            raise RowError("nothing to compress: neither a picture nor a query under compression")
        return Record(row, _turns(texts), paths, context=context)


class _Lines:
    """Objects in a file of JSON lines. Forked processes may share one: it has no position in the file."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._file: FileIO | None = None
        starts, end = array("q"), 0
        try:
            with open(path, "rb") as file:
                # First, because an array may be one line of gigabytes.
                if file.read(4096).lstrip(_BLANK).startswith(b"["):
                    cure = f"jq -c '.[]' {shlex.quote(path)} > {shlex.quote(path + '.jsonl')}"
                    raise UserError(f"{path}: is a JSON array, not JSON lines: make some with `{cure}`")
                file.seek(0)
                for line in file:
                    if line.strip(_BLANK):
                        starts.append(end)
                    end += len(line)
        except OSError as error:
            raise UserError(f"{path}: can't be read ({error.strerror}): give a file of JSON lines") from error
        starts.append(end)
        self._starts_R1 = np.array(starts, np.int64)

    def __len__(self) -> int:
        return len(self._starts_R1) - 1

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def __getitem__(self, row: int) -> dict[str, Any]:
        self._file = self._file or FileIO(self._path)
        start, end = self._starts_R1[row : row + 2].tolist()
        line = os.pread(self._file.fileno(), end - start, start)
        try:
            data = _parsed(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise RowError(f"no JSON ({error}): {_shown(line)}") from error
        if not isinstance(data, dict):
            raise RowError(f"no JSON object: {_shown(line)}")
        return data


def conversation(row: int, turns: Sequence[RecordTurn], images: Sequence[str]) -> dict[str, Any]:
    """A row in CoMa's spelling, of questions and answers about pictures.

    Which paraphrase of a question is asked is drawn by row and turn. Turns without words on one side are left out.
    `images` are the paths to be written. Raises RowError where nothing is left, or where there is no picture.
    """
    if not images:
        raise RowError("no picture to ask about")
    drawn_k = draws.draw_u64(0, 0, np.array([row]), draws.PARAPHRASE, np.arange(len(turns)))
    entries = []
    for turn, drawn in zip(turns, drawn_k.tolist(), strict=True):
        question, answer = _clean(turn.questions[drawn % len(turn.questions)]), _clean(turn.target)
        if question and answer:
            entries += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    if not entries:
        raise RowError("no turn has words on both sides")
    entries[0]["value"] = f"{_MARKER}\n" * len(images) + entries[0]["value"]
    return {"id": row, "image": images[0] if len(images) == 1 else list(images), "conversations": entries}


def _checked_rows(path: str) -> int:
    """Rows of a parquet file. Raises UserError naming the file when it is none, or has no column of conversations."""
    rows, schema = parquet_facts(path)
    if not any(name in schema.names for name in ENTRIES):
        raise UserError(
            f"{path}: has no column of conversations (found: {', '.join(schema.names)}): "
            f"name it {ENTRIES[0]}, or one of {', '.join(ENTRIES[1:])}"
        )
    return rows


def _texts(entries: list[Any]) -> tuple[list[str], int, list[str]]:
    """Texts of a conversation with their picture markers, the number of these, and paths that image parts name."""
    if len(entries) > 2 * TURNS_PER_SAMPLE:
        raise RowError(f"{len(entries) // 2} turns; at most {TURNS_PER_SAMPLE} are supported")
    texts: list[str] = []
    markers, named = 0, []
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise RowError(f"entry {i} is {_shown(repr(entry))}, not a role with its text")
        role = _value(entry, "from", "role")
        if role == "system":
            raise RowError(f"entry {i} is a system message: remove it")
        if role not in (_ANSWER if i % 2 else _QUESTION):
            wanted = "an answer (gpt or assistant)" if i % 2 else "a question (human or user)"
            raise RowError(f"entry {i} is from {role!r} where {wanted} is due")
        text, paths = _content(i, _value(entry, "value", "content"))
        texts.append(text)
        markers += text.count(_MARKER)
        named += paths
    if len(texts) % 2:
        raise RowError(f"entry {len(texts) - 1}, a question, has no answer")
    return texts, markers, named


def _content(i: int, content: Any) -> tuple[str, list[str]]:
    """Text of an entry, a marker for each image part, and the paths that those parts name."""
    texts, paths = [], []
    for part in content if isinstance(content, list) else [{"type": "text", "text": content}]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image":
            texts.append(_MARKER)
            if part.get("image"):
                paths.append(part["image"])
        elif kind == "text" and isinstance(part.get("text"), str | None):
            texts.append(part.get("text") or "")
        else:
            raise RowError(f"entry {i} holds {_shown(repr(part))}: texts and image parts are read")
    return "\n".join(texts), paths


def _turns(texts: list[str]) -> tuple[RecordTurn, ...]:
    turns = []
    for j, (question, answer) in enumerate(zip(texts[::2], texts[1::2], strict=True)):
        turn = RecordTurn((_clean(question),), _clean(answer), kind=j)
        if not turn.questions[0] or not turn.target:
            raise RowError(f"turn {j} has an empty {'answer' if turn.questions[0] else 'question'}")
        turns.append(turn)
    return tuple(turns)


def _compression(value: Any) -> tuple[str, Any]:
    """The query and the picture under `compression`; ("", None) where there are none."""
    try:
        fields = _parsed(value) if isinstance(value, str) and value.strip() else value or {}
    except (ValueError, RecursionError) as error:
        raise RowError(f"compression is no JSON ({error}): {_shown(value)}") from error
    query = (fields or {}).get("query") if isinstance(fields, dict | None) else 0
    if not isinstance(query, str | None):
        raise RowError(f"compression holds {_shown(repr(value))}: an object is due, with a text under query")
    return query or "", (fields or {}).get("image")


def _parsed(text: str) -> Any:
    value = json.loads(text)
    json.dumps(value, ensure_ascii=False).encode()  # an escape may stand for half a character, which is no text
    return value


def _value(data: Mapping[str, Any], *names: str) -> Any:
    """The first of these that is there; a table has columns for all spellings of its rows."""
    return next((data[name] for name in names if data.get(name) is not None), None)


def _clean(text: str) -> str:
    return _MARKERS.sub("", text).strip()


def _shown(text: str | bytes) -> str:
    start = text[:200]
    return textwrap.shorten(start.decode(errors="replace") if isinstance(start, bytes) else start, 60)
