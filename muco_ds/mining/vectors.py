"""Embeddings that don't fit in memory: rows of a file, written as they are encoded and read in slices.

Shape suffixes: N rows, D embedding size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from muco_ds.data.collator import Packer
from muco_ds.data.schema import Dialogue, PackedBatch
from muco_ds.distributed import env
from muco_ds.errors import UserError
from muco_ds.models.encode import encode_windows


class Vectors:
    """float32 [N, D] in a file. Read with system calls: the pages of a memory map would count as this process's."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows, self.width = path, 0, 0
        self._broken: list[np.ndarray] = []

    def append(self, rows_ND: np.ndarray) -> None:
        """Add rows; one that is not finite is noted and becomes zero."""
        broken_N = ~np.isfinite(rows_ND).all(axis=1)
        self._broken.append(broken_N)
        with open(self.path, "ab") as file:
            np.where(broken_N[:, None], np.float32(0), rows_ND).astype(np.float32).tofile(file)
        self.rows, self.width = self.rows + len(rows_ND), rows_ND.shape[1]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start .. stop in memory."""
        count, offset = (stop - start) * self.width, start * self.width * 4
        return np.fromfile(self.path, np.float32, count, offset=offset).reshape(-1, self.width)

    @property
    def broken(self) -> np.ndarray:
        """Whether each row was not finite: bool [N]."""
        return np.concatenate(self._broken)

    def __len__(self) -> int:
        return self.rows


def encode_to(
    vectors: Vectors | None,
    chunks: Iterable[list[Dialogue]],
    model: Callable[[PackedBatch], torch.Tensor],
    packer: Packer,
    *,
    pack_tokens: int,
    device: torch.device,
    progress: tqdm,
) -> None:
    """Encode dialogues on all ranks and append an embedding of each turn on the rank that has a file. Collective."""
    windows = encode_windows(
        model,
        packer,
        chunks,
        pack_tokens=pack_tokens,
        device=device,
        shared=True,
        mark_broken=True,
        progress=progress,
    )
    for rows_ND in windows:
        with env.agreement():
            if vectors is not None:
                _append(vectors, rows_ND.numpy())
    progress.close()


def _append(vectors: Vectors, rows_ND: np.ndarray) -> None:
    try:
        vectors.append(rows_ND)
    except OSError as error:
        raise UserError(f"{vectors.path.parent}: can't write the embeddings there ({error.strerror})") from error
