"""What is searched: a local pool, a part of one, or the union pool, whose embeddings are those of the local ones.

Shape suffixes: C candidates of a pool, M those of a part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np

from muco_ds.eval.encoder import Encoder
from muco_ds.eval.mbeir_files import Candidates, PoolFile
from muco_ds.models.shards import Rows

OTHERS = 10
"""So many wrong candidates for each query are in a part of a pool."""


@dataclass(frozen=True)
class Selected:
    """Rows: some of several others, in order."""

    parts: list[Rows]
    kept: list[np.ndarray]  # int64, ascending, of each part

    @cached_property
    def _first(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum([len(kept) for kept in self.kept])])

    @property
    def width(self) -> int:
        return self.parts[0].width

    def __len__(self) -> int:
        return int(self._first[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        found = []
        for rows, kept, first in zip(self.parts, self.kept, self._first.tolist(), strict=False):
            wanted = kept[max(start - first, 0) : max(stop - first, 0)]
            if len(wanted):
                block = rows.read(int(wanted[0]), int(wanted[-1]) + 1)
                found.append(block if len(block) == len(wanted) else block[wanted - wanted[0]])
        return np.concatenate(found)


@dataclass(frozen=True)
class Pool:
    """Candidates to be searched: what they are made of, each one's number, and whose they are."""

    path: Path
    parts: list[tuple[str, Candidates, np.ndarray]]  # name, source, which of its rows
    files: list[PoolFile]
    kind: str

    @cached_property
    def number_C(self) -> np.ndarray:
        """Ids of the candidates: int64."""
        return np.concatenate([source.number_M[kept] for _, source, kept in self.parts])

    def encoded(self, encoder: Encoder) -> Rows:
        """Embeddings of the candidates. Collective."""
        parts = [encoder.rows(source, f"mbeir/{name}", source.key) for name, source, _ in self.parts]
        kept = [kept for _, _, kept in self.parts]
        whole = len(parts) == 1 and len(kept[0]) == len(parts[0])
        return parts[0] if whole else Selected(parts, kept)


class Pools:
    """The pool files of a folder, each scanned once."""

    def __init__(self, root: Path, images: str, *, progress: bool = False) -> None:
        self.root, self.progress = root, progress
        self._scan = cache(lambda path: PoolFile.scan(path, images, progress=self.progress))

    def local_path(self, name: str) -> Path:
        return self.root / "cand_pool" / "local" / f"mbeir_{name}_cand_pool.jsonl"

    @property
    def union_path(self) -> Path:
        return self.root / "cand_pool" / "global" / "mbeir_union_test_cand_pool.jsonl"

    def union_paths(self, names: Sequence[str]) -> list[Path]:
        """Files that the union pool is made of: local ones, and its own where it is there."""
        paths = [self.local_path(name) for name in names]
        return [path for path in paths if path.exists()] + [self.union_path] if self.union_path.exists() else paths

    def local(self, name: str) -> Pool:
        """Raises UserError, naming the file."""
        path = self.local_path(name)
        source = Candidates.all(self._scan(path))
        return Pool(path, [(path.stem, source, np.arange(len(source)))], [source.pool], "local")

    def part(self, pool: Pool, right: np.ndarray, queries: int, limit: int) -> Pool:
        """Right candidates of some queries and, in the file's order, `OTHERS` times as many others as queries.

        Args:
            right: numbers of the right candidates.
            limit: what --rows says.
        """
        (name, source, _), *_ = pool.parts
        right_C = np.isin(source.number_M, right)
        others_C = ~right_C & (np.cumsum(~right_C) <= OTHERS * queries)
        part = Candidates(source.pool, np.flatnonzero(right_C | others_C))
        # Under a name of its own: what the whole pool has in the store must stay.
        return Pool(pool.path, [(f"{name}_first{limit}", part, np.arange(len(part)))], pool.files, "part")

    def union(self, names: Sequence[str]) -> Pool:
        """Each candidate once, as a local pool has it, else as the union's own file has it. Raises UserError."""
        names = [name for name in names if not self.union_path.exists() or self.local_path(name).exists()]
        sources = [(name, source) for of in map(self.local, names) for name, source, _ in of.parts]
        files = [source.pool for _, source in sources]
        wanted = np.concatenate([source.number_M for _, source in sources] or [np.zeros(0, np.int64)])
        path = self.root / "cand_pool" / "local"
        if self.union_path.exists():
            path = self.union_path
            whole = self._scan(path)
            files.append(whole)
            rest = Candidates(whole, np.flatnonzero(~np.isin(whole.number_C, wanted)))
            sources += [(f"{path.stem}_rest", rest)] if len(rest) else []
            wanted = whole.number_C
        all_C = np.concatenate([source.number_M for _, source in sources])
        once_C = np.zeros(len(all_C), bool)
        once_C[np.unique(all_C, return_index=True)[1]] = True
        once_C &= np.isin(all_C, wanted)
        ends = np.cumsum([len(source) for _, source in sources])[:-1]
        kept = map(np.flatnonzero, np.split(once_C, ends))
        parts = [(name, source, rows) for (name, source), rows in zip(sources, kept, strict=True) if len(rows)]
        return Pool(path, parts, files, "union")
