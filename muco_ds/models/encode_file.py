"""A file of items -> an .npy file of embeddings: checked before the model is loaded, in bounded memory, resumable.

Shape suffixes: L lines, N rows, D embedding size.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from muco_ds.data.decode import ImageError, decode, read_size
from muco_ds.data.schema import Dialogue
from muco_ds.distributed import env
from muco_ds.distributed.gather import gather_rows
from muco_ds.errors import UserError
from muco_ds.files import beside, replacing
from muco_ds.losses.matryoshka import prefix
from muco_ds.models.embedder import Embedder
from muco_ds.models.encode import encode_windows
from muco_ds.models.items import dialogue_of

WINDOW_LINES = 2048
"""Lines that a rank encodes between two writes: what is lost at most when it is ended."""

_READERS = 16  # of headers: they wait for the file system more than for a core

_CURE = "correct it, or give --skip_broken to leave such lines out"


@dataclass(frozen=True)
class ItemFile:
    """A line per item: {"text", "image", "instruction"}, or "questions" about the image in place of "text"."""

    path: Path
    images: Path

    def lines(self) -> Iterator[bytes]:
        try:
            with open(self.path, "rb") as file:
                yield from file
        except OSError as error:
            raise UserError(f"--input: '{self.path}' can't be read ({error.strerror})") from error

    def dialogues(self, start: int = 0, stop: int | None = None) -> Iterator[Dialogue]:
        """Those of lines start .. stop, counted from 0. Raises UserError, naming the line."""
        for number, line in enumerate(itertools.islice(self.lines(), start, stop), start):
            yield self._dialogue(line, f"{self.path}: line {number + 1}")

    def check(self, *, headers: bool, progress: bool) -> Checked:
        """Read everything once, with every picture's header if `headers`. Raises UserError, naming the line."""
        digest = hashlib.blake2b(digest_size=16)
        counts: list[np.ndarray] = []
        lines, number = self.lines(), 0
        with (
            ThreadPoolExecutor(_READERS) as readers,
            tqdm(desc="checking", unit="line", disable=not progress) as bar,
        ):
            while chunk := list(itertools.islice(lines, 4096)):
                names = [f"{self.path}: line {number + i + 1}" for i in range(len(chunk))]
                dialogues = [self._dialogue(line, name) for line, name in zip(chunk, names, strict=True)]
                for line in chunk:
                    digest.update(line)
                if headers:
                    for name, problem in zip(names, readers.map(_bad_header, dialogues), strict=True):
                        if problem:
                            raise UserError(f"{name}: {problem}: {_CURE}")
                counts.append(np.array([len(dialogue.turns) for dialogue in dialogues]))
                number += len(chunk)
                bar.update(len(chunk))
        if not number:
            raise UserError(f"--input: '{self.path}' is empty: give a line for each item")
        first_row = np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int64)
        return Checked(first_row, digest.hexdigest())

    def located(self, error: UserError, start: int) -> UserError:
        """An error that names a picture, with the first line from `start` on that holds it."""
        for number, dialogue in enumerate(self.dialogues(start), start):
            if any(str(error).startswith(f"picture {image}: ") for image in dialogue.images):
                return UserError(f"{self.path}: line {number + 1}: {error}: {_CURE}")
        return error

    def _dialogue(self, line: bytes, name: str) -> Dialogue:
        try:
            item = json.loads(line.decode())
            json.dumps(item, ensure_ascii=False).encode()  # an escape may stand for half a character, which is no text
        except (ValueError, RecursionError) as error:
            raise UserError(f"{name}: is no JSON ({error}): write one object a line") from error
        if not isinstance(item, dict):
            raise UserError(f'{name}: holds no object: write one such as {{"text": "..."}}')
        questions = item.pop("questions", None)
        image = item.get("image")
        paths = image if isinstance(image, list) else [] if image is None else [image]
        if not all(isinstance(path, str) and path for path in paths):
            raise UserError(f"{name}: 'image' must be a path or a list of them")
        item["image"] = [str(self.images / path) for path in paths]
        if questions is None:
            return dialogue_of(item, name)
        if not isinstance(questions, list) or not questions:
            raise UserError(f"{name}: 'questions' must be a list of texts")
        if "text" in item or not paths:
            raise UserError(f"{name}: 'questions' are about an 'image' and stand in place of 'text'")
        turns = [dialogue_of({**item, "text": question}, name).turns[0] for question in questions]
        return Dialogue(tuple(turns), tuple(item["image"]))


@dataclass(frozen=True)
class Checked:
    """What a whole file holds: rows first_row_L1[i] .. first_row_L1[i + 1] belong to line i."""

    first_row_L1: np.ndarray  # int64
    digest: str

    @property
    def rows(self) -> int:
        return int(self.first_row_L1[-1])

    @property
    def lines(self) -> int:
        return len(self.first_row_L1) - 1

    def line(self, row: int) -> int:
        """The line of a row, counted from 1."""
        return int(np.searchsorted(self.first_row_L1, row, side="right"))


class RowFile:
    """float32 [N, D] that grows under another name until it is complete, and is found again by its key."""

    def __init__(self, output: Path, key: str, rows: int, width: int) -> None:
        self.output, self.rows, self.width = output, rows, width
        self.path = output.with_name(f".{output.name}.{key}.partial")

    def begin(self, checked: Checked) -> int:
        """Lines that an earlier run has finished. Raises UserError where the folder can't be written."""
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                if file.tell() == 0:
                    header = {"descr": "<f4", "fortran_order": False, "shape": (self.rows, self.width)}
                    np.lib.format.write_array_header_1_0(file, header)
            start = self._start()
            found = (self.path.stat().st_size - start) // (4 * self.width)
            line = int(np.searchsorted(checked.first_row_L1, found, side="right")) - 1
            os.truncate(self.path, start + int(checked.first_row_L1[line]) * 4 * self.width)
        except (OSError, ValueError) as error:
            raise UserError(f"can't write '{self.path}' ({error})") from error
        return line

    def append(self, rows_ND: np.ndarray) -> None:
        """Add rows; one that is not finite becomes zero."""
        rows_ND = np.where(np.isfinite(rows_ND).all(axis=1, keepdims=True), rows_ND, np.float32(0))
        try:
            with open(self.path, "ab") as file:
                file.write(rows_ND.astype("<f4").tobytes())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"can't write '{self.path}' ({error.strerror})") from error

    def zero_rows(self) -> list[int]:
        """Rows that were not finite: embeddings have unit length."""
        found: list[int] = []
        with open(self.path, "rb") as file:
            file.seek(self._start())
            for first in range(0, self.rows, 65536):
                count = min(65536, self.rows - first)
                rows_ND = np.fromfile(file, "<f4", count * self.width).reshape(count, self.width)
                found += (np.flatnonzero(~rows_ND.any(axis=1)) + first).tolist()
        return found

    def finish(self) -> None:
        """Take the output's name; what earlier runs with other lines or options left goes away."""
        os.replace(self.path, self.output)
        for path in self.output.parent.glob(f".{glob.escape(self.output.name)}.*.partial"):
            path.unlink()

    def _start(self) -> int:
        with open(self.path, "rb") as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            return file.tell()


def encode_file(
    embedder: Embedder,
    items: ItemFile,
    checked: Checked,
    output: Path,
    *,
    key: str,
    device: torch.device,
    pack_tokens: int | None,
    dim: int,
    skip_broken: bool,
) -> dict[str, Any]:
    """Write `output`, where an earlier run of the same `key` stopped, and what belongs beside it. Collective.

    The ranks take windows of lines in turn, each by itself, and rank 0 writes.

    Returns:
        on rank 0, for people: lines, rows, lines found finished, lines without usable pictures.
    Raises:
        UserError: a picture that can't be used, or an embedding that is not finite, where `skip_broken` is off.
    """
    assert embedder.packer is not None
    file, done = RowFile(output, key, checked.rows, dim), 0
    with env.agreement():
        if env.is_main():
            done = file.begin(checked)
    done = env.from_main(done)
    world_size, rank = env.world_size(), env.rank()
    bounds = _windows(done, checked.lines, world_size)
    first_row = checked.first_row_L1[bounds]
    mine = range(rank, len(bounds) - 1, world_size)
    with tqdm(total=checked.rows, initial=int(first_row[0]), desc="encoding", unit="row", disable=rank != 0) as bar:
        windows = encode_windows(
            embedder,
            embedder.packer,
            (list(items.dialogues(int(bounds[i]), int(bounds[i + 1]))) for i in mine),
            pack_tokens=pack_tokens,
            device=device,
            shared=False,
            mark_broken=skip_broken,
            progress=bar if world_size == 1 else None,
        )
        for first in range(0, len(bounds) - 1, world_size):
            with env.agreement():
                try:
                    rows_ND = prefix(next(windows), dim)
                except UserError as error:
                    raise items.located(error, int(bounds[first])) from error
                odd = (~torch.isfinite(rows_ND).all(1)).nonzero()
                if len(odd) and not skip_broken:
                    line = checked.line(int(first_row[first + rank]) + int(odd[0]))
                    raise UserError(f"{items.path}: line {line}: its embedding is not finite: try another --dtype")
            counts = np.diff(first_row[first : first + world_size + 1]).tolist()
            all_ND = gather_rows(rows_ND.to(device), counts).cpu() if world_size > 1 else rows_ND
            with env.agreement():
                if env.is_main():
                    file.append(all_ND.numpy())
            bar.update(sum(counts) if world_size > 1 else 0)
    return _finish(items, checked, file, done) if env.is_main() else {}


def _windows(done: int, lines: int, world_size: int) -> np.ndarray:
    """First lines of all windows, and the end; equally many for every rank, the last ones perhaps empty."""
    starts = np.arange(done, lines, WINDOW_LINES)
    return np.append(starts, [lines] * (-len(starts) % world_size + 1))


def _finish(items: ItemFile, checked: Checked, file: RowFile, done: int) -> dict[str, Any]:
    broken = sorted({checked.line(row) for row in file.zero_rows()})
    # What lies beside the embeddings comes first: where they are, it is.
    _write_beside(file.output, "rows.npy", checked.rows > checked.lines, lambda path: _save(path, checked.first_row_L1))
    entries = [{"line": line, "reason": _why(next(items.dialogues(line - 1, line)))} for line in broken]
    text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    _write_beside(file.output, "broken.jsonl", bool(broken), lambda path: path.write_text(text, encoding="utf-8"))
    file.finish()
    return {"lines": checked.lines, "rows": checked.rows, "found": done, "broken": len(broken)}


def _write_beside(output: Path, ending: str, wanted: bool, write: Any) -> None:
    path = beside(output, ending)
    if not wanted:
        path.unlink(missing_ok=True)  # of an earlier output
        return
    with replacing(path) as work:
        write(work)


def _save(path: Path, first_row_L1: np.ndarray) -> None:
    with open(path, "wb") as file:
        np.save(file, first_row_L1)


def _bad_header(dialogue: Dialogue) -> str | None:
    return _first_problem(dialogue, read_size)


def _why(dialogue: Dialogue) -> str:
    return _first_problem(dialogue, decode) or "its embedding is not finite"


def _first_problem(dialogue: Dialogue, look: Any) -> str | None:
    for image in dialogue.images:
        try:
            look(image)
        except ImageError as error:
            return f"picture {image}: {error}"
    return None
