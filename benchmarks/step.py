#!/usr/bin/env python3
"""Pairs per second of a whole training step: ours beside the ways people train today, in turns in one process.

    python benchmarks/step.py --preset {cpu,cpu_tiny,h200_2b,h200_7b} [--workloads ...] [--systems ...] [--repeats N]

Systems, all from the same weights on the same global batch, with the same AdamW and precision, vision tower frozen:

- ours: the Trainer's own step under ZeRO-3: packed, one forward, turns see the earlier ones;
- ours_isolated: the same, each turn by itself beside the picture: the loss of single-turn prompts;
- padded_two_forward: the released MuCo's way: padded queries, padded targets, activation checkpointing always, the
  final norm on all tokens, eager pooling, dense loss;
- padded_best: the same at its best: sorted by length into batches of the fastest size, no mask, positions prepared,
  checkpointing or gradient cache only where memory asks;
- single_turn: each turn a padded prompt with its own copy of the picture (VLM2Vec's and sentence-transformers' way),
  tuned likewise;
- sentence_transformers: the library itself, where the batch is of single turns and no picture comes twice.

Ratios are theirs over ours in seconds, medians over the rounds. Before anything is timed, losses and gradients are
compared; where they differ the ratio is refused. FLOPs are model FLOPs of both towers (`muco_ds.flops`): what a system
feeds its model, without padding and recomputation. The last line is one JSON object about the main workload.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from muco_ds.config import RunConfig
from muco_ds.distributed import env
from muco_ds.flops import peak_flops
from muco_ds.models.backbones import load_tokenizer
from muco_ds.trainer import Trainer

from baselines.library import LibraryForm, LibrarySystem, export, missing
from baselines.padded import RELEASED, PaddedSystem
from baselines.stock import Stock
from ceilings import matmul
from harness import peak_growth, percentiles, provenance, record, sample
from measure import ProcessorClock, agreement, per_second, split, tune
from model_shapes import write_shape
from systems import PRESETS, TEMPERATURE, Ours, Preset, System, run_config
from workloads import MAIN, WORKLOADS, write_rows

RESULTS = Path(__file__).parent / "results" / "step.jsonl"
SYSTEMS = ("ours", "ours_isolated", "padded_two_forward", "padded_best", "single_turn", "sentence_transformers")
OURS_OF = {
    **{"padded_two_forward": "ours", "padded_best": "ours", "single_turn": "ours_isolated"},
    "sentence_transformers": "ours",
}
"""Each baseline and our system with the same loss."""


class Bench:
    """One process: a Trainer, a stock model beside it, and the workloads' rows."""

    def __init__(self, preset: Preset, folder: Path, workloads: list[str]) -> None:
        self.preset, self.folder, self.device = preset, folder, env.start()
        write_shape(folder / "model", preset.shape, torch.bfloat16 if preset.precision == "bf16" else torch.float32)
        tokenizer = load_tokenizer(str(folder / "model"), "<|emb|>")
        for name in workloads:
            write_rows(folder / name, WORKLOADS[name], preset.pictures, tokenizer, preset.images[name], preset.seed)
        self.config = run_config(folder, preset, workloads[0])
        self.trainer = Trainer(self.config, self.device)
        self.stock = Stock(self.config, self.trainer.data.processing.tokenizer, self.device)

    def build(self, workload: str, names: list[str]) -> dict[str, System]:
        """The systems of a workload, each in its fastest form that fits."""
        preset = self.preset
        systems: dict[str, System] = {}
        forms: Sequence[Any]
        config = run_config(self.folder, preset, workload)
        ours = Ours(self.trainer, config, history=True)
        padded = (self.stock, ours.sides(), ours.packer, TEMPERATURE, self.trainer.data.plan.flops)
        for name in names:
            system: System
            if name == "ours":
                system, forms = ours, preset.ours
            elif name == "ours_isolated":
                system, forms = Ours(self.trainer, config, history=False), preset.ours
            elif name == "sentence_transformers":
                system, forms = self._library(config, ours), (LibraryForm(),)
            elif name == "single_turn":
                system, forms = PaddedSystem(*padded, alone=True), preset.single
            else:
                system, forms = PaddedSystem(*padded, alone=False), preset.padded
            systems[name] = system
            tune(system, (RELEASED,) if name == "padded_two_forward" else forms)
        return systems

    def _library(self, config: RunConfig, ours: Ours) -> LibrarySystem:
        folder, processing = self.folder / "exported", self.trainer.data.processing
        if not folder.exists():
            export(self.stock, processing, folder)
        given = (ours.sides(), ours.packer, TEMPERATURE, self.trainer.data.plan.flops)
        return LibrarySystem(folder, config, *given, self.device)


def left_out(preset: Preset, workload: str) -> dict[str, str]:
    """Systems that have nothing to say about a workload, and why."""
    if WORKLOADS[workload].turns > 1:
        return {"sentence_transformers": "it takes pairs of single turns and masks no key of the same picture"}
    reasons = {"ours_isolated": "of one turn it is ours", "single_turn": "of one turn it is padded_best"}
    if preset.precision == "bf16":
        reasons["sentence_transformers"] = "in bf16 its optimizer has no float32 weights"
    elif (reason := missing()) is not None:
        reasons["sentence_transformers"] = reason
    return reasons


def run(bench: Bench, workload: str, names: list[str], repeats: int) -> dict[str, Any]:
    skipped = {name: reason for name, reason in left_out(bench.preset, workload).items() if name in names}
    for name, reason in skipped.items():
        print(f"{workload}: {name} is skipped: {reason}", flush=True)
    systems = bench.build(workload, [name for name in names if name not in skipped])
    agree = {
        name: agreement(systems[ours], systems[name], bench.preset.precision)
        for name, ours in OURS_OF.items()
        if name in systems and ours in systems
    }
    product = matmul(bench.device)
    clocks = {
        name: ProcessorClock(work)
        for name, work in [*((n, s.step) for n, s in systems.items()), ("matmul", product.run)]
    }
    seconds = sample({name: clock.run for name, clock in clocks.items()}, repeats, 0)
    on_gpu = bench.device.type == "cuda"
    busy = seconds if on_gpu else {name: clock.seconds for name, clock in clocks.items()}
    matmul_flops = product.amount / percentiles(busy["matmul"])["p50"]
    entry: dict[str, Any] = {
        "benchmark": f"step/{workload}",
        "model": bench.preset.shape,
        "precision": bench.preset.precision,
        "images": bench.preset.images[workload],
        "repeats": repeats,
        "matmul_gflops": round(matmul_flops / 1e9, 1),
        "systems": {},
        "agreement": agree,
        "skipped": skipped,
    }
    for name, system in systems.items():
        phases: dict[str, float | None] = {}
        growth = peak_growth(lambda: phases.update(split(system)))  # noqa: B023 - called at once
        entry["systems"][name] = {
            "form": system.form.label,
            "pairs": system.pairs,
            "seconds": percentiles(seconds[name]),
            "processor_seconds": None if on_gpu else percentiles(busy[name]),
            **per_second(system, percentiles(seconds[name])["p50"], entry["images"], peak_flops(bench.device)),
            "share_of_matmul": round(system.flops() / percentiles(busy[name])["p50"] / matmul_flops, 3),
            "tokens": system.tokens,
            "padding": round(system.padding, 3),
            "peak_growth_gib": None if growth is None else round(growth / 2**30, 3),
            "split_seconds": phases,
        }
    for name, found in agree.items():
        if found["same"]:
            ratios = [theirs / mine for theirs, mine in zip(seconds[name], seconds[OURS_OF[name]], strict=True)]
            entry[f"ratio_{name}"] = percentiles(ratios)
            if not on_gpu:
                used = zip(busy[name], busy[OURS_OF[name]], strict=True)
                entry[f"processor_ratio_{name}"] = percentiles([theirs / mine for theirs, mine in used])
        else:
            skipped[f"ratio_{name}"] = f"refused: losses or gradients differ: {found}"
            print(f"{workload}: ratio_{name} {skipped[f'ratio_{name}']}", flush=True)
    return entry


def summary(entries: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the last line says: of the main workload, and the ratios of the others."""
    others = {name: _ratios(entry) for name, entry in entries.items() if name != MAIN}
    if MAIN not in entries:
        return {"others": others, "skipped": {MAIN: "not among --workloads"}}
    entry = entries[MAIN]
    ratios: dict[str, float | None] = {
        f"ratio_{name}": None for name in ("padded_two_forward", "padded_best", "single_turn")
    }
    ratios |= _ratios(entry)
    return {
        "workload": MAIN,
        "model": entry["model"],
        "device": entry["device"],
        "pairs_per_s": {name: found["pairs_per_s"] for name, found in entry["systems"].items()},
        **ratios,
        "processor_ratios": _ratios(entry, "processor_ratio_"),
        "others": others,
        "skipped": entry["skipped"],
    }


def _ratios(entry: dict[str, Any], prefix: str = "ratio_") -> dict[str, float]:
    return {name: entry[name]["p50"] for name in entry if name.startswith(prefix)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, required=True)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--repeats", type=int, help="rounds that are timed (default: the preset's)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    preset = PRESETS[args.preset]
    if args.preset.startswith("h200") and not torch.cuda.is_available():
        print(json.dumps({"skipped": {args.preset: "needs a CUDA GPU"}}))
        return 0
    entries = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(preset, Path(folder), args.workloads)
        for workload in args.workloads:
            entry = {**run(bench, workload, args.systems, args.repeats or preset.repeats), **provenance()}
            record(args.results, entry)
            entries[workload] = entry
        env.stop()
    print(json.dumps(summary(entries)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
