"""Embeddings of more than fits in memory, in shards: whole .npy files, written by the rank that encoded them.

A folder holds `shards.json` (what it is made of), `00000.npy`, `00001.npy`, ... each [rows, width] and mapped when
read, and beside a shard with lines of several rows or none `00000.lines.npy`: int64, where each line's rows start, and
the end. A shard is there under its name when it is complete, so an ended run goes on with the ones that are missing. A
row that could not be encoded is zero, and listed in `00000.broken.npy`; it is tried again when its pictures are there.

Shape suffixes: L lines of a shard, N rows, D width, S shards.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from tqdm import tqdm

from muco_ds.data.collator import Packer
from muco_ds.data.decode import decode
from muco_ds.data.schema import Dialogue
from muco_ds.distributed import env
from muco_ds.errors import UserError
from muco_ds.files import replacing
from muco_ds.losses.matryoshka import prefix
from muco_ds.models.encode import Model, encode_windows
from muco_ds.models.items import first_problem

log = logging.getLogger(__name__)

SHARD_LINES = 8192
"""Lines of a shard: what a rank loses at most when it is ended, enough for packs of like lengths."""

HEAD = "shards.json"


class Rows(Protocol):
    """Embeddings, [N, D], in memory or not."""

    @property
    def width(self) -> int: ...

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start .. stop in memory."""
        ...


class Source(Protocol):
    """Lines that can be read from anywhere; each is a dialogue, whose turns are rows."""

    @property
    def rows(self) -> int:
        """Of all lines."""
        ...

    def __len__(self) -> int:
        """Lines."""
        ...

    def dialogues(self, start: int, stop: int) -> Sequence[Dialogue]:
        """Those of lines start .. stop, counted from 0. Raises UserError, naming the line."""
        ...

    def name(self, line: int) -> str:
        """A line, for messages."""
        ...


@dataclass(frozen=True)
class Layout:
    """What the shards of a folder are made of; `key` is equal where their content would be."""

    key: str
    lines: int
    width: int
    dtype: Literal["float16", "float32"]
    shard_lines: int = SHARD_LINES

    def bounds(self, shard: int) -> tuple[int, int]:
        """First line of a shard, and the one behind its last."""
        start = shard * self.shard_lines
        return start, min(start + self.shard_lines, self.lines)

    @property
    def shards(self) -> int:
        return -(-self.lines // self.shard_lines)


class Shards:
    """Embeddings of a folder, [N, D], of which `read` gives slices. `Shards.open` refuses what is not complete."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.folder, self.layout = folder, layout
        self._first_row_S1 = np.zeros(1, np.int64)

    @classmethod
    def open(cls, folder: Path) -> Shards:
        """Raises UserError: a folder without shards, one that is not complete, a shard that is cut off."""
        layout = read_layout(folder)
        if layout is None:
            raise UserError(f"{folder}: holds no embeddings ({HEAD}): give a folder written by tools/encode.py")
        shards = cls(folder, layout)
        counts = []
        for shard in range(layout.shards):
            problem, rows = shards.look(shard)
            if problem is not None:
                raise UserError(f"{problem}: run what wrote it again, it goes on with what is missing")
            counts.append(rows)
        shards._first_row_S1 = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        return shards

    def __len__(self) -> int:
        return int(self._first_row_S1[-1])

    @property
    def width(self) -> int:
        return self.layout.width

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start .. stop as they are stored, in memory."""
        first = int(np.searchsorted(self._first_row_S1, start, side="right")) - 1
        parts = [np.zeros((0, self.width), self.layout.dtype)]
        for shard in range(first, self.layout.shards):
            base = int(self._first_row_S1[shard])
            if base >= stop:
                break
            parts.append(self._mapped(shard)[max(start - base, 0) : stop - base])
        return np.concatenate(parts)

    def parts(self) -> Iterator[np.ndarray]:
        """All shards, mapped."""
        return map(self._mapped, range(self.layout.shards))

    def broken_rows(self) -> np.ndarray:
        """Rows that could not be encoded: int64, ascending."""
        found = [self.broken_of(shard) + self._first_row_S1[shard] for shard in range(self.layout.shards)]
        return np.concatenate([np.zeros(0, np.int64), *found])

    def broken_of(self, shard: int) -> np.ndarray:
        """Those of a shard, counted from its first row: int64, ascending."""
        path = self.broken_path(shard)
        return np.load(path) if path.exists() else np.zeros(0, np.int64)

    def line_starts(self, shard: int) -> np.ndarray:
        """First row of each line of a shard, and the end, counted over all shards: int64 [L + 1]."""
        return self.own_line_starts(shard) + self._first_row_S1[shard]

    def own_line_starts(self, shard: int) -> np.ndarray:
        """The same, counted from the shard's first row."""
        start, stop = self.layout.bounds(shard)
        path = self.lines_path(shard)
        return np.load(path) if path.exists() else np.arange(stop - start + 1)

    def lines_of(self, rows: np.ndarray) -> np.ndarray:
        """The line, counted from 0, of each of some ascending rows: int64."""
        found = []
        for shard, (first, end) in enumerate(pairwise(self._first_row_S1.tolist())):
            mine = rows[(rows >= first) & (rows < end)]
            if len(mine):
                place = np.searchsorted(self.line_starts(shard), mine, side="right") - 1
                found.append(place + self.layout.bounds(shard)[0])
        return np.concatenate([np.zeros(0, np.int64), *found])

    def path(self, shard: int) -> Path:
        return self.folder / f"{shard:05}.npy"

    def lines_path(self, shard: int) -> Path:
        return self.folder / f"{shard:05}.lines.npy"

    def broken_path(self, shard: int) -> Path:
        return self.folder / f"{shard:05}.broken.npy"

    def look(self, shard: int) -> tuple[str | None, int]:
        """What is wrong with a shard's file, if anything, and its rows."""
        path, (start, stop) = self.path(shard), self.layout.bounds(shard)
        try:
            found_ND = self._mapped(shard)
            lines = self.lines_path(shard)
            rows = int(np.load(lines)[-1]) if lines.exists() else stop - start
        except FileNotFoundError:
            return f"{path} is missing", 0
        except (OSError, ValueError, EOFError) as error:  # numpy: the file is shorter than its header says, or has none
            return f"{path} is damaged ({error})", 0
        if found_ND.shape != (rows, self.width) or found_ND.dtype != self.layout.dtype:
            expected = f"{rows} x {self.width} {self.layout.dtype}"
            return f"{path} holds {' x '.join(map(str, found_ND.shape))} {found_ND.dtype} instead of {expected}", 0
        return None, rows

    def _mapped(self, shard: int) -> np.ndarray:
        return np.load(self.path(shard), mmap_mode="r")


def read_layout(folder: Path) -> Layout | None:
    """What the shards in a folder are made of; None where there are none."""
    try:
        return Layout(**json.loads((folder / HEAD).read_text()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder / HEAD}: is damaged ({error}): delete the folder and encode again") from error


def encode_shards(
    model: Model,
    packer: Packer,
    source: Source,
    folder: Path,
    layout: Layout,
    *,
    device: torch.device,
    pack_tokens: int | None,
    mark_broken: bool,
    progress: str | None,
    located: Callable[[UserError, int], UserError] | None = None,
) -> Shards:
    """Encode what a folder does not hold yet; what it holds with another `key` is removed. Collective.

    Every rank has the whole model and encodes shards of its own, in rounds, so that a problem of one ends all.

    Args:
        mark_broken: rows that can't be encoded become zero; else that is an error.
        progress: description of a progress bar on rank 0; None for none.
        located: makes an error about a picture name its line, given the first line where it may be.
    Raises:
        UserError: on every rank; the shards that are finished stay.
    """
    shards, pending = Shards(folder, layout), []
    with env.agreement():
        if env.is_main():
            pending = _begin(shards, source)
    pending = env.from_main(pending)
    world_size, rank = env.world_size(), env.rank()
    mine = pending[rank::world_size]
    missing = sum(stop - start for start, stop in map(layout.bounds, pending))
    rows = round(source.rows * (1 - missing / layout.lines))
    starts: dict[int, np.ndarray] = {}  # first row of each line, of shards that were read and not written yet
    with tqdm(total=source.rows, initial=rows, desc=progress, unit="row", disable=progress is None or rank != 0) as bar:
        windows = encode_windows(
            model,
            packer,
            _windows(source, layout, mine, starts),
            pack_tokens=pack_tokens,
            device=device,
            shared=False,
            mark_broken=mark_broken,
            progress=bar if world_size == 1 else None,
        )
        for first in range(0, len(pending), world_size):
            of_round = pending[first : first + world_size]
            with env.agreement(patient=True):
                if rank < len(of_round):
                    try:
                        emb_ND, shard = next(windows), of_round[rank]
                        _write(shards, shard, source, starts.pop(shard), emb_ND, mark_broken)
                    except UserError as error:
                        raise (located(error, layout.bounds(of_round[0])[0]) if located else error) from error
            if world_size > 1:
                bar.update(round(source.rows / layout.lines * len(of_round) * layout.shard_lines))
    with env.agreement():
        return Shards.open(folder)


def _windows(
    source: Source, layout: Layout, shards: Sequence[int], starts: dict[int, np.ndarray]
) -> Iterator[Sequence[Dialogue]]:
    """The lines of each shard; where their rows start goes into `starts`."""
    for shard in shards:
        dialogues = source.dialogues(*layout.bounds(shard))
        starts[shard] = np.cumsum([0, *(len(dialogue.turns) for dialogue in dialogues)], dtype=np.int64)
        yield dialogues


def _begin(shards: Shards, source: Source) -> list[int]:
    """Shards that are to be encoded."""
    folder, layout = shards.folder, shards.layout
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(".*.tmp*"):  # what a killed process was writing
            path.unlink()
        if read_layout(folder) != layout:
            for path in [folder / HEAD, *folder.glob("[0-9]*.npy")]:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"can't write '{folder}' ({error.strerror})") from error
    with replacing(folder / HEAD) as work:
        work.write_text(json.dumps(layout.__dict__, indent=2) + "\n")
    pending = []
    for shard in range(layout.shards):
        problem, _ = shards.look(shard)
        if problem is not None:
            pending.append(shard)
            if shards.path(shard).exists():
                log.warning("%s: it is encoded again", problem)
        elif _mended(shards, shard, source):
            pending.append(shard)
            log.warning("%s: pictures can be used that could not be: it is encoded again", shards.path(shard))
    if pending and (found := layout.shards - len(pending)):
        log.warning("%s: %d of %d shards are there from an earlier run", folder, found, layout.shards)
    return pending


def _mended(shards: Shards, shard: int, source: Source) -> bool:
    """Whether a line that could not be encoded has no picture any more that can't be used, and had one."""
    places = np.searchsorted(shards.own_line_starts(shard), shards.broken_of(shard), side="right") - 1
    for line in np.unique(places) + shards.layout.bounds(shard)[0]:
        (dialogue,) = source.dialogues(int(line), int(line) + 1)
        if dialogue.images and first_problem(dialogue, decode) is None:
            return True
    return False


def _write(
    shards: Shards, shard: int, source: Source, first_row_L1: np.ndarray, emb_ND: torch.Tensor, mark_broken: bool
) -> None:
    start, _ = shards.layout.bounds(shard)
    rows_ND = prefix(emb_ND, shards.width).numpy()
    odd_N = ~np.isfinite(rows_ND).all(axis=1)
    if odd_N.any() and not mark_broken:
        line = start + int(np.searchsorted(first_row_L1, np.argmax(odd_N), side="right")) - 1
        raise UserError(f"{source.name(line)}: its embedding is not finite: try another --dtype")
    if (np.diff(first_row_L1) != 1).any():
        _save(shards.lines_path(shard), first_row_L1)
    if odd_N.any():
        _save(shards.broken_path(shard), np.flatnonzero(odd_N))
    else:
        shards.broken_path(shard).unlink(missing_ok=True)
    _save(shards.path(shard), np.where(odd_N[:, None], np.float32(0), rows_ND).astype(shards.layout.dtype))


def _save(path: Path, array: np.ndarray) -> None:
    with replacing(path) as work, open(work, "wb") as file:
        np.save(file, array)
