"""Files of items to be embedded, JSON lines or parquet: checked in one pass, then read from anywhere.

An item: any keys of "text", "image" (a path or a list of them) and "instruction", or "questions", a list, in place of
"text". In parquet, columns of these names; an image may also be `{"bytes", "path"}`, as the datasets library stores it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
from datasets import Dataset
from tqdm import tqdm

from muco_ds.data.decode import StoredPicture, decode, read_size
from muco_ds.data.readers import data_files, memory_mapped, parquet_facts
from muco_ds.data.schema import Dialogue, ImageRef
from muco_ds.errors import UserError
from muco_ds.models.items import dialogue_of, first_problem

COLUMNS = ("text", "image", "instruction", "questions")

_STRIDE = 4096  # lines between two that are found without reading those before
_READERS = 16  # of headers: they wait for the file system more than for a core
_CURE = "correct it, or give --skip_broken to leave such lines out"


class _Part(Protocol):
    """One file. Lines of JSON are counted from 1 in messages, rows of parquet from 0."""

    path: str

    def __len__(self) -> int: ...

    def items(self, start: int, stop: int | None) -> Iterator[dict[str, Any]]: ...

    def name(self, line: int) -> str: ...

    def place(self, line: int) -> dict[str, int]: ...


class ItemFiles:
    """All items of a file, a folder or a glob. `models.shards.Source`, once it was checked.

    Args:
        images: folder that picture paths start from; None: that of each file.
        output: what an earlier run wrote there, and beside it, is no input.
    Raises:
        UserError: no file, or one that can't be read.
    """

    def __init__(self, pattern: str, images: Path | None, output: Path | None = None) -> None:
        given = data_files(pattern, "--input", (".jsonl", ".parquet"))
        files = [path for path in given if output is None or not _belongs(Path(path).absolute(), output.absolute())]
        if not files:
            raise UserError(f"--input: '{pattern}' holds nothing but what belongs to '{output}'")
        self.pattern = pattern
        self._parts: list[_Part] = [_Table(path) if path.endswith(".parquet") else _Lines(path) for path in files]
        self._images = {path: images or Path(path).parent for path in files}
        self._ends: list[int] = []
        self.rows = 0
        self.digest = ""

    def __len__(self) -> int:
        return self._ends[-1]

    def check(self, *, headers: bool, progress: bool) -> None:
        """Read everything once, with every picture's header if `headers`. Raises UserError, naming the line."""
        digest = hashlib.blake2b(digest_size=16)
        counts = []
        with ThreadPoolExecutor(_READERS) as readers, tqdm(desc="checking", unit="line", disable=not progress) as bar:
            for part in self._parts:
                # Equal lines beside other pictures are other items.
                digest.update(os.path.realpath(self._images[part.path]).encode())
                with open(part.path, "rb") as file:
                    while block := file.read(2**22):
                        digest.update(block)
                items, line = part.items(0, None), 0
                while chunk := list(itertools.islice(items, _STRIDE)):
                    dialogues = [self._dialogue(part, line + i, item) for i, item in enumerate(chunk)]
                    pictured = [i for i, dialogue in enumerate(dialogues) if headers and dialogue.images]
                    problems = readers.map(_bad_header, (dialogues[i] for i in pictured))
                    for i, problem in zip(pictured, problems, strict=True):
                        if problem:
                            raise UserError(f"{part.name(line + i)}: picture {problem[0]}: {problem[1]}: {_CURE}")
                    self.rows += sum(len(dialogue.turns) for dialogue in dialogues)
                    line += len(chunk)
                    bar.update(len(chunk))
                counts.append(line)
        self._ends, self.digest = list(accumulate(counts)), digest.hexdigest()
        if not self.rows:
            raise UserError(f"--input: '{self.pattern}' is empty: give a line for each item")

    def dialogues(self, start: int, stop: int) -> list[Dialogue]:
        """Those of lines start .. stop, over all files. Raises UserError, naming the line."""
        found: list[Dialogue] = []
        while start < min(stop, len(self)):
            part, first = self._part_of(start)
            line = start - first
            items = part.items(line, min(stop - first, len(part)))
            found += [self._dialogue(part, line + i, item) for i, item in enumerate(items)]
            start = first + len(part)
        return found

    def name(self, line: int) -> str:
        """A line over all files, for messages."""
        part, first = self._part_of(line)
        return part.name(line - first)

    def broken(self, line: int) -> dict[str, Any]:
        """Where a line is that could not be encoded, and why."""
        part, first = self._part_of(line)
        picture, why = first_problem(self.dialogues(line, line + 1)[0], decode) or (
            None,
            "its embedding is not finite",
        )
        return {"file": Path(part.path).name, **part.place(line - first), "picture": picture, "reason": why}

    def located(self, error: UserError, start: int) -> UserError:
        """An error that names a picture, with the first line from `start` on that holds it."""
        for first in range(start, len(self), _STRIDE):
            for line, dialogue in enumerate(self.dialogues(first, first + _STRIDE), first):
                if any(str(error).startswith(f"picture {image}: ") for image in dialogue.images):
                    return UserError(f"{self.name(line)}: {error}: {_CURE}")
        return error

    def _part_of(self, line: int) -> tuple[_Part, int]:
        """The file of a line, and its first line."""
        which = bisect_right(self._ends, line)
        return self._parts[which], self._ends[which - 1] if which else 0

    def _dialogue(self, part: _Part, line: int, item: dict[str, Any]) -> Dialogue:
        name, root = part.name(line), self._images[part.path]
        questions = item.pop("questions", None)
        given = item.pop("image", None)
        images = [
            _picture(image, root, name)
            for image in (given if isinstance(given, list) else [] if given is None else [given])
        ]
        item["image"] = images
        if questions is None:
            return dialogue_of(item, name)
        if not isinstance(questions, list) or not questions:
            raise UserError(f"{name}: 'questions' must be a list of texts")
        if "text" in item or not images:
            raise UserError(f"{name}: 'questions' are about an 'image' and stand in place of 'text'")
        turns = [dialogue_of({**item, "text": question}, name).turns[0] for question in questions]
        return Dialogue(tuple(turns), tuple(images))


def _belongs(path: Path, output: Path) -> bool:
    """Whether a file is an output, in it, or beside an output of one file under its name."""
    beside = output.suffix == ".npy" and path.parent == output.parent and path.name.startswith(f"{output.name}.")
    return beside or output in (path, *path.parents)


class _Lines:
    """JSON lines. Of each `_STRIDE` lines the place of the first is kept, found by reading all of them once."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._starts = [0]
        self._lines = 0

    def __len__(self) -> int:
        return self._lines

    def items(self, start: int, stop: int | None) -> Iterator[dict[str, Any]]:
        """Lines start .. stop; once all of them, in order, before any other."""
        block = start // _STRIDE
        line, place = block * _STRIDE, self._starts[block]
        try:
            with open(self.path, "rb") as file:
                file.seek(place)
                for content in file:
                    if line == stop:
                        return
                    if line % _STRIDE == 0 and line // _STRIDE == len(self._starts):
                        self._starts.append(place)
                    if line >= start:
                        yield self._parsed(content, line)
                    line, place = line + 1, place + len(content)
                    self._lines = max(self._lines, line)
        except OSError as error:
            raise UserError(f"--input: '{self.path}' can't be read ({error.strerror})") from error

    def name(self, line: int) -> str:
        return f"{self.path}: line {line + 1}"

    def place(self, line: int) -> dict[str, int]:
        return {"line": line + 1}

    def _parsed(self, content: bytes, line: int) -> dict[str, Any]:
        name = self.name(line)
        try:
            item = json.loads(content.decode())
            json.dumps(item, ensure_ascii=False).encode()  # an escape may stand for half a character, which is no text
        except (ValueError, RecursionError) as error:
            raise UserError(f"{name}: is no JSON ({error}): write one object a line") from error
        if not isinstance(item, dict):
            raise UserError(f'{name}: holds no object: write one such as {{"text": "..."}}')
        return item


class _Table:
    """A parquet file's columns that items have, mapped. Null stands for a key that is not there."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._rows, schema = parquet_facts(path)
        names = [name for name in schema.names if name in COLUMNS]
        if not names:
            raise UserError(f"{path}: has none of the columns {', '.join(COLUMNS)} (found: {', '.join(schema.names)})")
        self._names = names

    def __len__(self) -> int:
        return self._rows

    def __getstate__(self) -> dict[str, Any]:  # what is mapped may lie elsewhere on another machine
        return {name: value for name, value in self.__dict__.items() if name != "_data"}

    @cached_property
    def _data(self) -> Dataset:
        return memory_mapped([self.path]).select_columns(self._names)

    def items(self, start: int, stop: int | None) -> Iterator[dict[str, Any]]:
        stop = self._rows if stop is None else stop
        for first in range(start, stop, _STRIDE):
            columns = self._data[first : min(first + _STRIDE, stop)]
            for row in range(len(columns)):
                values = {name: _value(columns.column(name)[row]) for name in columns.column_names}
                yield {name: value for name, value in values.items() if value is not None}

    def name(self, line: int) -> str:
        return f"{self.path}: row {line}"

    def place(self, line: int) -> dict[str, int]:
        return {"row": line}


def _value(scalar: pa.Scalar) -> Any:
    """A cell, with pictures left where they are mapped."""
    if not scalar.is_valid:
        return None
    if isinstance(scalar, pa.StructScalar):
        return dict(scalar.items())
    if isinstance(scalar, pa.ListScalar | pa.LargeListScalar):
        return [_value(one) for one in scalar]
    return scalar.as_py()


def _picture(image: Any, root: Path, name: str) -> ImageRef:
    if isinstance(image, dict) and image.keys() <= {"bytes", "path"}:
        data, path = image.get("bytes"), image.get("path")
        if isinstance(data, pa.Scalar) and data.is_valid:
            stored = path.as_py() if path is not None and path.is_valid else "image"
            return StoredPicture(f"{name}: {stored}", partial(pa.BufferReader, data.as_buffer()))
        image = path.as_py() if isinstance(path, pa.Scalar) else None
    if not isinstance(image, str) or not image:
        raise UserError(f"{name}: 'image' must be a path or a list of them")
    return str(root / image)


def _bad_header(dialogue: Dialogue) -> tuple[str, str] | None:
    return first_problem(dialogue, read_size)
