"""Items and their embeddings, searched exactly in bounded memory.

Shape suffixes: L lines, N rows (a line has one, or one for each of its questions), D embedding size, B rows of a block.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from muco_ds.data.decode import decode
from muco_ds.data.schema import Dialogue
from muco_ds.errors import UserError
from muco_ds.models.item_files import ItemFiles
from muco_ds.models.shards import Rows, Shards, read_layout
from muco_ds.search import Nearest, load_faiss

BLOCK_BYTES = 64 * 2**20
"""Embeddings that are in memory at a time."""

THUMBNAIL = 448
"""Pixels of a thumbnail's longer side: twice a card's, for dense screens."""


@dataclass(frozen=True)
class Hit:
    """An item that was found: its row, where it stands, its question (counted from 1), its text, how many pictures."""

    row: int
    score: float
    place: str
    question: int | None
    text: str
    pictures: int


class Collection:
    """What can be searched: items that were checked, and their embeddings.

    Raises:
        UserError: not as many embeddings as items.
    """

    def __init__(self, source: ItemFiles, rows: Rows) -> None:
        self.source, self.rows = source, rows
        if source.rows != len(rows):
            raise UserError(
                f"--embeddings: there are {len(rows)} rows but --input has items for {source.rows}: "
                "give the files that they were made from, or encode these again"
            )
        counts, pictured = [], []
        with tqdm(total=len(source), desc="reading items", unit="line", leave=False) as bar:
            for start in range(0, len(source), 4096):
                dialogues = source.dialogues(start, min(start + 4096, len(source)))
                counts += [len(dialogue.turns) for dialogue in dialogues]
                pictured += [bool(dialogue.images) for dialogue in dialogues]
                bar.update(len(dialogues))
        self._first_row_L1 = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._pictured_N = np.repeat(np.array(pictured, bool), counts)
        load_faiss()  # or its lack would show with the first search
        # What could not be encoded is zero.
        self._usable_N = np.concatenate([block_BD.any(axis=1) for _, block_BD in self._blocks()])

    def __len__(self) -> int:
        return len(self.rows)

    def search(
        self, query_D: np.ndarray, count: int, *, pictured: bool | None = None, without: int | None = None
    ) -> list[Hit]:
        """The nearest `count` items by inner product, best first; equal scores in the items' order.

        Args:
            pictured: only items with pictures, or only those without; None: all.
            without: a row that is left out.
        """
        wanted_N = self._usable_N.copy()
        if pictured is not None:
            wanted_N &= self._pictured_N == pictured
        if without is not None:
            wanted_N[without] = False
        nearest = Nearest(torch.from_numpy(query_D)[None], count)
        for start, block_BD in self._blocks():
            wanted_B = wanted_N[start : start + len(block_BD)]
            if wanted_B.any():
                nearest.add(torch.from_numpy(block_BD if wanted_B.all() else block_BD[wanted_B]))
        rows = np.flatnonzero(wanted_N)[nearest.index_Qk[0].numpy()]
        return [self.hit(int(row), score) for row, score in zip(rows, nearest.score_Qk[0].tolist(), strict=True)]

    def hit(self, row: int, score: float) -> Hit:
        dialogue, line, turn = self._place(row)
        question = turn + 1 if len(dialogue.turns) > 1 else None
        return Hit(row, score, self.source.name(line), question, str(dialogue.turns[turn]), len(dialogue.images))

    def dialogue(self, row: int) -> Dialogue:
        """What a row was made from, by itself."""
        dialogue, _, turn = self._place(row)
        return Dialogue((dialogue.turns[turn],), dialogue.images)

    def first_usable(self) -> int | None:
        """The first row that could be encoded."""
        return int(self._usable_N.argmax()) if self._usable_N.any() else None

    def embedding(self, row: int) -> np.ndarray:
        """float32 [D]."""
        return self.rows.read(row, row + 1)[0].astype(np.float32)

    def thumbnail(self, row: int, number: int) -> bytes:
        """A picture of an item, small, as JPEG.

        Raises:
            LookupError: there is none of these numbers.
            ImageError: it is broken.
        """
        if not 0 <= row < len(self):
            raise LookupError(row)
        images = self._place(row)[0].images
        if not 0 <= number < len(images):
            raise LookupError(number)
        picture = decode(images[number])
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=88, subsampling=0)  # small pictures are all edges
        return buffer.getvalue()

    def _blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        size = max(1, BLOCK_BYTES // (4 * self.rows.width))
        for start in range(0, len(self.rows), size):
            yield start, np.ascontiguousarray(self.rows.read(start, min(start + size, len(self.rows))), np.float32)

    def _place(self, row: int) -> tuple[Dialogue, int, int]:
        """The dialogue of a row, its line and turn, counted from 0."""
        line = int(np.searchsorted(self._first_row_L1, row, side="right")) - 1
        (dialogue,) = self.source.dialogues(line, line + 1)
        return dialogue, line, row - int(self._first_row_L1[line])


class NpyRows:
    """Rows: a file of numpy's, mapped."""

    def __init__(self, path: Path) -> None:
        try:
            self._rows_ND = np.load(path, mmap_mode="c")  # "r" would do, but torch warns of it
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else "is no .npy file"
            raise UserError(f"--embeddings: '{path}' can't be read ({reason}): give what encode.py wrote") from error
        if self._rows_ND.ndim != 2 or self._rows_ND.dtype.kind != "f":
            shape = " x ".join(map(str, self._rows_ND.shape))
            raise UserError(f"--embeddings: '{path}' holds {shape} {self._rows_ND.dtype}, not rows of embeddings")

    @property
    def width(self) -> int:
        return int(self._rows_ND.shape[1])

    def __len__(self) -> int:
        return len(self._rows_ND)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self._rows_ND[start:stop]


def open_collection(items: str, embeddings: Path, images: Path | None) -> Collection:
    """Items that tools/encode.py read and what it wrote of them: a file or a folder of shards. Raises UserError."""
    if embeddings.is_dir() and read_layout(embeddings) is None and any(embeddings.glob("*.parquet")):
        raise UserError(f"--embeddings: '{embeddings}' holds parquet: encode with --format npy, which can be mapped")
    rows: Rows = Shards.open(embeddings) if embeddings.is_dir() else NpyRows(embeddings)
    source = ItemFiles(items, images)
    source.check(headers=False, progress=True)
    return Collection(source, rows)
