"""CoMa's first stage against a reference written by hand: loss and every gradient, float64, 1 and 2 ranks, any packs.

The reference runs the stock Qwen2.5-VL with a vocabulary head and a dense 4-D mask on one conversation at a time, and
sums cross-entropies token by token over what the data file says.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from local_engine import LocalEngine

from muco_ds.build import build_data, build_task
from muco_ds.config import (
    BatchOptions,
    DataOptions,
    ModelOptions,
    OptimOptions,
    PromptOptions,
    RunConfig,
    RunOptions,
    TaskOptions,
)
from muco_ds.config_activations import ActivationCheckpointing
from muco_ds.data.demo_scenes import row_texts, write_data
from muco_ds.data.schema import StepBatch
from muco_ds.distributed.testing import run_distributed
from muco_ds.models.backbones import load_backbone
from muco_ds.models.demo_model import write_model
from muco_ds.models.embedder import Embedder

from coma_by_hand import MAX_PIXELS, MIN_PIXELS, Stock, conversation_rows, untie
from tiny_folders import change_family

pytestmark = pytest.mark.distributed

IMAGES, STEP = 9, 1
PROMPTS = PromptOptions(compress_picture="All of it:", compress_text="In short:")


@dataclass(frozen=True)
class Case:
    """A task as it is configured, how many tokens, the budget of a pack, and whether the head is the table."""

    task: TaskOptions = field(default_factory=lambda: TaskOptions(name="coma_compress"))
    tokens: int = 6
    pack_tokens: int = 10**5
    tied: bool = True


def task(**options: Any) -> TaskOptions:
    return TaskOptions(name="coma_compress", **options)


CASES = {
    "answers": Case(),
    "answers, packs": Case(pack_tokens=300),
    "answers, a head of its own, packs": Case(tied=False, pack_tokens=250),
    "questions too, one token": Case(task(train_questions=True), tokens=1),
    "two turns, the prompt is seen, packs": Case(task(turns=2, answers_see="prompt"), pack_tokens=250),
    "all is seen, a head of its own": Case(task(answers_see="all", train_questions=True), tied=False),
    "nothing is seen": Case(task(answers_see="nothing")),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coma")
    rows = write_data(folder / "data", 20, 1, seed=0)
    for name in ("tied", "untied"):
        write_model(folder / name, row_texts(rows), seed=0)
        change_family(folder / name, "qwen2_5_vl")
    untie(folder / "untied")
    lines = [json.dumps(row) for row in conversation_rows(rows)]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def run_config(folder: Path, case: Case) -> RunConfig:
    return RunConfig(
        run=RunOptions(name="coma", max_steps=2, precision="fp32", seed=3),
        model=ModelOptions(
            str(folder / ("tied" if case.tied else "untied")),
            compression_tokens=case.tokens,
            freeze_vision=False,
            activation_checkpointing=ActivationCheckpointing(0),
        ),
        data=DataOptions(
            str(folder / "rows.jsonl"),
            str(folder / "data" / "images"),
            min_pixels=MIN_PIXELS,
            max_pixels=MAX_PIXELS,
        ),
        task=case.task,
        prompts=PROMPTS,
        batch=BatchOptions(images=IMAGES, pack_tokens=case.pack_tokens),
        optim=OptimOptions(warmup_steps=0),
    )


def trained(folder: Path) -> dict[str, tuple[float, dict[str, torch.Tensor], int]]:
    """Of each case the global loss, the gradients averaged over the ranks, and the packs of a rank."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    results = {}
    for name, case in CASES.items():
        config = run_config(folder, case)
        data = build_data(config, world_size)
        vocabulary = len(data.processing.tokenizer)
        backbone = load_backbone(config.model.path, dtype=torch.float64, attention="sdpa", vocabulary=vocabulary)
        stage_task = build_task(config, Embedder(backbone, freeze_vision=False))
        batch = data.steps(STEP + 1)[STEP]
        assert isinstance(batch, StepBatch)
        engine = LocalEngine(stage_task)
        result = stage_task.backward(engine, batch, 1.0)
        assert engine.reductions == 1
        loss, gradients = result.stats["loss"].double(), {}
        for parameter_name, parameter in stage_task.named_parameters():
            assert parameter.grad is not None, f"{parameter_name} has no gradient"
            gradients[parameter_name] = parameter.grad / world_size
        if world_size > 1:
            for tensor in (loss, *gradients.values()):
                dist.all_reduce(tensor)
        results[name] = (float(loss), gradients, len(batch.packs))
    return results


# ---- the reference


@cache
def reference(folder: Path) -> dict[str, tuple[float, dict[str, torch.Tensor]]]:
    results, images = {}, folder / "data" / "images"
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    for name, case in CASES.items():
        data = build_data(run_config(folder, case), 1)
        stock = Stock(folder / ("tied" if case.tied else "untied"), case.task, case.tokens, PROMPTS)
        chosen = [int(data.plan.index.samples["row"][sample]) for sample in data.plan.step(STEP).samples_B]
        losses = [loss for row in chosen for loss in stock.losses(rows[row], images)]
        loss = torch.stack(losses).mean()
        loss.backward()
        gradients = {}
        for parameter_name, parameter in stock.model.named_parameters():
            inner = parameter_name.removeprefix("model.")
            ours = "head.weight" if inner == "lm_head.weight" else f"embedder.model.{inner}"
            assert parameter.grad is not None
            gradients[ours] = parameter.grad
        results[name] = (loss.item(), gradients)
    return results


@pytest.mark.parametrize("world_size", [1, 2])
def test_loss_and_gradients_are_those_written_by_hand(folder: Path, world_size: int) -> None:
    for results in run_distributed(trained, world_size, folder, timeout_s=300.0):
        for name, (expected, expected_gradients) in reference(folder).items():
            loss, gradients, packs = results[name]
            assert packs == 1 or "packs" in name, name
            assert packs > 2 or "packs" not in name or world_size > 1, name
            assert loss == pytest.approx(expected, rel=1e-6), name
            assert gradients.keys() == expected_gradients.keys(), name
            whole = torch.stack([gradient.norm() for gradient in expected_gradients.values()]).norm()
            for parameter, gradient in expected_gradients.items():
                error = (gradients[parameter] - gradient).norm() / max(gradient.norm(), 1e-5 * whole)
                assert error < 1e-5, f"{name}, {parameter}: relative error {error:.1e} on {world_size} ranks"
