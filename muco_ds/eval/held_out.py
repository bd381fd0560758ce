"""What a run is judged by while it trains: rows that it does not train on, and benchmarks."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from muco_ds.data.collator import Packer
from muco_ds.data.schema import PackedBatch, Record
from muco_ds.distributed import env
from muco_ds.errors import UserError
from muco_ds.eval.encoder import Encoder, OutOfTime
from muco_ds.eval.m3t import M3TTask
from muco_ds.eval.picture import retrieval_picture
from muco_ds.eval.suite import Entry, Suite, scores_of

log = logging.getLogger(__name__)


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


class SuiteValidation:
    """The data sets of a benchmark, as many as `seconds` allow; the next time goes on with those that are left.

    A score stands at the step of its own data set. Means are given where all data sets were scored at one step.
    A problem with a data set is logged and does not end the run.
    """

    def __init__(self, suite: Suite, packer: Packer, *, pack_tokens: int, sizes: Sequence[int], seconds: float) -> None:
        self.suite, self.packer, self.pack_tokens, self.sizes = suite, packer, pack_tokens, sizes
        self.seconds = seconds
        self._next = deque(suite.datasets)

    def __call__(self, model: Callable[[PackedBatch], torch.Tensor], device: torch.device) -> HeldOut:
        end = time.monotonic() + self.seconds
        encoder = Encoder(model, self.packer, device, self.pack_tokens, self.sizes, deadline=end)
        entries: dict[str, Entry] = {}
        for number in range(len(self._next)):
            dataset = self._next[0]
            try:
                entries |= self.suite.score(dataset, encoder)
            except OutOfTime:
                if number == 0:
                    self._next.rotate(-1)  # or it would keep all others from ever being scored
                    self._warn(f"{dataset}: {self.seconds:g} seconds are not enough: raise seconds or lower rows")
                break
            except UserError as error:
                self._warn(str(error))
            self._next.rotate(-1)
            if env.from_main(time.monotonic() > end):
                break
        shown = self.suite.results(entries) if len(entries) >= len(self.suite.datasets) else entries
        values = {
            f"{self.suite.name}/{name}/{score}": value
            for name, entry in shown.items()
            for score, value in scores_of(entry).items()
        }
        return HeldOut(values, {f"{self.suite.name}/scores": _table(shown)} if shown else {})

    def _warn(self, problem: str) -> None:
        if env.is_main():
            log.warning("evaluation.%s: %s", self.suite.name, problem)


def _table(entries: Mapping[str, Entry]) -> str:
    """In Markdown, with the version of the benchmark that each score belongs to."""
    scores = list(dict.fromkeys(score for entry in entries.values() for score in scores_of(entry)))
    lines = ["| | " + " | ".join([*scores, "version"]) + " |", "|---" * (len(scores) + 2) + "|"]
    for name, entry in entries.items():
        cells = [f"{entry[score]:.4f}" if score in entry else "" for score in scores]
        lines.append(f"| {name} | " + " | ".join([*cells, str(entry.get("version", ""))]) + " |")
    return "\n".join(lines)
