"""Three steps of the real Trainer in many settings, against a plain loop in one process on whole batches.

    python tests/distributed/exactness.py [--ranks 1 2 4] [--family qwen3_vl]

runs the whole grid, {1, 2, 4 ranks} x {1, 3 packs} x {ZeRO 0, 2, 3} x {activation checkpointing} x {vision frozen,
trained}, and fine-tuning with reconstruction on every ZeRO stage, in fp32 and prints a table in Markdown. Every batch
holds ragged dialogues in both attention layouts, rows with and without a picture, and ragged hard negatives, some of
them with pictures, of which some are masked. Keys are gathered, under ZeRO 2 passed round in a ring. The temperature is
learned; keys with a row's target text are positives as well where the vision tower is frozen, and likely false
negatives are left out where it is not.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist

from muco_ds.build import Data, build_data, build_task
from muco_ds.config import (
    BatchOptions,
    DataOptions,
    LossOptions,
    ModelOptions,
    OptimOptions,
    RunConfig,
    RunOptions,
    TaskOptions,
    TemperatureOptions,
)
from muco_ds.config_activations import ActivationCheckpointing
from muco_ds.data.demo_scenes import row_texts, write_data
from muco_ds.data.plan import Plan, StepPlan
from muco_ds.data.schema import StepBatch
from muco_ds.distributed import env
from muco_ds.distributed.testing import run_distributed
from muco_ds.losses import InfoNCE, RowIds, info_nce
from muco_ds.models.backbones import load_backbone
from muco_ds.models.demo_model import write_model
from muco_ds.models.embedder import Embedder
from muco_ds.optim import build_optimizer, learning_rate
from muco_ds.trainer import Trainer

sys.path.append(str(Path(__file__).parents[1]))  # where pytest finds it, and this file as a program does not
from tiny_folders import KINDS, change_family

IMAGES, STEPS = 24, 3
LOG = "log_temperature"
MARGINS = [0.02 + 0.002 * i for i in range(20)]


@dataclass(frozen=True)
class Setting:
    """One cell of the grid."""

    packs: int
    stage: int
    checkpointing: float  # share of the layers
    frozen: bool
    finetune: bool = False


@dataclass
class Outcome:
    """Of a run: per step the global loss and every parameter's gradient, and the weights at the end.

    The temperature's logarithm is one of the parameters.
    """

    losses: list[float]
    gradients: list[dict[str, torch.Tensor]]
    weights: dict[str, torch.Tensor]
    packs: int


@dataclass(frozen=True)
class Errors:
    """Largest relative errors. A parameter's is that of its tensor's norm; the tensors whose true gradient is zero (a
    key bias, which a softmax ignores) are left out by their norm, below 1e-6 of the whole gradient's."""

    loss: float
    gradient: float
    weight: float

    def worst(self) -> float:
        return max(self.loss, self.gradient, self.weight)


def grid() -> list[Setting]:
    cells = [Setting(*cell) for cell in product((1, 3), (0, 2, 3), (0.0, 1.0), (True, False))]
    return [*cells, *(Setting(3, stage, 0.0, frozen=stage == 2, finetune=True) for stage in (0, 2, 3))]


def write_rows(folder: Path, scenes: int = 80, kind: str = "qwen2_vl") -> None:
    """A tiny model and a parquet of ragged rows, a third of them without a picture."""
    rows = write_data(folder / "data", scenes, 1, seed=0)
    write_model(folder / "model", row_texts(rows), seed=0)
    if kind != "qwen2_vl":
        change_family(folder / "model", kind)
    for i, row in enumerate(rows):
        turns = 1 + (3 * i) % 7
        for column in ("qry", "pos_text", "pos_sentence", "neg_text"):
            row[column] = row[column][:turns]
        if i % 3 == 0:
            row["qry_image_path"] = ""
        # The first is another row's target, which is masked where that row is in the batch; others have pictures too.
        others = [rows[(7 * i + k) % len(rows)] for k in range(i % 4)]
        row["neg_text"] = [other["pos_text"][0] for other in others]
        row["neg_image_path"] = [other["qry_image_path"] if k else "" for k, other in enumerate(others)]
    schema = pq.read_schema(folder / "data" / "train.parquet")
    schema = schema.append(pa.field("neg_image_path", pa.list_(pa.string())))
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / "data" / "train.parquet")


def run_config(folder: Path, setting: Setting, margin: float) -> RunConfig:
    stage = {"stage": setting.stage, "stage3_param_persistence_threshold": 0}
    name = "-".join(map(str, dataclasses.astuple(setting)))
    path = folder / f"zero{setting.stage}.json"
    if not dist.is_initialized() or dist.get_rank() == 0:
        path.write_text(json.dumps({"zero_optimization": stage, "steps_per_print": 10**9}))
    if dist.is_initialized():
        dist.barrier()
    data = folder / "data"
    return RunConfig(
        run=RunOptions(name=name, dir=str(folder / "runs"), max_steps=STEPS, precision="fp32", seed=3),
        model=ModelOptions(
            str(folder / "model"),
            freeze_vision=setting.frozen,
            activation_checkpointing=ActivationCheckpointing(setting.checkpointing),
        ),
        data=DataOptions(
            str(data / ("pairs_train.parquet" if setting.finetune else "train.parquet")),
            str(data / "images"),
            min_pixels=3136,
            max_pixels=7056,
        ),
        task=TaskOptions(name="finetune", reconstruct=True, negatives=1)
        if setting.finetune
        else TaskOptions(query_history=0.5, target_history=0.5, negatives=2),
        batch=BatchOptions(images=IMAGES, pack_tokens=10**6),
        # AdamW divides by the gradient's own size: with a tiny eps rounding decides where the gradient is zero.
        optim=OptimOptions(lr=1e-4, warmup_steps=1, eps=1e-4, weight_decay=0.01),
        loss=LossOptions(
            temperature=0.1,
            symmetric=True,
            same_target="positive" if setting.frozen else "mask",
            false_negative_margin=None if setting.frozen else margin,
            key_exchange="ring" if setting.stage == 2 else "gather",
        ),
        temperature=TemperatureOptions("learned", lr=0.02, max=0.2),
        deepspeed=str(path),
    )


class PackedPlan(Plan):
    """Chooses a budget that gives `packs` packs."""

    packs: int

    def step(self, step: int) -> StepPlan:
        self.pack_tokens = 10**6
        planned = super().step(step)
        while len(planned.packs[0]) < self.packs:
            self.pack_tokens = min(self.pack_tokens, planned.tokens) - 16
            planned = super().step(step)
        assert len(planned.packs[0]) == self.packs
        return planned


def into_packs(data: Data, packs: int) -> None:
    data.plan.__class__ = PackedPlan
    data.plan.packs = packs  # type: ignore[attr-defined]


def trained(folder: Path, setting: Setting, margin: float) -> Outcome:
    """What the Trainer does in this setting, on as many ranks as the process group has."""
    trainer = Trainer(run_config(folder, setting, margin), env.start())
    into_packs(trainer.data, setting.packs)
    outcome = Outcome([], [], {}, setting.packs)
    take_step = trainer.guard.step

    def recorded(engine, batch: StepBatch, loss: torch.Tensor) -> None:  # type: ignore[no-untyped-def]
        total = loss.clone()
        if dist.is_initialized():
            dist.all_reduce(total)
        outcome.losses.append(float(total))
        outcome.gradients.append(full_tensors(engine, gradients=True))
        take_step(engine, batch, loss)

    trainer.guard.step = recorded  # type: ignore[method-assign]
    log = trainer.temperature.log
    assert log is not None
    hook = lambda *_: outcome.gradients[-1].update({LOG: log.grad.clone()})  # noqa: E731 # type: ignore[union-attr]
    trainer.temperature.adam.register_step_pre_hook(hook)
    steps = trainer.data.steps(STEPS)
    for step in range(STEPS):
        batch = steps[step]
        assert isinstance(batch, StepBatch) and len(batch.packs) == setting.packs
        assert [pack.counts for pack in batch.packs] != [] and sum(rows.negatives for rows in batch.rows_per_rank) > 3
        trainer.train_step(batch)
    outcome.weights = {**full_tensors(trainer.engine, gradients=False), LOG: log.detach().clone()}
    trainer.engine.destroy()
    return outcome


def full_tensors(engine, gradients: bool) -> dict[str, torch.Tensor]:  # type: ignore[no-untyped-def]
    """Gradients averaged over the ranks, or weights, of all trained parameters, whole, under any ZeRO stage."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    named = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    if engine.zero_optimization_stage() == 0:
        return {name: (p.grad if gradients else p).detach().clone() for name, p in named.items()}
    get = safe_get_full_grad if gradients else safe_get_full_fp32_param
    return {name: get(p).detach().float().clone() for name, p in named.items()}


def reference(folder: Path, frozen: bool, finetune: bool) -> tuple[Outcome, float]:
    """The same three steps as anyone would write them, and the margin of false negatives that they were taken with.

    Rounding decides about a key whose similarity is the limit's to the last digits: there is no such key.
    """
    for margin in MARGINS:
        with nearest_to_limit() as nearest:
            outcome = plain_loop(run_config(folder, Setting(1, 0, 0.0, frozen, finetune), margin), frozen)
        if min(nearest, default=1.0) > 5e-6:
            return outcome, margin
    raise AssertionError(f"some key is near the limit at each of {MARGINS}")


@contextmanager
def nearest_to_limit() -> Iterator[list[float]]:
    """Smallest distance of a similarity from the limit of false negatives, of each loss that is computed inside."""
    found: list[float] = []

    def watched(
        row_RD: torch.Tensor, key_KD: torch.Tensor, row_ids: RowIds, key_ids: RowIds, **options: Any
    ) -> InfoNCE:
        if options["limit_R"] is not None:
            distance_RK = (row_RD @ key_KD.T - options["limit_R"][:, None]).detach().abs()
            positive_RK = row_ids.pair_id_N[:, None] == key_ids.pair_id_N[None, :]
            found.append(float(distance_RK.masked_fill(positive_RK, 2).min()))
        return info_nce(row_RD, key_KD, row_ids, key_ids, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("muco_ds.tasks.muco.info_nce", watched)
        yield found


def plain_loop(config: RunConfig, frozen: bool) -> Outcome:
    """One process, one pack, torch's own clipping and AdamW."""
    data = build_data(config)
    into_packs(data, 1)
    backbone = load_backbone(
        config.model.path, dtype=torch.float32, attention="sdpa", vocabulary=len(data.processing.tokenizer)
    )
    task = build_task(config, Embedder(backbone, freeze_vision=frozen)).train()
    optimizer = build_optimizer(task, config.optim)
    log_temperature = torch.nn.Parameter(torch.tensor(math.log(config.loss.temperature)))
    adam = torch.optim.Adam([log_temperature], lr=config.temperature.lr)
    named = {name: parameter for name, parameter in task.named_parameters() if parameter.requires_grad}
    outcome = Outcome([], [], {}, 1)
    for step in range(STEPS):
        batch = data.steps(STEPS)[step]
        assert isinstance(batch, StepBatch)
        result = task.loss([task(batch.packs[0])], batch.packs, batch.rows_per_rank, log_temperature.exp())
        kind = "extra_positives" if frozen else "false_negatives"
        assert result.stats[kind] > 0 and 0.01 < result.stats[kind] / result.stats["entries"] < 0.5, result.stats
        optimizer.zero_grad()
        adam.zero_grad()
        result.loss.backward()
        outcome.losses.append(float(result.loss))
        trained = {**named, LOG: log_temperature}
        outcome.gradients.append({name: parameter.grad.clone() for name, parameter in trained.items()})  # type: ignore[union-attr]
        torch.nn.utils.clip_grad_norm_(list(named.values()), config.optim.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, STEPS, config.optim)
        optimizer.step()
        adam.step()
    outcome.weights = {name: parameter.detach().clone() for name, parameter in trained.items()}
    return outcome


def errors(outcome: Outcome, expected: Outcome) -> Errors:
    losses = [abs(a - b) / abs(b) for a, b in zip(outcome.losses, expected.losses, strict=True)]
    gradients = [0.0]
    for mine, theirs in zip(outcome.gradients, expected.gradients, strict=True):
        assert mine.keys() == theirs.keys()
        whole = torch.stack([gradient.norm() for gradient in theirs.values()]).norm()
        for name, gradient in theirs.items():
            if gradient.norm() > 1e-6 * whole:
                # The temperature's is one sum over all rows, whose terms cancel: it may be near zero by chance.
                size = gradient.norm().clamp_min(5e-2 * whole) if name == LOG else gradient.norm()
                gradients.append(float((mine[name] - gradient).norm() / size))
            else:
                assert mine[name].norm() < 1e-5 * whole, name
    assert all(torch.isfinite(gradient).all() for step in outcome.gradients for gradient in step.values())
    assert all(torch.isfinite(weight).all() for weight in outcome.weights.values()) and all(map(math.isfinite, losses))
    weights = [float((outcome.weights[n] - w).norm() / w.norm().clamp_min(1e-3)) for n, w in expected.weights.items()]
    return Errors(max(losses), max(gradients), max(weights))


def compare(folder: Path, settings: Sequence[Setting]) -> list[Errors]:
    """Each setting's errors, on this many ranks; the references are computed here, on rank 0's data alone."""
    references = torch.load(folder / "references.pt", weights_only=False)
    found = []
    for setting in settings:
        expected, margin = references[setting.frozen, setting.finetune]
        found.append(errors(trained(folder, setting, margin), expected))
    return found


def write_references(folder: Path) -> None:
    kinds = list(product((True, False), (True, False)))
    torch.save({kind: reference(folder, *kind) for kind in kinds}, folder / "references.pt")


def measure(folder: Path, ranks: int, settings: Sequence[Setting]) -> list[Errors]:
    """Errors of each setting on `ranks` gloo processes: the largest of any rank. `write_rows` comes first."""
    if not (folder / "references.pt").exists():
        run_distributed(write_references, 1, folder, timeout_s=300.0)
    per_rank = run_distributed(compare, ranks, folder, list(settings), timeout_s=120.0 + 60.0 * len(settings))
    return [max(cell, key=Errors.worst) for cell in zip(*per_rank, strict=True)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--family", choices=KINDS, default="qwen2_vl")
    args = parser.parse_args()
    worst = 0.0
    print("| task | ranks | packs | ZeRO | checkpointing | vision | loss | gradients | weights |")
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        write_rows(Path(name), kind=args.family)
        for ranks in args.ranks:
            for setting, found in zip(grid(), measure(Path(name), ranks, grid()), strict=True):
                cells = [
                    "finetune" if setting.finetune else "muco",
                    ranks,
                    setting.packs,
                    setting.stage,
                    "on" if setting.checkpointing else "off",
                ]
                cells += ["frozen" if setting.frozen else "trained"]
                numbers = [f"{value:.0e}" for value in (found.loss, found.gradient, found.weight)]
                print("| " + " | ".join(map(str, [*cells, *numbers])) + " |", flush=True)
                worst = max(worst, found.worst())
    print(f"\nlargest relative error: {worst:.1e}")
    return int(not worst < 1e-5)


if __name__ == "__main__":
    sys.exit(main())
