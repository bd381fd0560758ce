"""Loss and every gradient depend on the weights and the global batch alone: reader to gradient, 1, 2 and 4 ranks.

The data is ragged (1 to 7 turns), some rows have no picture, so that a rank may hold packs without any.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoConfig

from muco_ds.config import LossOptions
from muco_ds.data.collator import Collator
from muco_ds.data.index import Indexer, open_index
from muco_ds.data.loader import StepDataset
from muco_ds.data.mixture import Mixture
from muco_ds.data.plan import Plan
from muco_ds.data.readers import M3TReader
from muco_ds.data.schema import StepBatch
from muco_ds.data.stages.muco import MuCoStage
from muco_ds.distributed.testing import run_distributed
from muco_ds.flops import FlopsModel
from muco_ds.models.backbones import load_backbone
from muco_ds.models.embedder import Embedder
from muco_ds.models.folder import Processing, Settings
from muco_ds.tasks.muco import MuCoTask

from exactness import write_rows

pytestmark = pytest.mark.distributed

IMAGES = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and a parquet of ragged rows, a third of them without a picture."""
    folder = tmp_path_factory.mktemp("batch")
    write_rows(folder, 24)
    return folder


SETTINGS = [
    (0.0, False, 8192, "gather"),
    (1.0, True, 8192, "gather"),
    (0.5, True, 8192, "gather"),
    (0.5, True, 400, "gather"),
    (0.5, True, 8192, "ring"),
]
"""(history, symmetric, pack_tokens, key_exchange): isolated turns, causal turns, a mixture in three forms."""


def losses_and_gradients(folder: Path) -> list[tuple[float, dict[str, torch.Tensor]]]:
    """What data-parallel training computes in one step: the global loss and the gradients averaged over the ranks."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    processing = Processing.load(str(folder / "model"), Settings("<|emb|>", 56 * 56, 84 * 84, None))
    vocabulary = len(processing.tokenizer)
    backbone = load_backbone(str(folder / "model"), dtype=torch.float64, attention="sdpa", vocabulary=vocabulary)
    embedder = Embedder(backbone, freeze_vision=False)
    results = []
    for history, symmetric, pack_tokens, exchange in SETTINGS:
        batch = one_batch(folder, processing, history, rank, world_size, pack_tokens)
        task = MuCoTask(embedder, LossOptions(temperature=0.1, symmetric=symmetric, key_exchange=exchange))
        task.zero_grad()
        result = task.loss([task(pack) for pack in batch.packs], batch.packs, batch.rows_per_rank)
        result.loss.backward()
        gradients = {}
        for name, parameter in task.named_parameters():
            assert parameter.grad is not None, f"{name} has no gradient on rank {rank}"
            if world_size > 1:
                dist.all_reduce(parameter.grad)
            gradients[name] = parameter.grad / world_size
        loss = result.stats["loss"].clone()
        if world_size > 1:
            dist.all_reduce(loss)
        results.append((float(loss), gradients))
    return results


def one_batch(
    folder: Path, processing: Processing, history: float, rank: int, world_size: int, pack_tokens: int = 8192
) -> StepBatch:
    packer = processing.packer()
    reader = M3TReader(str(folder / "data" / "train.parquet"), str(folder / "data" / "images"))
    index = open_index(Indexer(reader, packer.template, packer.images), None, builder=True, progress=False)
    draw: dict[str, Any] = {"query_history": history, "target_history": history, "seed": 3}
    flops = FlopsModel.from_config(AutoConfig.from_pretrained(folder / "model"), train_vision=True)
    mixture = Mixture([len(index)], [None], images=IMAGES, run=1, seed=3)
    stage = MuCoStage(index, reader, packer.template, **draw)
    plan = Plan(stage, flops, mixture, pack_tokens=pack_tokens, world_size=world_size)
    batch = StepDataset(plan, Collator(stage, packer), rank, max_steps=2)[1]
    assert isinstance(batch, StepBatch)
    return batch


def test_gradient_on_1_2_and_4_ranks_equals_one_process(folder: Path) -> None:
    expected = losses_and_gradients(folder)
    for world_size in (2, 4):
        for results in run_distributed(losses_and_gradients, world_size, folder, timeout_s=300.0):
            # In several packs or in one, with the keys gathered or in a ring, the mixture is the same batch.
            for (loss, gradients), (other_loss, others) in zip(
                [*expected[:3], *expected[2:3] * 2], results, strict=True
            ):
                assert any("visual" in name and grad.abs().max() > 0 for name, grad in gradients.items())
                assert other_loss == pytest.approx(loss, rel=1e-6)
                for name, gradient in gradients.items():
                    error = (others[name] - gradient).norm() / gradient.norm().clamp_min(1e-12)
                    assert error < 1e-6, f"{name}: relative error {error:.1e} on {world_size} ranks"


def test_some_pack_holds_no_picture_beside_one_that_does(folder: Path) -> None:
    """The case above must include it, or it proves nothing about packs that have only the dummy picture."""
    processing = Processing.load(str(folder / "model"), Settings("<|emb|>", 56 * 56, 84 * 84, None))
    packs = [one_batch(folder, processing, 0.5, rank, world_size=4, pack_tokens=400).packs for rank in range(4)]
    assert any({pack.has_images for pack in together} == {True, False} for together in zip(*packs, strict=True))
