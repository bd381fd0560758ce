"""What a run is judged by while it trains, on rows that it does not train on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from muco_ds.data.collator import Packer
from muco_ds.data.schema import PackedBatch, Record
from muco_ds.eval.encoder import Encoder
from muco_ds.eval.m3t import M3TTask
from muco_ds.eval.picture import retrieval_picture


@dataclass(frozen=True)
class HeldOut:
    """`values` for the log; `shown`: pictures (uint8 [height, width, 3]) and Markdown to look at, by tag."""

    values: dict[str, float]
    shown: Mapping[str, np.ndarray | str] = field(default_factory=dict)


class Validation(Protocol):
    """A judgement of the model as it is."""

    def __call__(self, model: Any, device: torch.device) -> HeldOut:
        """`model`: the engine of a task, in evaluation mode. Collective."""
        ...


class RetrievalValidation:
    """precision@1 on rows of questions and answers, and a picture of some answers.

    Args:
        sizes: smaller ones of the embedding that are scored too.
    """

    def __init__(self, records: list[Record], packer: Packer, *, pack_tokens: int, sizes: Sequence[int]) -> None:
        self.task = M3TTask.from_records(records)
        self.packer, self.pack_tokens, self.sizes = packer, pack_tokens, sizes

    def __call__(self, model: Callable[[PackedBatch], torch.Tensor], device: torch.device) -> HeldOut:
        rankings = self.task.rank(Encoder(model, self.packer, device, self.pack_tokens, self.sizes))
        values = {
            f"val/{name}/{key}": value
            for name, entry in self.task.results(rankings).items()
            for key, value in entry.items()
            if key.startswith("precision@1")
        }
        return HeldOut(values, {"val/answers": retrieval_picture(self.task, rankings[max(rankings)])})
