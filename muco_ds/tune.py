"""Packs and activation checkpointing for a device, found by a few short steps of the real run on it.

A step needs as many packs as `batch.pack_tokens` makes of it, so only budgets that save a pack are candidates. For each
number of packs the estimate says how many layers must be recomputed; as it may be wrong, so many for a smaller and for
a larger device are candidates too. They are tried in the order of the FLOPs that they take.

One device stands for one rank of the planned run: it gets that rank's share of the examples. What it holds more or less
than that rank, sharded states above all, is the difference of two estimates.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from muco_ds.build import Data, build_data
from muco_ds.config import RunConfig, ValidationOptions, save_config
from muco_ds.config_activations import ActivationCheckpointing
from muco_ds.config_checkpoint import CheckpointOptions
from muco_ds.data.assign import least_pack_tokens
from muco_ds.data.plan import spread_steps
from muco_ds.data.stages.base import longest_rows
from muco_ds.errors import UserError
from muco_ds.families import text_shape, vision_shape
from muco_ds.memory import CONTEXT, GIB, Memory
from muco_ds.memory_activations import Load
from muco_ds.models.backbones import load_config
from muco_ds.preflight import SPARE_TOKENS, Planned, estimated, look_at, worst
from muco_ds.sizing import choices, least, overrides, with_checkpointing

_DEVICES = (0.8, 1.0, 1.25)  # of the device's memory: by so much the estimate may be wrong
_MOST_PACKS = 64
_NO_HOPE = 1.1  # of the FLOPs of the best so far: more are not tried


@dataclass(frozen=True)
class Candidate:
    """Settings, and what is expected of them: bytes on the fullest rank of the planned run, FLOPs of its step."""

    packs: int
    pack_tokens: int
    checkpointing: ActivationCheckpointing
    estimated: int
    flops: float

    @property
    def overrides(self) -> dict[str, float]:
        """By dotted key."""
        return {"batch.pack_tokens": self.pack_tokens, **overrides(self.checkpointing)}


@dataclass(frozen=True)
class Measured:
    """What a try says (`muco_ds.tune_try`): median seconds of a step, bytes at most, and what the step was."""

    seconds: float
    peak: int
    load: Load
    flops: float
    device: str


Run = Callable[[RunConfig, int], Measured | None]
"""Steps of a configuration with so many packs each; None: out of memory."""


@dataclass(frozen=True)
class Trial:
    """A candidate that was tried.

    `needed`: bytes on a rank of the planned run, the context included; `pairs_per_s`: of one GPU.
    """

    candidate: Candidate
    measured: Measured | None
    needed: int | None
    pairs_per_s: float
    fits: bool


@dataclass(frozen=True)
class Tuning:
    """All tries in order, and the fastest that fits."""

    ranks: int
    gpu_memory_gib: float
    trials: list[Trial]

    @property
    def best(self) -> Trial | None:
        fitting = [trial for trial in self.trials if trial.fits]
        return max(fitting, key=lambda trial: trial.pairs_per_s, default=None)

    def as_json(self) -> dict[str, Any]:
        tree = asdict(self)
        tree["best"] = None if self.best is None else self.best.candidate.overrides
        return tree


def tune(config: RunConfig, ranks: int, gpu_memory_gib: float, most_steps: int, tries: int, run: Run) -> Tuning:
    """Try up to `tries` candidates for `ranks` ranks with so much memory each.

    Raises:
        UserError: wrong input of any kind.
    """
    limit = gpu_memory_gib * GIB
    data = build_data(config, ranks)
    plan = data.plan
    steps = [plan.step(number) for number in spread_steps(config.run.steps(plan.mixture.steps_per_epoch), most_steps)]
    planned = [look_at(plan, step) for step in steps]
    alone = one_rank(config, ranks)
    trials: list[Trial] = []
    for candidate in candidates(config, data, ranks, planned, limit):
        best = Tuning(ranks, gpu_memory_gib, trials).best
        if len(trials) == tries or (best and candidate.flops > _NO_HOPE * best.candidate.flops):
            break
        if any(not trial.fits and trial.candidate.estimated <= candidate.estimated for trial in trials):
            continue  # less was too much
        errors = [trial.candidate.estimated - trial.needed for trial in trials if trial.needed is not None]
        if errors and candidate.estimated - max(errors) > limit:
            continue  # the estimate is known better by now
        if best and candidate.packs >= best.candidate.packs:
            continue  # neither fewer packs nor fewer FLOPs
        measured = run(_with(alone, candidate), candidate.packs)
        if measured is None:
            trials.append(Trial(candidate, None, None, 0.0, fits=False))
            continue
        here = estimated(_with(alone, candidate), data, 1, measured.load)
        there = estimated(_with(config, candidate), data, ranks, _in_packs(planned, candidate))
        needed = measured.peak + _held(there) - _held(here) + CONTEXT
        pairs = sum(step.pairs for step in planned) / sum(1e12 * step.tflop for step in planned)
        rate = pairs * measured.flops / measured.seconds
        trials.append(Trial(candidate, measured, needed, rate, fits=needed <= limit))
    return Tuning(ranks, gpu_memory_gib, trials)


def candidates(config: RunConfig, data: Data, ranks: int, planned: list[Planned], limit: float) -> list[Candidate]:
    """What is worth a try, least FLOPs first."""
    backbone = load_config(config.model.path)
    options = choices(ActivationCheckpointing(0.0), backbone, config.model.freeze_vision)
    found: set[tuple[int, float, float | None]] = set()
    chosen = []
    for packs, budget in budgets(data, ranks, planned).items():

        def total(choice: ActivationCheckpointing, packs: int = packs, budget: int = budget) -> int:
            sized = Candidate(packs, budget, choice, 0, 0.0)
            return estimated(_with(config, sized), data, ranks, _in_packs(planned, sized)).total

        for share in _DEVICES:
            choice = least(options, total, share * limit)
            if choice is None or (key := (packs, choice.text, choice.vision)) in found:
                continue
            found.add(key)
            flops = _flops(config, data, ranks, planned, packs, choice)
            chosen.append(Candidate(packs, budget, choice, total(choice), flops))
    return sorted(chosen, key=lambda candidate: (candidate.flops, candidate.packs))


def budgets(data: Data, ranks: int, planned: list[Planned]) -> dict[int, int]:
    """Number of packs a rank -> the smallest `batch.pack_tokens` with which all planned steps need no more."""
    plan, longest = data.plan, int(longest_rows(data.plan.stage).max())
    tokens = []
    for step in (plan.step(item.step - 1) for item in planned):
        tokens.append(plan.costs(step.samples_B, step.passes_B, step.step).tokens_B)
    found: dict[int, int] = {}
    for packs in range(1, _MOST_PACKS + 1):
        needed = max(least_pack_tokens(tokens_B, ranks, packs, int(tokens_B.sum())) for tokens_B in tokens)
        found[packs] = max(longest, math.ceil(SPARE_TOKENS * needed))
        if found[packs] == longest:
            break
    return found


def _in_packs(planned: list[Planned], candidate: Candidate) -> Load:
    """The fullest rank's load, in the candidate's packs."""
    load = worst(planned)
    share = min(1.0, candidate.pack_tokens / (load.packs * load.tokens))
    whole = {name: load.packs * getattr(load, name) for name in ("attended", "predicted", "read", "read_attended")}
    parts = {name: math.ceil(share * size) for name, size in {**whole, "patches": load.rank_patches}.items()}
    tokens = min(candidate.pack_tokens, load.packs * load.tokens)
    return replace(load, packs=candidate.packs, tokens=tokens, **parts)


def _flops(
    config: RunConfig, data: Data, ranks: int, planned: list[Planned], packs: int, choice: ActivationCheckpointing
) -> float:
    """Of a rank's mean step, with what is computed again: recomputed layers, and pass one of several packs."""
    backbone, model = load_config(config.model.path), data.plan.flops
    text, vision = text_shape(backbone), vision_shape(backbone)

    def mean(name: str) -> float:
        return sum(getattr(step, name) for step in planned) / len(planned) / ranks

    again = choice.text_layers(text.layers) / text.layers + (packs > 1)
    total = 1e12 * mean("tflop") + again * (model.per_token + model.adapter_per_token) * mean("llm_tokens")
    if not config.model.freeze_vision:
        again = choice.vision_layers(vision.depth) / vision.depth + (packs > 1)
        total += again * model.per_patch * mean("vit_patches")
    return total


def one_rank(config: RunConfig, ranks: int) -> RunConfig:
    """The run of one rank's share of the examples, which leaves nothing behind."""
    return replace(
        config,
        batch=replace(config.batch, images=max(2, math.ceil(config.batch.images / ranks)), source_run=1),
        validation=ValidationOptions(every=0),
        checkpoint=CheckpointOptions(resume=False),
    )


def _with(config: RunConfig, candidate: Candidate) -> RunConfig:
    changed = with_checkpointing(config, candidate.checkpointing)
    return replace(changed, batch=replace(changed.batch, pack_tokens=candidate.pack_tokens))


def _held(memory: Memory) -> int:
    """Without the allowance: blocks of the allocator are measured with their fragmentation."""
    return memory.total - memory.allowance


def run_try(config: RunConfig, packs: int) -> Measured | None:
    """In a process of its own: one that runs out of memory leaves nothing behind, and the next starts from nothing.

    Raises:
        UserError: the run ended for another reason.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_config(replace(config, run=replace(config.run, dir=name)), folder / "config.yaml")
        alone = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        command = [sys.executable, "-m", "muco_ds.tune_try", str(folder / "config.yaml"), str(packs), name]
        done = subprocess.run(command, env=alone, capture_output=True, text=True)
        if done.returncode == -9:  # the kernel's answer where host memory is short
            return None
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise UserError(f"a try of {config.batch.pack_tokens} tokens a pack ended: {lines[-1]}")
        found = json.loads((folder / "measured.json").read_text())
    return None if found is None else Measured(**{**found, "load": Load(**found["load"])})


def snippet(tuning: Tuning, recipe: str) -> str:
    """The best as a recipe that goes on top of the run's own: `--config RECIPE --config FILE`."""
    best = tuning.best
    assert best is not None and best.measured is not None and best.needed is not None
    options = best.candidate.checkpointing
    shares = {name: share for name, share in asdict(options).items() if share is not None}
    inner = ", ".join(f"{name}: {share}" for name, share in shares.items())
    return (
        f"# tools/preflight.py --tune on {best.measured.device}, for {tuning.ranks} ranks of "
        f"{tuning.gpu_memory_gib:g} GiB: {best.pairs_per_s:.1f} pairs/s a GPU, {best.needed / GIB:.1f} GiB.\n"
        f"# After the recipe: --config {recipe} --config THIS_FILE\n"
        f"model:\n  activation_checkpointing: {{{inner}}}\nbatch: {{pack_tokens: {best.candidate.pack_tokens}}}\n"
    )
