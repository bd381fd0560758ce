"""Where a run's numbers go: metrics.jsonl, TensorBoard, and the meter of a logging window."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import yaml
from torch.utils.tensorboard import SummaryWriter

from muco_ds.data.schema import StepBatch

CONTRASTIVE_KEYS = frozenset(
    {"temperature", "masked_frac", "same_image_frac", "same_target_frac", "false_negative_frac", "extra_positive_frac"}
    | {"in_batch_top1", "pos_sim", "hardest_neg_sim", "negatives"}
)
"""Of a contrastive loss; null where the task has another. `masked_frac` is the sum of the three that follow it:
row/key entries excluded for the row's image, else its target's text, else their similarity."""

METRIC_KEYS = CONTRASTIVE_KEYS | frozenset(
    {"step", "loss", "lr", "grad_norm", "pairs", "images", "llm_tokens", "vit_patches", "pairs_per_s", "tokens_per_s"}
    | {"mfu", "pack_fill", "imbalance", "data_wait_frac", "peak_mem_gib"}
)
"""Every line of metrics.jsonl holds at least these. `mfu` is null where the device has no sourced peak."""


class MetricsWriter:
    """Writes one line a logging step to metrics.jsonl and the same numbers to TensorBoard; rank 0 only.

    Args:
        folder: the run's folder.
        start_step: steps from here on will be written again; lines of a run that was cut off later are dropped.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        self._path = folder / "metrics.jsonl"
        self._drop_after(start_step)
        self._file = open(self._path, "a", buffering=1)  # noqa: SIM115 - lives as long as the run
        self._board = SummaryWriter(str(folder / "tb"), purge_step=start_step + 1)

    def _drop_after(self, step: int) -> None:
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (json.JSONDecodeError, KeyError):  # the line a killed run was writing
                continue
        work = self._path.with_suffix(".tmp")
        work.write_text("".join(kept))
        os.replace(work, self._path)

    def config(self, config: dict) -> None:
        self._board.add_text("config", f"```yaml\n{yaml.safe_dump(config, sort_keys=False)}```")

    def write(self, values: dict[str, float | int | None]) -> None:
        """`values` holds METRIC_KEYS at least; None and what is not finite are written as null and not plotted."""
        assert values.keys() >= METRIC_KEYS, METRIC_KEYS - values.keys()
        values = {key: value if value is None or math.isfinite(value) else None for key, value in values.items()}
        self._file.write(json.dumps(values) + "\n")
        step = int(values["step"] or 0)
        for key, value in values.items():
            if key != "step" and value is not None:
                self._board.add_scalar(f"train/{key}" if "/" not in key else key, value, step)

    def show(self, shown: Mapping[str, np.ndarray | str], step: int) -> None:
        """By tag: pictures, uint8 [height, width, 3], and texts in Markdown."""
        for tag, content in shown.items():
            if isinstance(content, str):
                self._board.add_text(tag, content, step)
            else:
                self._board.add_image(tag, content, step, dataformats="HWC")

    def close(self) -> None:
        self._file.close()
        self._board.close()


class Meter:
    """Sums work and time between two logging steps; validation and saving don't count."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._start = time.perf_counter()
        self._waited = self._flops = 0.0
        self._pairs = self._tokens = self.replaced_images = 0

    def add(self, batch: StepBatch, waited: float) -> None:
        """A step: the work of all ranks, the pictures that this rank replaced, the seconds it waited for data."""
        self._pairs += batch.pairs
        self._tokens += int(batch.cost["llm_tokens"])
        self._flops += batch.cost["flops"]
        self._waited += waited
        self.replaced_images += sum(pack.replaced_images for pack in batch.packs)

    @contextmanager
    def paused(self) -> Iterator[None]:
        if torch.cuda.is_available():  # steps still queued belong to the time before
            torch.cuda.synchronize()
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def rates(self, world_size: int, peak: float | None) -> dict[str, float | None]:
        """Throughput of all ranks over the window, which ends here. The caller has waited for the device."""
        seconds = time.perf_counter() - self._start
        rates = {
            "pairs_per_s": self._pairs / seconds,
            "tokens_per_s": self._tokens / seconds,
            "mfu": None if peak is None else self._flops / seconds / (peak * world_size),
            "data_wait_frac": self._waited / seconds,
        }
        self._reset()
        return rates


def mask_fractions(total: Mapping[str, float]) -> dict[str, float]:
    """Shares of the row/key entries that are no negatives for each reason, from the loss's sums over all ranks."""
    entries = total["entries"]
    fractions = {
        "same_image_frac": total["same_image"] / entries,
        "same_target_frac": total["same_target"] / entries,
        "false_negative_frac": total["false_negatives"] / entries,
    }
    extra = total["extra_positives"] / entries
    return {"masked_frac": sum(fractions.values()), **fractions, "extra_positive_frac": extra}


def peak_memory_gib(device: torch.device) -> float:
    """Most memory ever held: allocated on a GPU, resident in a CPU process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
