"""The model under evaluation: what turns dialogues into embeddings, on all ranks together."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from muco_ds.data.collator import Packer
from muco_ds.data.schema import Dialogue, PackedBatch
from muco_ds.distributed import env
from muco_ds.models.encode import WINDOW_DIALOGUES, encode_windows

_TIMED_DIALOGUES = 64  # of a rank between two looks at the clock


class OutOfTime(Exception):
    """The deadline of an encoder has passed; raised on every rank at the same place."""


@dataclass(frozen=True)
class Encoder:
    """A model, or the engine that trains one, and how it is to encode.

    Args:
        pack_tokens: token budget of one forward; None: that of the device.
        sizes: smaller ones of a Matryoshka embedding that are scored too.
        progress: show progress bars on rank 0.
        deadline: `time.monotonic()` of rank 0 after which encoding ends with `OutOfTime`.
    """

    model: Callable[[PackedBatch], torch.Tensor]
    packer: Packer
    device: torch.device
    pack_tokens: int | None = None
    sizes: Sequence[int] = ()
    progress: bool = False
    deadline: float | None = None

    def encode(self, dialogues: Sequence[Dialogue], name: str, *, mark_broken: bool = False) -> torch.Tensor:
        """Embeddings of every turn, [N, D] float32 on the CPU, in order, the same on every rank. Collective.

        Args:
            name: for the progress bar.
            mark_broken: rows of pictures that can't be used are NaN; else they are an error.
        Raises:
            UserError: on every rank, naming a picture that can't be used.
            OutOfTime: the deadline has passed.
        """
        size = (WINDOW_DIALOGUES if self.deadline is None else _TIMED_DIALOGUES) * env.world_size()
        rows = sum(len(dialogue.turns) for dialogue in dialogues)
        with tqdm(total=rows, desc=name, unit="row", disable=not (self.progress and env.is_main())) as bar:
            starts = range(0, max(len(dialogues), 1), size)
            windows = encode_windows(
                self.model,
                self.packer,
                (dialogues[start : start + size] for start in starts),
                pack_tokens=self.pack_tokens,
                device=self.device,
                shared=True,
                mark_broken=mark_broken,
                progress=bar,
            )
            return torch.cat(list(self._in_time(windows, len(starts))))

    def _in_time(self, windows: Iterator[torch.Tensor], count: int) -> Iterator[torch.Tensor]:
        for number, window in enumerate(windows, 1):
            yield window
            if number < count and self.deadline is not None and env.from_main(time.monotonic() > self.deadline):
                raise OutOfTime
