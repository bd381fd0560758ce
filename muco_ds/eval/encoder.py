"""The model under evaluation: what turns dialogues into embeddings, on all ranks together."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from muco_ds.data.collator import Packer
from muco_ds.data.schema import Dialogue, PackedBatch
from muco_ds.distributed import env
from muco_ds.models.encode import WINDOW_DIALOGUES, encode_windows
from muco_ds.models.items import first_problem
from muco_ds.models.shards import Layout, Rows, Source, encode_shards

_TIMED_DIALOGUES = 64  # of a rank between two looks at the clock


class OutOfTime(Exception):
    """The deadline of an encoder has passed; raised on every rank at the same place."""


@dataclass(frozen=True)
class Store:
    """Where embeddings of large sources are kept and found again.

    Args:
        model: what JSON can hold, equal where the model is the same.
        width: components of its embeddings.
    """

    folder: Path
    model: Any
    width: int


@dataclass(frozen=True)
class InMemory:
    """Rows: an array."""

    array_ND: np.ndarray

    @property
    def width(self) -> int:
        return self.array_ND.shape[1]

    def __len__(self) -> int:
        return len(self.array_ND)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.array_ND[start:stop]


@dataclass(frozen=True)
class Encoder:
    """A model, or the engine that trains one, and how it is to encode.

    Args:
        pack_tokens: token budget of one forward; None: that of the device.
        sizes: smaller ones of a Matryoshka embedding that are scored too.
        progress: show progress bars on rank 0.
        deadline: `time.monotonic()` of rank 0 after which encoding ends with `OutOfTime`.
        store: where `rows` keeps embeddings; every rank then needs the whole model. None: in memory.
    """

    model: Callable[[PackedBatch], torch.Tensor]
    packer: Packer
    device: torch.device
    pack_tokens: int | None = None
    sizes: Sequence[int] = ()
    progress: bool = False
    deadline: float | None = None
    store: Store | None = None

    def encode(self, dialogues: Sequence[Dialogue], name: str, *, mark_broken: bool = False) -> torch.Tensor:
        """Embeddings of every turn, [N, D] float32 on the CPU, in order, the same on every rank. Collective.

        Args:
            name: for the progress bar.
            mark_broken: rows of pictures that can't be used are NaN; else they are an error.
        Raises:
            UserError: on every rank, naming a picture that can't be used.
            OutOfTime: the deadline has passed.
        """
        rows = sum(len(dialogue.turns) for dialogue in dialogues)
        bounds = self._bounds(len(dialogues))
        windows = (dialogues[start:stop] for start, stop in bounds)
        return torch.cat(list(self._encode(windows, len(bounds), rows, name, mark_broken)))

    def rows(self, source: Source, name: str, key: str) -> Rows:
        """Embeddings of a source, float16 [N, D]; rows that can't be encoded are zero. Collective.

        Args:
            name: of the source in the store, and for the progress bar.
            key: equal where the source's dialogues are.
        Raises:
            UserError: on every rank.
            OutOfTime: the deadline has passed.
        """
        if self.store is None:
            bounds = self._bounds(len(source))
            windows = (source.dialogues(start, stop) for start, stop in bounds)
            parts = self._encode(windows, len(bounds), source.rows, name, mark_broken=True)
            return InMemory(np.concatenate([_half(part_ND) for part_ND in parts]))
        facts = json.dumps([self.store.model, key]).encode()
        digest = hashlib.blake2b(facts, digest_size=16).hexdigest()
        return encode_shards(
            self.model,
            self.packer,
            source,
            self.store.folder / name,
            Layout(digest, len(source), self.store.width, "float16"),
            device=self.device,
            pack_tokens=self.pack_tokens,
            mark_broken=True,
            progress=name if self.progress else None,
        )

    def unusable(self, dialogues: Sequence[Dialogue], suspect_N: torch.Tensor) -> dict[int, str]:
        """Which of the suspects have a picture that can't be used, and why, by their place. Collective.

        Others were made what they are by the model itself, which is no reason to leave them out.
        """
        reasons: dict[int, str] = {}
        if env.is_main():
            for i in suspect_N.nonzero()[:, 0].tolist():
                if problem := first_problem(dialogues[i], self.packer.images.patches):
                    reasons[i] = "picture {}: {}".format(*problem)
        return env.from_main(reasons)

    def _bounds(self, count: int) -> list[tuple[int, int]]:
        """Of windows of so many dialogues; one, perhaps empty, at least."""
        size = (WINDOW_DIALOGUES if self.deadline is None else _TIMED_DIALOGUES) * env.world_size()
        return [(start, min(start + size, count)) for start in range(0, max(count, 1), size)]

    def _encode(
        self, windows: Iterable[Sequence[Dialogue]], count: int, rows: int, name: str, mark_broken: bool
    ) -> Iterator[torch.Tensor]:
        """`count` windows of so many rows in all."""
        with tqdm(total=rows, desc=name, unit="row", disable=not (self.progress and env.is_main())) as bar:
            encoded = encode_windows(
                self.model,
                self.packer,
                windows,
                pack_tokens=self.pack_tokens,
                device=self.device,
                shared=True,
                mark_broken=mark_broken,
                progress=bar,
            )
            for number, window in enumerate(encoded, 1):
                yield window
                if number < count and self.deadline is not None and env.from_main(time.monotonic() > self.deadline):
                    raise OutOfTime


def _half(emb_ND: torch.Tensor) -> np.ndarray:
    return torch.where(emb_ND.isfinite().all(1, keepdim=True), emb_ND, 0).half().numpy()
