"""Where a run's numbers go: metrics.jsonl, TensorBoard, and the meter of a logging window."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
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
    | {"mfu", "pack_fill", "imbalance", "data_wait_frac", "peak_mem_gib", "resident_gib", "open_files"}
    | {f"{what}_{spread}" for what in ("step_s", "data_wait_s") for spread in ("p50", "p90", "max")}
    | {"slowest_rank", "slowest_late_s"}
)
"""Every line of metrics.jsonl holds at least these. `mfu` is null where the device has no sourced peak."""

WINDOW = 256
"""Steps whose times are kept between two logging steps: with a thousand ranks, two megabytes are gathered."""


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
        self._edge = time.perf_counter()
        self._reset()

    def _reset(self) -> None:
        self._start = time.perf_counter()
        self._waited = self._flops = 0.0
        self._pairs = self._tokens = self.replaced_images = 0
        self._steps: deque[tuple[float, float, float]] = deque(maxlen=WINDOW)

    def add(self, batch: StepBatch, waited: float, met: float) -> None:
        """A step, which ends here: the work of all ranks, the pictures that this rank replaced, the seconds that it
        waited for data and, at the step's edge, for the other ranks."""
        self._pairs += batch.pairs
        self._tokens += int(batch.cost["llm_tokens"])
        self._flops += batch.cost["flops"]
        self._waited += waited
        self.replaced_images += sum(pack.replaced_images for pack in batch.packs)
        now = time.perf_counter()
        self._steps.append((now - self._edge, waited, met))
        self._edge = now

    @contextmanager
    def paused(self) -> Iterator[None]:
        if torch.cuda.is_available():  # steps still queued belong to the time before
            torch.cuda.synchronize()
        start = time.perf_counter()
        yield
        pause = time.perf_counter() - start
        self._start += pause
        self._edge += pause

    def own(self, device: torch.device) -> torch.Tensor:
        """What `spread` needs of this rank and its device, before `rates` ends the window.

        Returns:
            float32 [3 n + 3]: seconds of the window's n steps, of their waits for data and for ranks; memory, files.
        """
        process = psutil.Process()
        held = [process.memory_info().rss / 2**30, peak_memory_gib(device), float(process.num_fds())]
        return torch.tensor([*(value for column in zip(*self._steps, strict=True) for value in column), *held])

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


def spread(own_RV: np.ndarray) -> dict[str, float | int]:
    """Times of single steps over all ranks and the window, the largest memory, and the slowest rank.

    Ranks take a step together, so that a slow one is known by not waiting: it comes last to the step's edge. What
    makes it late there is its data, its processor or its disk; a slow GPU hides in the collectives within the step.

    Args:
        own_RV: a row of `Meter.own` of each rank.
    """
    step_RN, data_RN, met_RN = np.split(own_RV[:, :-3], 3, axis=1)
    values: dict[str, float | int] = {}
    for name, seconds in (("step_s", step_RN), ("data_wait_s", data_RN)):
        p50, p90 = np.percentile(seconds, [50, 90]).tolist()
        values |= {f"{name}_p50": p50, f"{name}_p90": p90, f"{name}_max": float(seconds.max())}
    met_R = met_RN.mean(axis=1)
    slowest = int(met_R.argmin())
    others = np.delete(met_R, slowest)
    late = float(np.median(others) - met_R[slowest]) if len(others) else 0.0
    resident, peak, files = own_RV[:, -3:].max(axis=0).tolist()
    values |= {"slowest_rank": slowest, "slowest_late_s": late}
    return values | {"resident_gib": resident, "peak_mem_gib": peak, "open_files": int(files)}


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
